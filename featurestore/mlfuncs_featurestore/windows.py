"""Aggregations over sliding windows: one specification, one code for training sets and for serving.

Owns: what an aggregate feature is worth at a moment. Pure; the `*_kernels` do the counting.

An event has an event time, a time `known` from which it counts (the later of event and created time), a time `until`
at which a correction or delete replaced it, and its place in the event order: event time, created time, ingest number.
At moment t the window of length w holds the events with t - w < event time <= t and known <= t < until. Windows move
with t alone: they lose events when nothing new comes. Null values are left out; NaN is a value.

    count            how many values; 0 in an empty window
    sum              the exact sum, rounded once to the nearest float64 (integers: exact int64, decimals: exact with 38
                     digits); 0 in an empty window. NaN with a NaN or with both infinities in the window
    mean             the exact sum rounded to float64, divided by count (decimals of scale s: the exact sum of their
                     last places rounded to float64, divided by count * 10**s); null in an empty window
    std              of a sample: sqrt(r / (n (n - 1))) with r = n sum(x**2) - (sum x)**2 exact and rounded once
                     (integers and decimals: of their float64 values); null below two values, NaN with a NaN or an
                     infinity
    min, max         NaN is beyond both ends; -0.0 is below 0.0; null in an empty window
    first, last      by event order; null in an empty window
    count_distinct   exact up to `exact_bound` values, above it the HyperLogLog estimate; NaNs are one value
    top_k            the k most frequent values, most frequent first, the smaller value first among equals; else []

No rule depends on the order in which values are added up, so any algorithm that follows them gives the same bits:
the batch side slides over whole histories, the online side evaluates one entity's events at one moment, both by
`aggregate`. An entity that had no event at or before t has no value at all (NOT_FOUND), not an empty window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore import distinct_kernels, spread_kernels, sum_kernels, window_kernels
from mlfuncs_featurestore.arrays import nullable
from mlfuncs_featurestore.declarations import AggregateFeature
from mlfuncs_featurestore.hashing import hash_array
from mlfuncs_featurestore.window_columns import WindowColumn

FOREVER = 2**63 - 1
_EMPTY = np.empty(0, np.int64)
_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_At = tuple[np.ndarray, np.ndarray, int]  # where each entity's moments start, the moments, the window


@dataclass(frozen=True)
class Events:
    """Events grouped by entity: those of entity e are [starts[e], starts[e + 1]), in event order. Times in us.

    All int64: `starts` (entities + 1,), the others one entry per event. Without `replaced_us` none ever is.
    """

    starts: np.ndarray
    event_us: np.ndarray
    known_us: np.ndarray
    replaced_us: np.ndarray | None = None

    @classmethod
    def of_one(cls, event_us: Any, known_us: Any = None, until_us: Any = None) -> Events:
        """The events of one entity, in event order; known when they happen and never replaced unless given."""
        event = np.asarray(event_us, np.int64)
        known = event if known_us is None else np.maximum(event, np.asarray(known_us, np.int64))
        until = None if until_us is None else np.asarray(until_us, np.int64)
        return cls(np.array([0, len(event)], np.int64), event, known, until)

    @cached_property
    def fifo(self) -> np.ndarray:
        """Per entity, whether its events become known in event order and stay (uint8)."""
        if self.replaced_us is None and self.known_us is self.event_us:
            return np.ones(len(self.starts) - 1, np.uint8)
        until = _EMPTY if self.replaced_us is None else self.replaced_us
        return window_kernels.find_fifo(self.starts, self.known_us, until)

    @cached_property
    def until_us(self) -> np.ndarray:
        """When each event was replaced; FOREVER: never."""
        return np.full(len(self.event_us), FOREVER) if self.replaced_us is None else self.replaced_us

    @property
    def arrays(self) -> _Arrays:
        """(starts, event, known, until), as kernels take them that look at `until` of every event."""
        return self.starts, self.event_us, self.known_us, self.until_us

    @property
    def sliding(self) -> tuple[np.ndarray, ...]:
        """(starts, event, known, until, fifo), as kernels take them that look at `until` only where not fifo."""
        if self.replaced_us is None and self.fifo.all():
            return self.starts, self.event_us, self.known_us, _EMPTY, self.fifo
        return *self.arrays, self.fifo


@dataclass(frozen=True)
class Moments:
    """When to evaluate: those of entity e are [starts[e], starts[e + 1]) of `at_us`, ascending. int64."""

    starts: np.ndarray
    at_us: np.ndarray

    @classmethod
    def of_one(cls, at_us: Any) -> Moments:
        """Moments of one entity, ascending."""
        at = np.asarray(at_us, np.int64)
        return cls(np.array([0, len(at)], np.int64), at)


def aggregate(
    features: Sequence[AggregateFeature], events: Events, columns: Mapping[str, pa.Array], moments: Moments
) -> dict[str, pa.Array]:
    """Each feature's values at the moments, as an Arrow array of the feature's type, by name.

    `columns` holds the values of the events, one array per column that the features name. Raises InvalidInput when a
    sum of integers leaves int64.
    """
    groups: dict[str, list[AggregateFeature]] = {}
    for feature in features:
        groups.setdefault(feature.column, []).append(feature)
    results: dict[str, pa.Array] = {}
    for name, wanted in groups.items():
        windows = _Windows(events, WindowColumn(columns[name]), moments)
        results.update(windows.sums([one for one in wanted if one.function in _SUMS]))
        for function in ("min", "max"):
            results.update(windows.extremes(function, [one for one in wanted if one.function == function]))
        for one in wanted:
            if one.name not in results:
                results[one.name] = windows.single(one)
    return {feature.name: results[feature.name] for feature in features}


_SUMS = ("sum", "mean", "count")
_FLOATS, _WHOLES, _DECIMALS = range(3)  # the outputs of `window_sums`


class _Windows:
    """One column at the moments, over windows of any lengths; windows of one kind are evaluated together."""

    def __init__(self, events: Events, column: WindowColumn, moments: Moments) -> None:
        self.events, self.column = events, column
        self.at, self.size = (moments.starts, moments.at_us), len(moments.at_us)

    def sums(self, wanted: Sequence[AggregateFeature]) -> dict[str, pa.Array]:
        """Sums, means and counts."""
        if not wanted:
            return {}
        lengths, column = sorted({one.window_us for one in wanted}), self.column
        sum_output = _DECIMALS if column.is_decimal else _WHOLES if column.is_int else _FLOATS
        outputs = {"sum": sum_output, "mean": _FLOATS, "count": _WHOLES}
        asked = {(one.function, one.window_us) for one in wanted}
        asked |= {("count", one.window_us) for one in wanted if one.function == "mean"}  # says where there is none
        rows, sizes = np.full((3, len(lengths)), -1, np.int64), [0, 0, 0]
        for function, length in sorted(asked):
            rows[_SUMS.index(function), lengths.index(length)] = sizes[outputs[function]]
            sizes[outputs[function]] += 1
        floats, wholes = np.empty((sizes[_FLOATS], self.size)), np.empty((sizes[_WHOLES], self.size), np.int64)
        decimals = np.empty((sizes[_DECIMALS], self.size, 2), np.int64)
        summands = column.summands(is_counted_only={one.function for one in wanted} == {"count"})
        out, windows = (floats, wholes, decimals), np.array(lengths, np.int64)
        wide, fits = sum_kernels.window_sums(self.events.sliding, summands, self.at, windows, rows, out)
        if wide.any():
            sum_kernels.wide_sums(self.events.sliding, summands, self.at, windows, rows, out, wide)
        results = {}
        for one in wanted:
            to_sum, to_mean, to_count = rows[:, lengths.index(one.window_us)]
            if one.function == "count":
                results[one.name] = pa.array(wholes[to_count])
            elif one.function == "mean":
                results[one.name] = nullable(floats[to_mean], wholes[to_count], one.type.arrow)
            elif not fits[lengths.index(one.window_us)]:
                raise InvalidInput(f"{one.name!r}: a sum of integers leaves int64; store {one.column!r} as float64")
            else:
                array = out[sum_output][to_sum]
                results[one.name] = pa.Array.from_buffers(one.type.arrow, self.size, [None, pa.py_buffer(array)])
        return results

    def extremes(self, function: str, wanted: Sequence[AggregateFeature]) -> dict[str, pa.Array]:
        """Minima or maxima."""
        if not wanted:
            return {}
        windows = np.array(sorted({one.window_us for one in wanted}), np.int64)
        out = np.empty((len(windows), self.size), np.int64)
        found = np.empty((len(windows), self.size), np.uint8)
        column = (self.column.ordered, self.column.valid, self.column.is_float, function == "max")
        window_kernels.window_extremes(self.events.sliding, column, self.at, windows, out, found)
        arrays = dict(zip(windows.tolist(), map(self.column.restored, out, found), strict=True))
        return {one.name: arrays[one.window_us] for one in wanted}

    def single(self, feature: AggregateFeature) -> pa.Array:
        """A feature of one window by itself."""
        at, function = (*self.at, feature.window_us), feature.function
        if function == "std":
            return self._std(at)
        if function in ("first", "last"):
            index = np.empty(self.size, np.int64)
            which = window_kernels.FIRST if function == "first" else window_kernels.LAST
            window_kernels.ends(*self.events.arrays, self.column.valid, *at, which, index)
            return self.column.array.take(pa.array(index, mask=index < 0))
        return self._distinct(at, feature.exact_bound) if function == "count_distinct" else self._top(at, feature.k)

    def _std(self, at: _At) -> pa.Array:
        spread, count = np.empty(self.size), np.empty(self.size, np.int64)
        base = (*self.events.arrays, self.events.fifo)
        spread_kernels.float_spreads(*base, self.column.bits, self.column.valid, *at, spread, count)
        pairs = count.astype(np.float64) * (count - 1).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return pa.array(np.sqrt(spread / pairs), mask=count < 2)

    def _distinct(self, at: _At, bound: int) -> pa.Array:
        codes, values = self.column.coded
        count = np.empty(self.size, np.int64)
        hashes = hash_array(values)
        distinct_kernels.distinct(*self.events.arrays, codes, max(1, len(values)), hashes, *at, bound, count)
        return pa.array(count)

    def _top(self, at: _At, k: int) -> pa.Array:
        codes, values = self.column.coded
        picked, count = np.zeros((self.size, k), np.int64), np.empty(self.size, np.int64)
        distinct_kernels.top_codes(*self.events.arrays, codes, max(1, len(values)), *at, k, picked, count)
        flat = picked[np.arange(k) < count[:, None]]
        offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values.take(pa.array(flat)))
