"""Windows online: one entity's events as bytes in Redis, evaluated at the moment of reading by the batch kernels.

Owns: the event value, its evaluation, its compaction. Pure: the clock is an argument.

An exact sliding window must know when each of its events leaves it, so the state of an entity is its events: those of
the view's longest window (and, in views with an event_id, a few older ones, so that a deleted last event leaves its
predecessor). Reading groups and orders them as the point-in-time join does and calls `windows.aggregate` at now: the
same kernels on the same events give the same bits, at every event and in between. Late events, corrections and deletes
are appended like any other; order of arrival does not count, and an event that arrives twice counts once.

Bounds per entity: the events of the longest window, at most MAX_EVENTS, each as long as a packed row and 4 bytes; up to
twice that between compactions, and COMPACT_BYTES before the first. Of an entity with more events only the newest
MAX_EVENTS are kept.

A value knows what it no longer has: its horizon is the event time of the newest event that counted when it was dropped.
A window that reaches back to it is NULL, never wrong: of an entity beyond MAX_EVENTS, of a window longer than those the
view had (until the next `materialize`), of a moment in the past. In views with an event_id, deletes and corrections may
use up all kept events; the last one is then before the horizon, `doubtful` says so, and `online_repair` builds the
value anew from the offline table.

Layout: "MLW1", i64 horizon, u32 size after the last compaction, then per event u32 length and its packed row (`rows`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore import asof_kernels
from mlfuncs_featurestore.asof import EXPIRED, NOT_FOUND, PRESENT, replaced_at
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.online_rows import to_arrow
from mlfuncs_featurestore.row_columns import _NUMPY
from mlfuncs_featurestore.rows import DELETED, HEADER, RowCodec
from mlfuncs_featurestore.window_kernels import LAST, ends
from mlfuncs_featurestore.windows import FOREVER, Events, Moments, aggregate

MAGIC = b"MLW1"
STATE = struct.Struct("<4sqI")
NEVER = -(2**63)
MAX_EVENTS = 100_000
KEPT_BEFORE = 16  # older events kept in views with an event_id
COMPACT_BYTES = 16_384
SLACK_US = 60 * 10**6  # kept beyond the longest window: a reader's clock may be behind the writer's
_LENGTH = struct.Struct("<I")
_ALWAYS = 2**62


@dataclass(frozen=True)
class Evaluated:
    """Per entity: status (PRESENT, NOT_FOUND, EXPIRED), event time of the last event, and each feature's column."""

    status: np.ndarray
    event_us: np.ndarray
    columns: dict[str, pa.Array]


def new_header(horizon: int = NEVER, size: int = 0) -> bytes:
    """The head of a value, written once when an entity's first event arrives and at each compaction."""
    return STATE.pack(MAGIC, horizon, size)


def to_record(row: bytes) -> bytes:
    """A packed row as a record to append."""
    return _LENGTH.pack(len(row)) + row


def read_value(value: bytes) -> tuple[int, list[bytes]]:
    """The horizon and the packed rows of a stored value. Raises InvalidInput when it is cut short or unknown."""
    if value[:4] != MAGIC:
        raise InvalidInput("a stored event value is not of a known form; materialize the view again")
    horizon: int = STATE.unpack_from(value)[1]
    rows, position, end = [], STATE.size, len(value)
    while position < end:
        (length,) = _LENGTH.unpack_from(value, position)
        position += 4 + length
        rows.append(value[position - length : position])
    if position != end:
        raise InvalidInput("a stored event value is cut short; materialize the view again")
    return horizon, rows


def _stack(codec: RowCodec, values: Sequence[bytes | None]) -> tuple[list[int], np.ndarray] | None:
    """How many rows each value has, and their records as one array of bytes (rows, 4 + fixed size).

    None unless all rows are of this codec's fixed size.
    """
    size = codec.fixed_size + 4
    counts, parts = [], []
    for value in values:
        count, rest = (0, 0) if value is None else divmod(len(value) - STATE.size, size)
        counts.append(count)
        if value is None:
            continue
        if rest or value[:4] != MAGIC:
            return None
        parts.append(value)
    if len(parts) == 1:
        records = np.frombuffer(parts[0], np.uint8, offset=STATE.size).reshape(-1, size)
    else:
        records = np.frombuffer(b"".join([part[STATE.size :] for part in parts]), np.uint8).reshape(-1, size)
    wanted = int.from_bytes(_LENGTH.pack(size - 4) + codec.layout.to_bytes(4, "little"), "little")
    return (counts, records) if (_cut(records, 0, "<u8") == np.uint64(wanted)).all() else None


def _cut(records: np.ndarray, offset: int, kind: str) -> np.ndarray:
    """The values of one numpy type that lie at byte `offset` of each record."""
    count, size = records.shape
    return np.ascontiguousarray(np.ndarray(count, kind, records, offset, size)) if count else np.empty(0, kind)


