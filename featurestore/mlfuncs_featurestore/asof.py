"""The point-in-time join of one view: for each spine row, what was known of its entity at its time.

Owns: the join of one bucket (`join_bucket`), which any engine may run anywhere, and the meaning of it:

- A history row is visible to a spine row at time t when its event time <= t and its created time <= t (the latter
  unless asked not to; without a created column only the event time counts).
- Of the visible rows the last by event time wins; of equals the last created; of equals the last ingested.
- Its age t - event time may be at most the view's ttl, inclusive; older is EXPIRED and null.
- Views with an `event_id`: of one event only the version that was current at t counts, and a deleted one not at all.
  The later created version is the current one, of equals (and without a created column) the later ingested.
- Every spine row comes back once, whether found or not. A null key is NOT_FOUND.
- A feature of the winning row that is null is NULL: earlier rows are not searched for another value.
- Aggregates are evaluated at t over the visible events (`windows`), where an event was ever visible; else NOT_FOUND.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs_featurestore import asof_kernels as kernels
from mlfuncs_featurestore.arrays import int64s
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.offline import DELETED, INGEST, DataFile, Snapshot, stored_schema
from mlfuncs_featurestore.windows import FOREVER, Events, Moments, aggregate

PRESENT, NULL, NOT_FOUND, EXPIRED = range(4)
STATUSES = ("PRESENT", "NULL", "NOT_FOUND", "EXPIRED")
_ALWAYS = 2**62  # a window longer than any history


@dataclass(frozen=True)
class BucketJoin:
    """The work of one bucket: all values, so that it can be sent to another process.

    `keys` are the spine's key columns in canonical form, without nulls, `at_us` its times, `rows` the places of these
    spine rows in the whole spine. `snapshot.files` are the bucket's files only.
    """

    view: FeatureView
    snapshot: Snapshot
    features: tuple[str, ...]
    aware: bool
    keys: pa.Table
    at_us: np.ndarray
    rows: np.ndarray
    arrived_us: int | None = None  # rows ingested later than this do not count


@dataclass(frozen=True)
class BucketResult:
    """Per spine row of the bucket: feature columns, the row status (PRESENT, NOT_FOUND, EXPIRED), the event time."""

    rows: np.ndarray
    columns: dict[str, pa.Array]
    status: np.ndarray
    event_us: np.ndarray


def join_bucket(work: BucketJoin) -> BucketResult:
    """The join of one bucket."""
    entities = Entities(work.keys)
    order, starts = kernels.group(entities.ids, entities.count, work.at_us)
    moments = Moments(starts, work.at_us[order])
    stored = [name for name in work.features if name in work.view.fields]
    aggregates = [work.view.aggregates[name] for name in work.features if name in work.view.aggregates]
    history = _History(work, entities)
    if aggregates or work.view.event_id:
        events = history.events(sorted({one.column for one in aggregates}))
        refs, event_us = events.latest(moments)
    else:
        refs, event_us = history.latest(moments)
    status = np.where(refs < 0, NOT_FOUND, PRESENT).astype(np.uint8)
    if work.view.ttl_us is not None:
        status[(refs >= 0) & (event_us < moments.at_us - work.view.ttl_us)] = EXPIRED
    gone = status != PRESENT
    columns = history.values(stored, np.where(gone, -1, refs))
    if aggregates:
        for name, array in aggregate(aggregates, events.grouped, events.columns, moments).items():
            columns[name] = pc.if_else(pa.array(gone), pa.scalar(None, array.type), array)
    return BucketResult(work.rows[order], {name: columns[name] for name in work.features}, status, event_us)


class Entities:
    """The spine's entities as dense ids, and the ids of history rows (-1: not in the spine).

    Key columns are numbered one after the other: the number so far and the next column's place among the spine's
    values make the next number.
    """

    def __init__(self, keys: pa.Table) -> None:
        columns = [column.combine_chunks() for column in keys.columns]
        self._values = [None if _is_int(column) else column.unique() for column in columns]
        self._tables: list[tuple[np.ndarray, np.ndarray]] = []
        self.ids, self.count = np.zeros(len(columns[0]), np.int64), 1
        for place, column in enumerate(columns):
            numbers = self._numbers(place, column)
            if place:  # dense numbers on both sides: the product fits
                numbers, _, *table = kernels.number_ints(numbers)
                self._tables.append((table[0], table[1]))
                numbers = _pair(self.ids, numbers)
            self.ids, self.count, *table = kernels.number_ints(numbers)
            self._tables.append((table[0], table[1]))

    def find(self, rows: pa.Table, names: Sequence[str]) -> np.ndarray:
        """The ids of history rows."""
        tables = iter(self._tables)
        ids = np.zeros(rows.num_rows, np.int64)
        for place, name in enumerate(names):
            numbers = self._numbers(place, rows[name].combine_chunks())
            if place:
                numbers = _pair(ids, kernels.find_ints(numbers, *next(tables)))
            ids = kernels.find_ints(numbers, *next(tables))
        return ids

    def _numbers(self, place: int, column: pa.Array) -> np.ndarray:
        values = self._values[place]
        if values is None:
            return int64s(column)
        return pc.index_in(column, value_set=values).cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)


def _is_int(column: pa.Array) -> bool:
    return pa.types.is_int64(column.type)


def _pair(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One number for two dense ids below 2**31; -1 when either is."""
    return np.where((left < 0) | (right < 0), -1, (left << 31) | right)


