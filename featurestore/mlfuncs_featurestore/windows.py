"""Aggregations over sliding windows: one specification, one code for training sets and for serving.

Owns: what an aggregate feature is worth at a moment. Pure; `window_kernels` and `exact_kernels` do the counting.

An event has an event time, a time `known` from which it counts (the later of event and created time), a time `until`
at which a correction or delete replaced it, and its place in the event order: event time, created time, ingest number.
At moment t the window of length w holds the events with t - w < event time <= t and known <= t < until. Windows move
with t alone: they lose events when nothing new comes. Null values are left out; NaN is a value.

    count            how many values; 0 in an empty window
    sum              the exact sum, rounded once to the nearest float64 (integers: exact int64); 0 in an empty window.
                     NaN with a NaN or with both infinities in the window
    mean             the exact sum rounded to float64, divided by count; null in an empty window
    std              of a sample: sqrt(r / (n (n - 1))) with r = n sum(x**2) - (sum x)**2 exact and rounded once
                     (integers: of their float64 values); null below two values, NaN with a NaN or an infinity
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
import pyarrow.compute as pc

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore import window_kernels as kernels
from mlfuncs_featurestore.arrays import float64s, int64s, validity
from mlfuncs_featurestore.declarations import AggregateFeature
from mlfuncs_featurestore.hashing import hash_array

FOREVER = 2**63 - 1


@dataclass(frozen=True)
class Events:
    """Events grouped by entity: those of entity e are [starts[e], starts[e + 1]), in event order. Times in us.

    All int64: `starts` (entities + 1,), the others one entry per event.
    """

    starts: np.ndarray
    event_us: np.ndarray
    known_us: np.ndarray
    until_us: np.ndarray

    @classmethod
    def of_one(cls, event_us: Any, known_us: Any = None, until_us: Any = None) -> Events:
        """The events of one entity, in event order; known when they happen and never replaced unless given."""
        event = np.asarray(event_us, np.int64)
        known = event if known_us is None else np.maximum(event, np.asarray(known_us, np.int64))
        until = np.full(len(event), FOREVER) if until_us is None else np.asarray(until_us, np.int64)
        return cls(np.array([0, len(event)], np.int64), event, known, until)

    @cached_property
    def fifo(self) -> np.ndarray:
        """Per entity, whether its events become known in event order and stay."""
        return kernels.find_fifo(self.starts, self.known_us, self.until_us)


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
    groups: dict[tuple[str, int], list[AggregateFeature]] = {}
    for feature in features:
        groups.setdefault((feature.column, feature.window_us), []).append(feature)
    prepared = {column: _Column(columns[column]) for column, _ in groups}
    results: dict[str, pa.Array] = {}
    for (column, window_us), wanted in groups.items():
        window = _Window(events, prepared[column], moments, window_us)
        results.update({feature.name: _evaluate(window, feature) for feature in wanted})
    return {feature.name: results[feature.name] for feature in features}


def _evaluate(window: _Window, feature: AggregateFeature) -> pa.Array:
    function = feature.function
    if function == "count":
        return pa.array(window.sums[2])
    if function == "sum":
        if window.column.is_int and window.sums[3]:
            raise InvalidInput(f"{feature.name!r}: a sum of integers leaves int64; store {feature.column!r} as float64")
        return pa.array(window.sums[0])
    if function == "mean":
        count = window.sums[2]
        with np.errstate(divide="ignore", invalid="ignore"):
            return pa.array(window.sums[1] / count, mask=count == 0)
    if function == "std":
        return window.std()
    if function in ("min", "max", "first", "last"):
        index = window.ends(function) if function in ("first", "last") else window.extreme(function)
        return window.column.array.take(pa.array(index, mask=index < 0))
    return window.distinct(feature.exact_bound) if function == "count_distinct" else window.top(feature.k)


class _Column:
    """The values of the events in the forms that kernels take; each made when first needed."""

    def __init__(self, array: pa.Array) -> None:
        self.array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        self._prefixes: tuple[np.ndarray, Any] | None = None
        self.is_int = pa.types.is_integer(self.array.type) or pa.types.is_boolean(self.array.type)

    @cached_property
    def valid(self) -> np.ndarray:
        return validity(self.array)

    @cached_property
    def ints(self) -> np.ndarray:
        """Integers, booleans, times and dates as int64; nulls are 0."""
        return int64s(self.array)

    @cached_property
    def bits(self) -> np.ndarray:
        """The float64 values' bits as int64; nulls are 0."""
        return (self.ints.astype(np.float64) if self.is_int else float64s(self.array)).view(np.int64)

    def prefixes(self, events: Events) -> tuple[np.ndarray, Any]:
        """The bits to add up (zeros where only counting is defined) and their running sums; made once."""
        if self._prefixes is None:
            is_number = pa.types.is_floating(self.array.type)
            bits = self.bits if is_number else np.zeros(len(self.array), np.int64)
            self._prefixes = bits, kernels.float_prefixes(events.starts, events.fifo, bits, self.valid)
        return self._prefixes

    @cached_property
    def highs(self) -> np.ndarray:
        """int64 of which the greatest is the maximum's; NaN is on top."""
        return self._ranks(True)

    @cached_property
    def lows(self) -> np.ndarray:
        """int64 of which the greatest is the minimum's; NaN is on top."""
        return self._ranks(False)

    def _ranks(self, largest: bool) -> np.ndarray:
        if not pa.types.is_floating(self.array.type):
            return self.ints if largest else ~self.ints
        ordered = self.bits ^ ((self.bits >> 63) & np.int64(FOREVER))
        ordered = ordered if largest else ~ordered
        is_nan = (self.bits & np.int64(FOREVER)) > np.int64(0x7FF0000000000000)
        return np.where(is_nan, np.int64(FOREVER), ordered)

    @cached_property
    def coded(self) -> tuple[np.ndarray, pa.Array]:
        """Each value's place among the sorted different values (null: -1), and those values."""
        array = self.array
        if pa.types.is_floating(array.type):  # one zero and one NaN
            positive = pc.if_else(pc.equal(array, 0.0), pa.scalar(0.0, array.type), array)
            array = pc.if_else(pc.is_nan(positive), pa.scalar(float("nan"), array.type), positive)
        encoded = array.dictionary_encode()
        order = pc.sort_indices(encoded.dictionary).to_numpy()
        places = np.empty(len(order) + 1, np.int64)
        places[order] = np.arange(len(order))
        places[-1] = -1
        indices = encoded.indices.fill_null(len(order)).to_numpy(zero_copy_only=False)
        return places[indices], encoded.dictionary.take(pa.array(order))


