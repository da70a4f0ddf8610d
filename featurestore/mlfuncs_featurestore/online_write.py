"""Rows into the online store: packed by column, sent in batches, newest wins.

Owns: what `push`, `materialize` and `stream` have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.online_plan import LATEST, ViewRead
from mlfuncs_featurestore.online_rows import entity_keys, newest_of_each, pack_table, read_stamps, whole_numbers

if TYPE_CHECKING:
    from mlfuncs_featurestore.online import OnlineStore

ROWS_AT_ONCE = 10_000  # events packed before they are sent
STREAM_ROWS = 2_000  # rows sent while the next are packed: two script calls, as much as socket buffers take
FUTURE_US = 60 * 10**6  # clocks differ: a row this much ahead waits online until it is due, a later one offline
TRIES = 5  # of one compaction, against writers that append meanwhile


def write_rows(
    online: OnlineStore, view: FeatureView, rows: pa.Table, now_us: int, left_out_us: int | None = None
) -> int:
    """Write conformed rows that carry `__ingest`; idempotent, in any order. Returns how many rows were stored.

    Where only the newest row is kept, one up to FUTURE_US ahead of `now_us` waits beside it until it is due (`ahead`),
    and one of a later time is left out. `left_out_us`: events up to this time may be missing from `rows`; values of
    events remember it as their horizon.
    """
    read = online.read_of(view, ())
    if read.form != LATEST:
        parts = _slices(rows, ROWS_AT_ONCE)
        return sum(_write_events(online, read, part, now_us, left_out_us) for part in parts)
    event = whole_numbers(rows[view.timestamp])
    if not len(event) or event.max() <= now_us:
        return online.rows.stream_newest((pack_latest(read, part) for part in _slices(rows, STREAM_ROWS)), now_us)
    due, waits = pa.array(event <= now_us), pa.array((event > now_us) & (event <= now_us + FUTURE_US))
    first = (pack_latest(read, part) for part in _slices(rows.filter(due), STREAM_ROWS))
    return online.rows.stream_newest(chain(first, _one_by_one(read, rows.filter(waits))), now_us)


def _slices(rows: pa.Table, size: int) -> list[pa.Table]:
    return [rows.slice(start, size) for start in range(0, rows.num_rows, size)]


def _one_by_one(read: ViewRead, rows: pa.Table) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Keys and packed rows in parts in which each key comes once: the entities' first rows, then their second, ..."""
    keys = read.keys.of(entity_keys(read.view, rows))
    parts: list[dict[bytes, bytes]] = []
    counts: Counter[bytes] = Counter()
    for key, row in zip(keys, pack_table(read.codec, rows, read_stamps(read.view, rows)), strict=True):
        if counts[key] == len(parts):
            parts.append({})
        parts[counts[key]][key] = row
        counts[key] += 1
    return ((list(part), list(part.values())) for part in parts)


def pack_latest(read: ViewRead, rows: pa.Table) -> tuple[list[bytes], list[bytes]]:
    """The Redis keys and packed rows of a table, each entity's newest once."""
    stamps, entities = read_stamps(read.view, rows), entity_keys(read.view, rows)
    packed = pack_table(read.codec, rows, stamps)
    newest = newest_of_each(entities, stamps)
    if newest is not None:
        entities, packed = [entities[place] for place in newest], [packed[place] for place in newest]
    return read.keys.of(entities), packed


def _write_events(online: OnlineStore, read: ViewRead, rows: pa.Table, now_us: int, left_out_us: int | None) -> int:
    from mlfuncs_featurestore.stream_windows import COMPACT_BYTES, NEVER, new_header, to_record

    stamps, entities = read_stamps(read.view, rows), entity_keys(read.view, rows)
    records: dict[bytes, list[bytes]] = {}
    for entity, row in zip(entities, pack_table(read.codec, rows, stamps), strict=True):
        records.setdefault(entity, []).append(to_record(row))
    keys = read.keys.of(list(records))
    header = new_header(NEVER if left_out_us is None else left_out_us)
    grown = online.rows.append(keys, [b"".join(mine) for mine in records.values()], header, COMPACT_BYTES)
    for key in grown:
        compact_key(online, read, key, now_us)
    return rows.num_rows


def compact_key(online: OnlineStore, read: ViewRead, key: bytes, now_us: int) -> bool:
    """Drop the events of one entity that no window reaches; False when others kept writing to it meanwhile."""
    from mlfuncs_featurestore.stream_windows import EntityEvents

    for _ in range(TRIES):
        seen = online.rows.read([key])[0]
        if seen is None:
            return True
        if online.rows.swap(key, seen, EntityEvents(read.view, read.codec, [seen]).compacted(0, now_us)):
            return True
    return False


def number_rows(rows: pa.Table, first: int) -> pa.Table:
    """`rows` with `__ingest` numbers counting from `first`."""
    from mlfuncs_featurestore.offline import INGEST

    return rows.append_column(INGEST, pa.array(np.arange(first, first + rows.num_rows, dtype=np.int64)))
