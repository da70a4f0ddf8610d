"""Offline and online say the same, to the last bit, for every type, every aggregation and any moment."""

from __future__ import annotations

import datetime
import decimal
import uuid

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mlfuncs.errors import SpecError
from mlfuncs_featurestore import Aggregation, Entity, FeatureView
from mlfuncs_featurestore.declarations import FUNCTIONS
from mlfuncs_featurestore.types import parse_type
from mlfuncs_featurestore.verify import verify

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=UTC)
KEYS = {"user_id": "int64", "card": "bytes"}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
moments = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1), timezones=st.just(UTC))
VALUES = {
    "bool": st.booleans(),
    "int8": st.integers(-128, 127),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**58), 2**58),
    "float32": st.floats(width=32),
    "float64": st.floats() | st.sampled_from([0.1, 0.2, 0.3, -0.0, 1e308]),
    "string": text,
    "bytes": st.binary(max_size=6),
    "timestamp": moments,
    "date": st.dates(datetime.date(1600, 1, 1), datetime.date(2300, 1, 1)),
    "decimal(12,3)": st.decimals(-(10**8), 10**8, places=3, allow_nan=False),
    "list<int64>": st.lists(st.none() | st.integers(-(2**62), 2**62), max_size=3),
    "list<string>": st.lists(st.none() | text, max_size=3),
    "vector<float32,3>": st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3),
    "vector<int16,2>": st.lists(st.integers(-(2**15), 2**15 - 1), min_size=2, max_size=2),
    "struct<lat:float64,tags:list<string>,at:timestamp>": st.fixed_dictionaries(
        {"lat": st.none() | st.floats(), "tags": st.none() | st.lists(text, max_size=2), "at": st.none() | moments}
    ),
}
PHASES = set(Phase) - {Phase.shrink, Phase.explain}  # shrinking rows of 16 fields takes minutes
FIELDS = {f"f{number}": kind for number, kind in enumerate(VALUES)}


def permitted(kind):
    """The functions that can be defined over a field of this type."""
    found = []
    for function in FUNCTIONS:
        try:
            Aggregation("x", [function], ["1s"]).features({"x": parse_type(kind)})
        except SpecError:
            continue
        found.append(function)
    return found


ALL = {name: permitted(kind) for name, kind in FIELDS.items()}


def test_every_function_is_there_for_some_type_and_every_type_counts():
    assert {one for functions in ALL.values() for one in functions} == set(FUNCTIONS)
    assert all({"count", "first", "last"} <= set(functions) for functions in ALL.values())
    assert set(ALL["f5"]) == set(FUNCTIONS)
    assert {"sum", "mean", "std", "min", "max"} <= set(ALL[next(n for n in FIELDS if FIELDS[n].startswith("decimal"))])


@pytest.mark.parametrize("function", ["count_distinct", "top_k"])
def test_functions_that_decimals_have_not_are_refused_when_the_view_is_defined(function):
    with pytest.raises(SpecError, match=rf"{function} needs .*'price' is decimal\(10,2\)"):
        FeatureView(
            "v", [Entity("k")], {"price": "decimal(10,2)"}, aggregations=[Aggregation("price", [function], ["1h"])]
        )


rows = st.fixed_dictionaries(
    {
        # a row up to a minute ahead is online before its time (clocks differ); one of the far future waits
        "seconds": st.integers(0, 130) | st.just(-100_000),
        "user_id": st.integers(0, 1),
        "card": st.sampled_from([b"", b"\x00a"]),
        **{name: st.none() | VALUES[kind] for name, kind in FIELDS.items()},
    }
)


@settings(max_examples=12, deadline=None, phases=PHASES)
@given(
    history=st.lists(rows, min_size=1, max_size=8),
    windows=st.lists(st.sampled_from(["1s", "10s", "1m", "2m"]), min_size=1, max_size=2, unique=True),
    aggregated=st.lists(st.sampled_from(sorted(ALL)), max_size=4, unique=True),
    pushed=st.integers(0, 8),
    ttl=st.none() | st.sampled_from(["30s", "1h"]),
    later=st.lists(st.integers(0, 140_000_000), min_size=1, max_size=2),
)
def test_online_equals_offline(shared_store, history, windows, aggregated, pushed, ttl, later):
    name = f"t{uuid.uuid4().hex[:10]}"
    aggregations = [Aggregation(field, ALL[field], windows, k=2) for field in aggregated]
    entity = Entity("pair", keys=KEYS)
    shared_store.apply(FeatureView(name, [entity], FIELDS, online=True, buckets=2, ttl=ttl, aggregations=aggregations))
    events = [event_of(row) for row in history]
    if events[pushed:]:
        shared_store.ingest(name, events[pushed:], now=NOW + datetime.timedelta(hours=1))
    if events[:pushed]:
        shared_store.push(name, events[:pushed], now=NOW, future="accept")
    for microseconds in sorted(later):
        at = NOW + datetime.timedelta(microseconds=microseconds)
        shared_store.materialize(name, now=at)
        found = verify(shared_store, name, now=at)
        assert found.is_equal, str(found)
        assert found.cells


def event_of(row):
    when = NOW - datetime.timedelta(seconds=row["seconds"])
    values = {name: value for name, value in row.items() if name != "seconds"}
    for name, kind in FIELDS.items():
        if kind.startswith("decimal") and values[name] is not None:
            values[name] = decimal.Decimal(values[name]).quantize(decimal.Decimal("0.001"))
    return {**values, "event_timestamp": when}