class _Window:
    """One column over windows of one length; what several functions share is computed once."""

    def __init__(self, events: Events, column: _Column, moments: Moments, window_us: int) -> None:
        self.events, self.column, self.moments, self.window_us = events, column, moments, window_us
        self._base = (events.starts, events.event_us, events.known_us, events.until_us)
        self._at = (moments.starts, moments.at_us, window_us)
        self._size = len(moments.at_us)

    @cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Sums, sums as float64, counts of values, and whether an integer sum overflowed."""
        total, count = np.empty(self._size), np.empty(self._size, np.int64)
        column = self.column
        if column.is_int:
            whole = np.empty(self._size, np.int64)
            base = (*self._base, self.events.fifo)
            overflow = kernels.int_sums(*base, column.ints, column.valid, *self._at, whole, total, count)
            return whole, total, count, overflow
        bits, prefixes = column.prefixes(self.events)
        kernels.prefix_sums(*self._base[:3], prefixes, *self._at, total, count)
        if not prefixes[3].all():
            kernels.float_sums(*self._base, bits, column.valid, prefixes[3], *self._at, total, count)
        return total, total, count, False

    def std(self) -> pa.Array:
        spread, count = np.empty(self._size), np.empty(self._size, np.int64)
        base = (*self._base, self.events.fifo)
        kernels.float_spreads(*base, self.column.bits, self.column.valid, *self._at, spread, count)
        pairs = count.astype(np.float64) * (count - 1).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return pa.array(np.sqrt(spread / pairs), mask=count < 2)

    def extreme(self, function: str) -> np.ndarray:
        index = np.empty(self._size, np.int64)
        ranks = self.column.highs if function == "max" else self.column.lows
        kernels.largest(*self._base, self.events.fifo, ranks, self.column.valid, *self._at, index)
        return index

    def ends(self, function: str) -> np.ndarray:
        index = np.empty(self._size, np.int64)
        which = kernels.FIRST if function == "first" else kernels.LAST
        kernels.ends(*self._base, self.column.valid, *self._at, which, index)
        return index

    def distinct(self, bound: int) -> pa.Array:
        codes, values = self.column.coded
        count = np.empty(self._size, np.int64)
        kernels.distinct(*self._base, codes, max(1, len(values)), hash_array(values), *self._at, bound, count)
        return pa.array(count)

    def top(self, k: int) -> pa.Array:
        codes, values = self.column.coded
        picked, count = np.zeros((self._size, k), np.int64), np.empty(self._size, np.int64)
        kernels.top_codes(*self._base, codes, max(1, len(values)), *self._at, k, picked, count)
        flat = picked[np.arange(k) < count[:, None]]
        offsets = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values.take(pa.array(flat)))