class EntityEvents:
    """The events of several entities, one value each (None: no value), grouped and in event order."""

    def __init__(self, view: FeatureView, codec: RowCodec, values: Sequence[bytes | None], aware: bool = True) -> None:
        self.view, self.codec, self.count = view, codec, len(values)
        self.horizon = np.array([NEVER if one is None else STATE.unpack_from(one)[1] for one in values], np.int64)
        self._aware = aware and bool(view.created_timestamp)
        stacked, self._records = _stack(codec, values), None
        if stacked is None:
            parsed = [[] if value is None else read_value(value)[1] for value in values]
            counts, rows = [len(mine) for mine in parsed], [row for mine in parsed for row in mine]
            heads, at = np.frombuffer(b"".join([row[: HEADER.size] for row in rows]), np.uint8), 0
            heads = heads.reshape(-1, HEADER.size)
        else:
            (counts, heads), at = stacked, _LENGTH.size
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        stamps = [_cut(heads, at + place, "<i8") for place in (4, 12, 20)]
        flags = _cut(heads, at + HEADER.size - 1, "u1")
        order = _order(self.starts, *stamps)
        if order is not None:
            ids = self.ids[order]
            self.starts = np.searchsorted(ids, np.arange(self.count + 1)).astype(np.int64)
            stamps, flags = [one[order] for one in stamps], flags[order]
        self.event_us, self.created_us, self.sequence = stamps
        self.deleted = (flags & DELETED) != 0
        if stacked is not None:
            self._records = heads if order is None else heads[order]
        else:
            self.rows = rows if order is None else [rows[place] for place in order.tolist()]

    @property
    def ids(self) -> np.ndarray:
        """The number of each event's entity."""
        return np.repeat(np.arange(self.count), np.diff(self.starts))

    @cached_property
    def rows(self) -> list[bytes]:
        """The packed rows, in order; cut from the records when they are first needed."""
        assert self._records is not None
        whole, size = self._records.tobytes(), self.codec.fixed_size + _LENGTH.size
        return [whole[start + _LENGTH.size : start + size] for start in range(0, len(whole), size)]

    def _row(self, place: int) -> bytes:
        """One of `rows`, without cutting the others."""
        return self.rows[place] if self._records is None else self._records[place, _LENGTH.size :].tobytes()

    @cached_property
    def grouped(self) -> Events:
        """As the window kernels take them: when each event counts from and until (see `asof`)."""
        known = np.maximum(self.event_us, self.created_us) if self._aware else self.event_us
        if not self.view.event_id:
            return Events(self.starts, self.event_us, known)
        written = self.created_us if self.view.created_timestamp else np.zeros_like(self.created_us)
        until = replaced_at((self.ids, self._codes(), written, self.sequence), timed=self._aware)
        return Events(self.starts, self.event_us, np.where(self.deleted, FOREVER, known), until)

    def _codes(self) -> np.ndarray:
        """A number per event id; -1 where it is null."""
        assert self.view.event_id is not None
        array = self._column(self.view.event_id, with_deleted=True)
        return array.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)

    def _column(self, name: str, with_deleted: bool = False) -> pa.Array:
        kind, slot = self.view.fields[name], self.codec.slots[name]
        if self._records is not None and kind.kind in _NUMPY:
            at = _LENGTH.size
            states = (self._records[:, at + HEADER.size + slot.index // 4] >> (2 * (slot.index % 4))) & 3
            return to_arrow(kind, _cut(self._records, at + slot.position, _NUMPY[kind.kind]), states)
        rows: Sequence[bytes] = self.rows
        if with_deleted:  # a delete says which event it means: read its row as if it were none
            rows = [row[: HEADER.size - 1] + b"\0" + row[HEADER.size :] for row in rows]
        columns = self.codec.decode_columns(rows, [name])
        return to_arrow(self.view.fields[name], columns.values[name], columns.states[name])

    def last(self, at_us: int) -> np.ndarray:
        """Per entity, the place of the last event that counts at `at_us`, -1 without one."""
        if not self._aware and not self.view.event_id:
            last = self.starts[1:] - 1
            if not len(self.event_us) or self.event_us[last].max() <= at_us:  # none is of the future
                return np.where(np.diff(self.starts) > 0, last, -1)
        index = np.empty(self.count, np.int64)
        events, everything = self.grouped, np.ones(len(self.event_us), np.uint8)
        base = (events.starts, events.event_us, events.known_us, events.until_us, everything)
        moments = self._moments(at_us)
        ends(*base, moments.starts, moments.at_us, _ALWAYS, LAST, index)
        return index

    def doubtful(self, at_us: int) -> np.ndarray:
        """Entities whose last event at `at_us` may be one that was dropped: their later ones were deleted or moved."""
        if not self.view.event_id or not (self.horizon > NEVER).any():
            return np.zeros(self.count, bool)
        last = self.last(at_us)
        event_us = self.event_us[last] if len(self.event_us) else np.zeros(self.count, np.int64)
        return (self.horizon > NEVER) & ((last < 0) | (event_us < self.horizon))

    def _moments(self, at_us: int) -> Moments:
        return Moments(np.arange(self.count + 1, dtype=np.int64), np.full(self.count, at_us, np.int64))

    def evaluate(self, features: Sequence[str], at_us: int) -> Evaluated:
        """Stored and computed `features` of every entity as of `at_us`."""
        view, last = self.view, self.last(at_us)
        event_us = self.event_us[last] if len(self.event_us) else np.zeros(self.count, np.int64)
        status = np.where(last < 0, NOT_FOUND, PRESENT).astype(np.uint8)
        if view.ttl_us is not None:
            status[(last >= 0) & (event_us < at_us - view.ttl_us)] = EXPIRED
        gone = status != PRESENT
        stored = [name for name in features if name in view.fields]
        columns: dict[str, pa.Array] = {}
        if stored:
            rows = [None if missing else self._row(place) for place, missing in zip(last.tolist(), gone, strict=True)]
            found = self.codec.decode_columns(rows, stored)
            columns = {name: to_arrow(view.fields[name], found.values[name], found.states[name]) for name in stored}
        wanted = [view.aggregates[name] for name in features if name in view.aggregates]
        if wanted:
            inputs = {name: self._column(name) for name in {one.column for one in wanted}}
            lengths = {one.window_us for one in wanted}
            unknown = {length: gone | (self.horizon > at_us - length) for length in lengths}
            lost = {length: mask for length, mask in unknown.items() if mask.any()}
            for name, array in aggregate(wanted, self.grouped, inputs, self._moments(at_us)).items():
                length = view.aggregates[name].window_us
                columns[name] = _without(array, lost[length]) if length in lost else array
        return Evaluated(status, event_us, {name: columns[name] for name in features})

    def compacted(self, entity: int, now_us: int) -> bytes:
        """The value of one entity without what no reader at or after `now_us` needs."""
        first, end = int(self.starts[entity]), int(self.starts[entity + 1])
        oldest = now_us - longest_window(self.view) - SLACK_US
        recent = int(np.searchsorted(self.event_us[first:end], oldest, side="right")) + first
        last = int(self.last(now_us)[entity])
        extra = KEPT_BEFORE if self.view.event_id else 0
        from_place = max(first, end - MAX_EVENTS, min(recent, last if last >= 0 else end) - extra)
        until, deleted = self.grouped.until_us[first:end], self.deleted[first:end]
        counts = (until > now_us - SLACK_US) & ~deleted
        wanted = counts | deleted  # a version that no reader sees any more goes; deletes stay for their time
        keeps = wanted & (np.arange(first, end) >= from_place)
        replaced = keeps & (until < FOREVER)
        if replaced.any():  # by a version that may lie anywhere: without it the replaced one would count again
            codes = self._codes()[first:end]
            keeps |= wanted & np.isin(codes, codes[replaced])
        dropped = np.flatnonzero(counts & ~keeps)
        horizon = int(self.horizon[entity])
        if len(dropped):
            horizon = max(horizon, int(self.event_us[first + dropped[-1]]))
        kept = b"".join(to_record(self.rows[place]) for place in (first + np.flatnonzero(keeps)).tolist())
        return new_header(horizon, STATE.size + len(kept)) + kept


def longest_window(view: FeatureView) -> int:
    """The length in microseconds of the view's longest window; 0 without aggregations."""
    return max((one.window_us for one in view.aggregates.values()), default=0)


def _without(array: pa.Array, unknown: np.ndarray) -> pa.Array:
    """`array` with null where `unknown`."""
    return pc.if_else(pa.array(unknown), pa.scalar(None, array.type), array)


def _order(starts: np.ndarray, event: np.ndarray, created: np.ndarray, sequence: np.ndarray) -> np.ndarray | None:
    """Places of the events in event order, each once; None when they lie so."""
    rises = event[1:] > event[:-1]
    firsts = starts[1:-1]
    rises[firsts[(firsts > 0) & (firsts < len(event))] - 1] = True
    if rises.all():
        return None
    ids = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    order, _ = asof_kernels.group_events(ids, len(starts) - 1, event, created, sequence)
    return _without_repeats(order, ids, event, created, sequence)


def _without_repeats(
    order: np.ndarray, ids: np.ndarray, event: np.ndarray, created: np.ndarray, sequence: np.ndarray
) -> np.ndarray:
    """`order` without events that arrived more than once: same entity, times and place in the order of ingest."""
    if len(order) < 2:
        return order
    before, after = order[:-1], order[1:]
    same = (ids[before] == ids[after]) & (event[before] == event[after])
    same &= (created[before] == created[after]) & (sequence[before] == sequence[after])
    return order[np.concatenate([[True], ~same])]
