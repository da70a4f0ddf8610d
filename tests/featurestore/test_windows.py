"""Sliding windows against a slow, obvious version, and the exactness of sums."""

from __future__ import annotations

import collections
import decimal
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs_featurestore.declarations import FUNCTIONS, Aggregation
from mlfuncs_featurestore.hashing import hash_bytes, hash_int
from mlfuncs_featurestore.hyperloglog import add_hash, empty_registers, estimate
from mlfuncs_featurestore.types import parse_type
from mlfuncs_featurestore.windows import FOREVER, Events, Moments, aggregate

WIDE = decimal.Context(prec=60)
FLOATS = st.one_of(
    st.none(), st.floats(), st.sampled_from([0.0, -0.0, 1.0, 0.1, 5e-324, 1.7e308, -1.7e308, math.nan, math.inf, 1e16])
)
PLAIN = st.none() | st.floats(-1e6, 1e6)


def slow(function, visible, k=2, bound=3):
    """The specification, word by word, over the values in the window (no nulls), in event order."""
    values = [value for value in visible if value is not None]
    if values and isinstance(values[0], decimal.Decimal):
        return slow_decimal(function, values)
    floats = [float(value) for value in values] if function in ("sum", "mean", "std") else []
    if function == "count":
        return len(values)
    if function in ("sum", "mean"):
        total = exact_sum(floats)
        if function == "sum":
            return sum(values) if values and isinstance(values[0], int) else total
        whole = sum(values) if values and isinstance(values[0], int) else None
        return None if not values else (float(whole) if whole is not None else total) / len(values)
    if function == "std":
        return slow_std(floats)
    if not values and function != "count_distinct":
        return [] if function == "top_k" else None
    if function in ("min", "max"):
        odd = [value for value in values if value != value]
        order = [(value, math.copysign(1, value)) for value in values]
        return odd[0] if odd else (min(order) if function == "min" else max(order))[0]
    if function in ("first", "last"):
        return values[0 if function == "first" else -1]
    counts = collections.Counter("nan" if value != value else (0.0 if value == 0 else value) for value in values)
    if function == "count_distinct":
        return len(counts)
    ranked = sorted(counts, key=lambda value: (-counts[value], value == "nan", value if value != "nan" else 0))
    return [math.nan if value == "nan" else value for value in ranked[:k]]


def slow_decimal(function, values):
    cents = sum(int(value.scaleb(2, WIDE)) for value in values)
    if function == "sum":
        return decimal.Decimal(cents).scaleb(-2, WIDE)
    if function == "mean":
        return float(cents) / (len(values) * 100.0)
    return {"count": len(values), "min": min(values), "max": max(values), "first": values[0], "last": values[-1]}[
        function
    ]


def exact_sum(floats):
    if any(x != x for x in floats) or (math.inf in floats and -math.inf in floats):
        return math.nan
    if math.inf in floats or -math.inf in floats:
        return math.inf if math.inf in floats else -math.inf
    return nearest(sum(map(Fraction, floats), Fraction(0)))


def nearest(fraction):
    try:
        return float(fraction)
    except OverflowError:
        return math.inf if fraction > 0 else -math.inf


def slow_std(floats):
    n = len(floats)
    if n < 2:
        return None
    if not all(map(math.isfinite, floats)):
        return math.nan
    exact = [Fraction(x) for x in floats]
    spread = nearest(n * sum(x * x for x in exact) - sum(exact) ** 2)
    return math.sqrt(spread / (float(n) * float(n - 1)))


def same(one, other):
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if one is None or other is None or isinstance(one, str):
        return one is other or one == other
    if one == 0 and other == 0:
        return True
    return type(one) is type(other) and (one == other or (one != one and other != other))


@st.composite
def histories(draw, values=FLOATS, orderly=None):
    """Entities with events and moments on a small clock, so that bounds are met often."""
    entities = []
    for _ in range(draw(st.integers(1, 3))):
        events = sorted(draw(st.lists(st.tuples(st.integers(0, 20), values), max_size=12)), key=lambda one: one[0])
        if orderly is None:
            lags = draw(st.booleans())
        else:
            lags = not orderly
        rows = []
        for at, value in events:
            known = at + (draw(st.integers(0, 6)) if lags else 0)
            until = known + draw(st.integers(0, 5)) if lags and draw(st.booleans()) else FOREVER
            rows.append((at, known, until, value))
        entities.append((rows, sorted(draw(st.lists(st.integers(0, 25), max_size=8)))))
    return entities


