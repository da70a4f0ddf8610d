"""Rows ahead of the clock: online before their time has come, and not shown until then.

Owns: the value of an entity that has such rows, where only its latest row is kept. Clocks differ, so a row may come
with a time that is a little later than the writer's clock (`online_write.FUTURE_US`). It waits beside the row before
it, and a reader takes the newest that is due by its own clock, as the point-in-time join does. Pure; `redis_scripts`
does the same inside Redis.

Layout: "MLA1", then u32 length and packed row (`rows`), newest first. All but the last were ahead of the clock when
they were written; the last was not, and counts whatever a reader's clock says; of length 0, there was no row before.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from mlfuncs_featurestore.rows import read_stamp

MAGIC = b"MLA1"
LIMIT = 64  # rows of one value; of more, the oldest go and the last one left counts at once
_LENGTH = struct.Struct("<I")


def rows_in(value: bytes | None) -> list[bytes]:
    """The rows of a stored value, newest first; the last is b"" when nothing is known before those ahead."""
    if value is None:
        return [b""]
    if not value.startswith(MAGIC):
        return [value]
    rows, position = [], len(MAGIC)
    while position < len(value):
        (length,) = _LENGTH.unpack_from(value, position)
        position += 4 + length
        rows.append(value[position - length : position])
    return rows


def with_row(value: bytes | None, row: bytes, now_us: int) -> bytes | None:
    """The value with one more row at `now_us`; None when newer rows that are due leave it no place."""
    rows, new = rows_in(value), read_stamp(row).order
    place = next((at for at, one in enumerate(rows) if not one or new >= read_stamp(one).order), None)
    if place is None:
        return None
    is_same = rows[place] and read_stamp(rows[place]).order == new
    rows[place : place + 1] = [row] if is_same else [row, rows[place]]
    keep = next((at for at, one in enumerate(rows[:-1]) if read_stamp(one).event_us <= now_us), len(rows) - 1)
    kept = rows[: min(keep + 1, LIMIT)]
    return kept[0] if len(kept) == 1 else MAGIC + b"".join(_LENGTH.pack(len(one)) + one for one in kept)


def due_rows(values: Sequence[bytes | None], at_us: int) -> list[bytes | None]:
    """Of each value, the row that counts at `at_us`; None where there is none."""
    return [value if value is None or not value.startswith(MAGIC) else _due(value, at_us) for value in values]


def _due(value: bytes, at_us: int) -> bytes | None:
    *ahead, last = rows_in(value)
    return next((row for row in ahead if read_stamp(row).event_us <= at_us), last or None)