class _History:
    """A bucket's history, read a row group at a time; rows are numbered through all files."""

    def __init__(self, work: BucketJoin, entities: Entities) -> None:
        self.work, self.entities = work, entities
        self.schema = stored_schema(work.view)
        last = int(work.at_us.max()) if len(work.at_us) else 0
        time = work.view.timestamp
        self.files = list(work.snapshot.files)
        if not work.view.event_id:  # a correction may move an event to a later time; it counts all the same
            self.files = [file for file in self.files if file.low.get(time, last) <= last]
        self._first_ref = np.cumsum([0, *(file.rows for file in self.files)])

    def latest(self, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
        """Per moment, the number of the winning row (-1: none) and its event time."""
        best = np.full((4, len(moments.at_us)), -1, np.int64)
        for first_ref, rows in self._rows([]):
            ids = self._ids(rows)
            event, created, ingest = self._times(rows)
            aware = self.work.aware
            kernels.note(ids, event, created, ingest, aware, first_ref, moments.starts, moments.at_us, best)
        kernels.sweep(moments.starts, best)
        return best[3], best[0]

    def events(self, columns: list[str]) -> _Events:
        """Every event of the spine's entities, with the values of `columns`."""
        view = self.work.view
        extra = [*columns, *([view.event_id, DELETED] if view.event_id else [])]
        pieces: list[tuple[Any, ...]] = []
        tables = []
        for first_ref, rows in self._rows(list(dict.fromkeys(extra))):
            ids = self._ids(rows)
            chosen = np.flatnonzero(ids >= 0)
            times = self._times(rows)
            refs = first_ref + chosen
            pieces.append((ids[chosen], *(one[chosen] for one in times), refs))
            tables.append(rows.select(list(dict.fromkeys(extra))).take(pa.array(chosen)))
        merged = [np.concatenate(parts) for parts in zip(*pieces, strict=True)] if pieces else [_EMPTY] * 5
        values = pa.concat_tables(tables) if tables else self.schema.empty_table().select(list(dict.fromkeys(extra)))
        return _Events(self, merged, values, columns)

    def values(self, names: list[str], refs: np.ndarray) -> dict[str, pa.Array]:
        """The columns `names` of the rows `refs`, null where a ref is -1."""
        if not names:
            return {}
        wanted = np.unique(refs)
        wanted = wanted[wanted >= 0]
        types = {name: self.schema.field(name).type for name in names}
        parts = []
        for number, file in enumerate(self.files):
            low, high = np.searchsorted(wanted, self._first_ref[number : number + 2])
            if low < high:
                rows = wanted[low:high] - self._first_ref[number]
                parts.append(self.work.snapshot.read_rows(file, names, types, rows))
        found = pa.concat_tables(parts) if parts else pa.schema(list(types.items())).empty_table()
        index = pa.array(np.searchsorted(wanted, refs), mask=refs < 0)
        return {name: found[name].combine_chunks().take(index) for name in names}

    def _rows(self, extra: list[str]) -> Any:
        view = self.work.view
        created = [view.created_timestamp] if view.created_timestamp else []
        columns = list(dict.fromkeys([*view.keys, view.timestamp, *created, INGEST, *extra]))
        types = {name: self.schema.field(name).type for name in columns}
        for number, file in enumerate(self.files):
            first_ref = int(self._first_ref[number])
            for rows in self.work.snapshot.batches(file, columns, types):
                yield first_ref, rows
                first_ref += rows.num_rows

    def _ids(self, rows: pa.Table) -> np.ndarray:
        """The spine's entity of each row, -1 for none."""
        ids = self.entities.find(rows, list(self.work.view.keys))
        if self.work.arrived_us is None:
            return ids
        return np.where(int64s(rows[INGEST]) > self.work.arrived_us * 1000, -1, ids)

    def _times(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        view = self.work.view
        event = int64s(rows[view.timestamp])
        created = int64s(rows[view.created_timestamp]) if view.created_timestamp else event
        return event, created, int64s(rows[INGEST])


_EMPTY = np.empty(0, np.int64)


class _Events:
    """The events of the spine's entities, grouped and in event order, for windows and corrected views."""

    def __init__(self, history: _History, merged: Sequence[np.ndarray], values: pa.Table, columns: list[str]) -> None:
        view, aware = history.work.view, history.work.aware
        ids, event, created, ingest, refs = merged
        order, starts = kernels.group_events(ids, history.entities.count, event, created, ingest)
        picked = pa.array(order)
        known = np.maximum(event, created) if aware and view.created_timestamp else event
        until = None
        if view.event_id:
            deleted = values[DELETED].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)
            codes = values[view.event_id].combine_chunks().dictionary_encode().indices.fill_null(-1)
            written = created if view.created_timestamp else np.zeros_like(created)  # else the order of ingest alone
            versions = (ids, codes.to_numpy(zero_copy_only=False), written, ingest)
            until = replaced_at(versions, timed=bool(aware and view.created_timestamp))
            known = np.where(deleted, FOREVER, known)
        self.refs, self.event_us = refs[order], event[order]
        known = self.event_us if known is event else known[order]
        self.grouped = Events(starts, self.event_us, known, until if until is None else until[order])
        self.columns = {name: values[name].combine_chunks().take(picked) for name in columns}

    def latest(self, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
        """Per moment, the row number of the last visible event (-1: none) and its event time."""
        from mlfuncs_featurestore.window_kernels import LAST, ends

        index = np.empty(len(moments.at_us), np.int64)
        events, everything = self.grouped, np.ones(len(self.refs), np.uint8)
        ends(*events.arrays, everything, moments.starts, moments.at_us, _ALWAYS, LAST, index)
        if not len(self.refs):
            return index, np.zeros(len(index), np.int64)
        return np.where(index < 0, -1, self.refs[index]), self.event_us[index]


def replaced_at(versions: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], timed: bool) -> np.ndarray:
    """When the next version of the same event (entity id, event code >= 0) replaced each row; FOREVER: never.

    Versions follow each other by created time and ingest number. Untimed, a replaced row never counted at all.
    """
    ids, codes, created, ingest = versions
    until = np.full(len(ids), FOREVER)
    order = np.lexsort((ingest, created, codes, ids))
    before, after = order[:-1], order[1:]
    same = (ids[before] == ids[after]) & (codes[before] == codes[after]) & (codes[before] >= 0)
    until[before[same]] = created[after[same]] if timed else -FOREVER
    return until


def bucket_files(snapshot: Snapshot) -> Mapping[int, tuple[DataFile, ...]]:
    """The files of each bucket that has any."""
    files: dict[int, list[DataFile]] = {}
    for file in snapshot.files:
        files.setdefault(file.bucket, []).append(file)
    return {bucket: tuple(found) for bucket, found in files.items()}