def grouped(entities):
    starts = np.cumsum([0] + [len(rows) for rows, _ in entities])
    flat = [row for rows, _ in entities for row in rows]
    times = np.array([row[:3] for row in flat], np.int64).reshape(-1, 3)
    events = Events(starts.astype(np.int64), *(np.ascontiguousarray(times[:, i]) for i in range(3)))
    q_starts = np.cumsum([0] + [len(moments) for _, moments in entities]).astype(np.int64)
    at = np.array([t for _, moments in entities for t in moments], np.int64)
    return events, [row[3] for row in flat], Moments(q_starts, at)


def check(entities, kind, functions, windows=("3us", "10us"), **options):
    feature_type = parse_type(kind)
    aggregation = Aggregation("x", functions, windows=windows, k=2, **options)
    features = aggregation.features({"x": feature_type})
    events, values, moments = grouped(entities)
    results = aggregate(features, events, {"x": pa.array(values, feature_type.arrow)}, moments)
    for feature in features:
        assert results[feature.name].type == feature.type.arrow
        got = iter(results[feature.name].to_pylist())
        for rows, at in entities:
            for t in at:
                inside = [v for e, known, until, v in rows if t - feature.window_us < e <= t and known <= t < until]
                expected, actual = slow(feature.function, inside), next(got)
                assert same(expected, actual), (feature.name, t, inside, expected, actual)


@settings(max_examples=80, deadline=None)
@given(histories())
def test_float_windows_equal_the_specification(entities):
    check(entities, "float64", FUNCTIONS)


@settings(max_examples=40, deadline=None)
@given(histories(PLAIN, orderly=True))
def test_windows_over_events_in_order_equal_the_specification(entities):
    check(entities, "float64", FUNCTIONS)


@settings(max_examples=40, deadline=None)
@given(histories(st.none() | st.integers(-(2**59), 2**59)))
def test_integer_windows_equal_the_specification(entities):
    check(entities, "int64", FUNCTIONS)


@settings(max_examples=30, deadline=None)
@given(histories(st.none() | st.decimals(1 - 10**26, 10**26 - 1, places=2)))
def test_decimal_windows_equal_the_specification(entities):
    """Sums and extremes are decimals with every digit; a mean is one division of the sum of cents."""
    check(entities, "decimal(28,2)", ["sum", "mean", "count", "min", "max", "first", "last"])


def test_decimals_have_deviations_of_their_floats_and_their_largest_sums_fit():
    most = decimal.Decimal("9" * 28).scaleb(-3)
    thousand = decimal.Decimal("9" * 28 + "000").scaleb(-3, WIDE)
    cents = [decimal.Decimal("0.125"), None, decimal.Decimal("0.375")]
    features = Aggregation("x", ["sum", "mean", "std"], windows=["1s"]).features({"x": parse_type("decimal(28,3)")})
    for values, total in [
        (cents, decimal.Decimal("0.500")),
        ([most] * 1000, thousand),
        ([most.copy_negate()] * 1000, thousand.copy_negate()),
    ]:
        column = pa.array(values, pa.decimal128(28, 3))
        results = aggregate(features, Events.of_one(np.zeros(len(values))), {"x": column}, Moments.of_one([0]))
        assert results["x_sum_1s"].to_pylist() == [total]
        if values is cents:
            assert results["x_mean_1s"].to_pylist() == [0.25]
            assert results["x_std_1s"].to_pylist() == [math.sqrt(0.03125)]
    with pytest.raises(SpecError, match="at most 28 digits"):
        Aggregation("x", ["sum"], windows=["1s"]).features({"x": parse_type("decimal(29,3)")})


@settings(max_examples=30, deadline=None)
@given(histories(st.none() | st.sampled_from(["", "a", "b", "ab", "é"])))
def test_text_windows_equal_the_specification(entities):
    check(entities, "string", ["count", "first", "last", "count_distinct", "top_k"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=40), st.integers(1, 5))
def test_sums_slide_without_losing_a_bit(values, width):
    """Each window's sum is the correctly rounded one, however large the values that passed through before."""
    n = len(values)
    features = Aggregation("x", ["sum", "std"], windows=[f"{width}us"]).features({"x": parse_type("float64")})
    at = np.arange(n)
    results = aggregate(features, Events.of_one(at), {"x": pa.array(values, pa.float64())}, Moments.of_one(at))
    for t in range(n):
        inside = values[max(0, t - width + 1) : t + 1]
        assert same(results[f"x_sum_{width}us"][t].as_py(), exact_sum(inside))
        assert same(results[f"x_std_{width}us"][t].as_py(), slow_std(inside))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["float64", "int64"])
