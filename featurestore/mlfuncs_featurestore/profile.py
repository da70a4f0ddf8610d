"""Statistics of each feature in a commit: counts, nulls, extremes, moments, quantiles, distinct values, histogram.

Owns: the accumulator over batches. Counts, extremes and moments are over every value; distinct is a HyperLogLog
estimate; quantiles and the histogram come from a sample of at most 50,000 rows (all of them up to that). Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs_featurestore import hash_kernels
from mlfuncs_featurestore.hashing import hash_array
from mlfuncs_featurestore.hyperloglog import REGISTERS, estimate

SAMPLE_ROWS = 50_000
BINS = 20
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass
class _Column:
    count: int = 0
    nulls: int = 0
    nans: int = 0
    low: Any = None
    high: Any = None
    mean: float = 0.0
    m2: float = 0.0  # sum of squared deviations (Chan, Golub, LeVeque 1983 merge)
    numbers: int = 0
    registers: Any = field(default_factory=lambda: np.zeros(REGISTERS, np.uint8))
    hashed: bool = False


class Profile:
    """Statistics that grow by `add`, a table at a time, over the named columns."""

    def __init__(self, columns: list[str]) -> None:
        self._columns = {name: _Column() for name in columns}
        self._sample: pa.Table | None = None
        self._priorities = np.empty(0)
        self._random = np.random.default_rng(0)  # a fixed seed: the same rows give the same statistics

    def add(self, table: pa.Table) -> None:
        """Take in the rows of `table`."""
        if table.num_rows == 0:
            return
        for name, state in self._columns.items():
            _take_in(state, table[name].combine_chunks())
        self._grow_sample(table.select(list(self._columns)))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Per feature, JSON-ready: count, nulls, nans, min, max, mean, std, distinct, quantiles, histogram."""
        return {name: self._describe(name, state) for name, state in self._columns.items()}

    def _grow_sample(self, table: pa.Table) -> None:
        """A uniform sample of rows: each row draws a number, the smallest SAMPLE_ROWS of them stay."""
        drawn = self._random.random(table.num_rows)
        merged = table if self._sample is None else pa.concat_tables([self._sample, table])
        priorities = np.concatenate([self._priorities, drawn])
        if len(priorities) > SAMPLE_ROWS:
            keep = np.sort(np.argpartition(priorities, SAMPLE_ROWS)[:SAMPLE_ROWS])
            merged, priorities = merged.take(pa.array(keep)).combine_chunks(), priorities[keep]
        self._sample, self._priorities = merged, priorities

    def _describe(self, name: str, state: _Column) -> dict[str, Any]:
        described: dict[str, Any] = {"count": state.count, "nulls": state.nulls, "nans": state.nans}
        if state.hashed:
            described["distinct"] = estimate(state.registers.tolist())
        if state.low is not None:
            described |= {"min": _plain(state.low), "max": _plain(state.high)}
        if state.numbers:
            variance = state.m2 / (state.numbers - 1) if state.numbers > 1 else None
            described["mean"] = _plain(state.mean)
            described["std"] = None if variance is None else _plain(math.sqrt(variance))
            assert self._sample is not None
            described |= _distribution(self._sample[name].combine_chunks())
        return described


def _take_in(state: _Column, array: pa.Array) -> None:
    state.count += len(array)
    state.nulls += array.null_count
    kind = array.type
    if pa.types.is_nested(kind) or pa.types.is_decimal(kind):
        return
    present = array.drop_null()
    state.hashed = True
    hash_kernels.hll_add(state.registers, hash_array(present))
    if pa.types.is_binary(kind) or len(present) == 0:
        return
    if pa.types.is_floating(kind):
        nan = pc.is_nan(present)
        state.nans += pc.sum(nan).as_py() or 0
        present = present.filter(pc.invert(nan))
    if len(present) == 0:
        return
    extremes = pc.min_max(present)
    low, high = extremes["min"].as_py(), extremes["max"].as_py()
    state.low = low if state.low is None else min(state.low, low)
    state.high = high if state.high is None else max(state.high, high)
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        _merge_moments(state, present.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _merge_moments(state: _Column, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        return
    with np.errstate(over="ignore", invalid="ignore"):  # of values near the end of float64's range: inf or NaN, as text
        mean, n = float(values.mean()), len(values)
        m2 = float(((values - mean) ** 2).sum())
    total = state.numbers + n
    delta = mean - state.mean
    state.m2 += m2 + delta * delta * state.numbers * n / total
    state.mean += delta * n / total
    state.numbers = total


def _distribution(sample: pa.Array) -> dict[str, Any]:
    values = sample.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.quantile(values, QUANTILES)
    quantiles = {str(q): _plain(v) for q, v in zip(QUANTILES, found, strict=True)}
    low, high = float(values.min()), float(values.max())
    width = high / BINS - low / BINS
    if width > 2 * np.spacing(max(abs(low), abs(high))) and math.isfinite(high - low):
        counts, edges = np.histogram(values, bins=BINS)
    else:  # numpy cannot make that many bins over so narrow or so wide a range
        counts, edges = np.array([len(values)]), np.array([low, high])
    histogram = {"edges": [_plain(float(edge)) for edge in edges], "counts": counts.tolist()}
    return {"quantiles": quantiles, "histogram": histogram}


def _plain(value: Any) -> Any:
    """A JSON value: times as ISO text, floats that JSON lacks as text."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
