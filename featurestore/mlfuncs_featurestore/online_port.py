"""The port to an online store, and the one in memory.

Owns: OnlineRows, what an adapter must do, and MemoryRows, the fake that ships for tests of code above it. Both pass
`tests/contracts/test_online_rows.py`. A value is a packed row (`rows`) or an event value (`stream_windows`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

from mlfuncs_featurestore.ahead import with_row
from mlfuncs_featurestore.stream_windows import STATE

LATEST_US = 2**63 - 1  # a clock that no row is ahead of


class OnlineRows(Protocol):
    """Bytes by key. Every write is atomic per key, and may be repeated without changing the result but for `append`."""

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """What is at each key, None where there is nothing."""

    def write_newest(self, keys: Sequence[bytes], rows: Sequence[bytes], now_us: int = LATEST_US) -> int:
        """Store each packed row unless one with a later (event, created, sequence) is there; how many were stored.

        A row later than `now_us`, the writer's clock, waits beside the one before it (see `ahead`).
        """

    def stream_newest(self, parts: Iterable[tuple[Sequence[bytes], Sequence[bytes]]], now_us: int = LATEST_US) -> int:
        """`write_newest` of one part (keys, rows) after another; a part may be made while an earlier one is written."""

    def append(self, keys: Sequence[bytes], records: Sequence[bytes], header: bytes, least: int) -> list[bytes]:
        """Append to each value; the keys of values over `least` bytes that have more than doubled since they were
        compacted. `header` goes before the first record; of a value that is there, its horizon is raised to it."""

    def swap(self, key: bytes, seen: bytes, new: bytes) -> bool:
        """Replace the value that was `seen`; False when it is another one by now."""

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove what is at the keys."""


class MemoryRows:
    """An online store in this process."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See OnlineRows."""
        with self._lock:
            return [self._values.get(key) for key in keys]

    def write_newest(self, keys: Sequence[bytes], rows: Sequence[bytes], now_us: int = LATEST_US) -> int:
        """See OnlineRows."""
        stored = 0
        with self._lock:
            for key, row in zip(keys, rows, strict=True):
                value = with_row(self._values.get(key), row, now_us)
                if value is not None:
                    self._values[key] = value
                    stored += 1
        return stored

    def stream_newest(self, parts: Iterable[tuple[Sequence[bytes], Sequence[bytes]]], now_us: int = LATEST_US) -> int:
        """See OnlineRows."""
        return sum(self.write_newest(*part, now_us) for part in parts)

    def append(self, keys: Sequence[bytes], records: Sequence[bytes], header: bytes, least: int) -> list[bytes]:
        """See OnlineRows."""
        grown = []
        with self._lock:
            for key, record in zip(keys, records, strict=True):
                is_new = key not in self._values
                value = self._values.get(key, header) + record
                if STATE.unpack_from(header)[1] > STATE.unpack_from(value)[1]:
                    value = value[:4] + header[4:12] + value[12:]
                self._values[key] = value
                if not is_new and len(value) > max(least, 2 * STATE.unpack_from(value)[2]):
                    grown.append(key)
        return grown

    def swap(self, key: bytes, seen: bytes, new: bytes) -> bool:
        """See OnlineRows."""
        with self._lock:
            if self._values.get(key) != seen:
                return False
            self._values[key] = new
            return True

    def delete(self, keys: Sequence[bytes]) -> None:
        """See OnlineRows."""
        with self._lock:
            for key in keys:
                self._values.pop(key, None)