def test_many_events_and_moments_of_one_entity_equal_the_specification(seed, kind):
    """More moments than are rounded at a time, several events between two of them, and windows of several lengths."""
    random = np.random.default_rng(seed)
    event = np.sort(random.integers(0, 900, 700))
    values = random.integers(-50, 50, 700) if kind == "int64" else random.normal(0, 1, 700).round(2)
    moments = np.sort(random.integers(0, 950, 600))
    windows = [1, 7, 40, 2000]
    names = ["sum", "mean", "count", "min", "max"]
    chosen = Aggregation("x", names, windows=[f"{width}us" for width in windows])
    column = {"x": pa.array(values, kind)}
    results = aggregate(chosen.features({"x": parse_type(kind)}), Events.of_one(event), column, Moments.of_one(moments))
    for width in windows:
        got = {name: results[f"x_{name}_{width}us"].to_pylist() for name in names}
        for place, t in enumerate(moments):
            inside = values[np.searchsorted(event, t - width, "right") : np.searchsorted(event, t, "right")].tolist()
            for name in names:
                assert same(slow(name, inside), got[name][place]), (name, width, t)


def test_the_order_of_events_with_one_timestamp_changes_no_sum():
    features = Aggregation("x", ["sum", "mean", "std"], windows=["1s"]).features({"x": parse_type("float64")})
    values = np.random.default_rng(0).normal(size=200) * 10.0 ** np.random.default_rng(1).integers(-9, 9, 200)
    one = aggregate(features, Events.of_one(np.zeros(200)), {"x": pa.array(values)}, Moments.of_one([0]))
    other = aggregate(features, Events.of_one(np.zeros(200)), {"x": pa.array(values[::-1].copy())}, Moments.of_one([0]))
    assert one == other
    assert one["x_sum_1s"][0].as_py() == math.fsum(values)


def test_equal_values_have_no_deviation():
    features = Aggregation("x", ["std"], windows=["1s"]).features({"x": parse_type("float64")})
    results = aggregate(features, Events.of_one(np.arange(100)), {"x": pa.array([0.1] * 100)}, Moments.of_one([99]))
    assert results["x_std_1s"].to_pylist() == [0.0]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_many_distinct_values_are_estimated_the_same_in_every_order(kind):
    values = list(range(5000)) if kind == "int64" else [f"v{i}" for i in range(5000)]
    aggregation = Aggregation("x", ["count_distinct"], windows=["1s"], exact_bound=1000)
    features = aggregation.features({"x": parse_type(kind)})
    registers = empty_registers()
    for value in values:
        add_hash(registers, hash_int(value) if kind == "int64" else hash_bytes(value.encode()))
    for order in (values, values[::-1]):
        events, column = Events.of_one(np.zeros(5000)), pa.array(order, parse_type(kind).arrow)
        results = aggregate(features, events, {"x": column}, Moments.of_one([0]))
        assert results["x_count_distinct_1s"].to_pylist() == [estimate(registers)]


def test_an_integer_sum_beyond_int64_is_refused():
    features = Aggregation("x", ["sum"], windows=["1s"]).features({"x": parse_type("int64")})
    with pytest.raises(InvalidInput, match="leaves int64"):
        aggregate(features, Events.of_one([0, 0]), {"x": pa.array([2**62, 2**62])}, Moments.of_one([0]))


def test_times_dates_booleans_and_small_types_have_extremes_and_ends():
    import datetime

    day = datetime.date(2024, 1, 1)
    for kind, values in [
        ("date", [day, None, day + datetime.timedelta(days=1)]),
        ("timestamp", [datetime.datetime(2024, 1, d, tzinfo=datetime.UTC) for d in (1, 2, 3)]),
        ("bool", [False, None, True]),
        ("int8", [-5, None, 5]),
        ("float32", [-0.5, None, 0.5]),
    ]:
        functions = ["min", "max", "first", "last", "count", "count_distinct"]
        features = Aggregation("x", functions, windows=["1s"]).features({"x": parse_type(kind)})
        column = pa.array(values, parse_type(kind).arrow)
        results = aggregate(features, Events.of_one([0, 1, 2]), {"x": column}, Moments.of_one([2]))
        low, high = values[0], values[-1]
        got = [results[feature.name][0].as_py() for feature in features]
        count = sum(value is not None for value in values)
        assert got == [low, high, low, high, count, count]
