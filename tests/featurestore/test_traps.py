"""Each mistake that was seen in a peer, by name, offline. (Online ones are in the tests of the online store.)"""

from __future__ import annotations

import datetime
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlfuncs.errors import InvalidInput
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Entity, FeatureStore, FeatureView

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, tzinfo=UTC)
START = datetime.datetime(2024, 1, 1, tzinfo=UTC)
BIG = 2**53 + 1


@pytest.fixture
def store(tmp_path):
    return FeatureStore(Settings(home=tmp_path, project="shop"))


def at(second):
    return START + datetime.timedelta(seconds=second)


def define(store, fields, key="int64", **options):
    view = FeatureView("v", entities=[Entity("k", key)], fields=fields, **options)
    store.apply(view)
    return view


def fetch(store, keys, seconds, name="x", **options):
    """The feature and its status for each (key, second)."""
    spine = pa.table({"k": pa.array(keys), "event_timestamp": pa.array([at(s) for s in seconds])})
    found = store.get_historical_features(spine, [f"v:{name}"], status=True, **options).to_arrow()
    return list(zip(found[name].to_pylist(), found[f"{name}__status"].to_pylist(), strict=True))


def row(key, second, value, **extra):
    return {"k": key, "event_timestamp": at(second), "x": value, **extra}


def test_unmatched_spine_rows_are_kept(store):
    define(store, {"x": "float64"})
    store.ingest("v", [row(k, 0, float(k)) for k in range(9_403)], now=NOW)
    spine = pa.table({"k": np.arange(10_000), "event_timestamp": pa.array([at(1)] * 10_000)})
    found = store.get_historical_features(spine, "v").to_arrow()
    assert found.num_rows == 10_000 and found["k"].to_pylist() == list(range(10_000))
    assert found["x"].null_count == 10_000 - 9_403


def test_duplicate_spine_rows_are_kept_in_their_order(store):
    define(store, {"x": "int64"})
    store.ingest("v", [row(1, 0, 10), row(2, 0, 20)], now=NOW)
    found = fetch(store, [2, 1, 2, 2, 1], [5, 5, 5, 5, 5])
    assert [value for value, _ in found] == [20, 10, 20, 20, 10]


def test_a_value_created_after_the_spine_time_does_not_leak(store):
    define(store, {"x": "int64"}, created_timestamp="created")
    store.ingest("v", [row(1, 0, 1, created=at(0)), row(1, 2, 2, created=at(10))], now=NOW)
    assert fetch(store, [1, 1, 1], [5, 9, 10]) == [(1, "PRESENT"), (1, "PRESENT"), (2, "PRESENT")]
    assert fetch(store, [1], [5], use_created=False) == [(2, "PRESENT")]


def test_ttl_is_inclusive_and_an_expired_value_is_no_value(store):
    define(store, {"x": "int64"}, ttl="10s")
    store.ingest("v", [row(1, 0, 1)], now=NOW)
    assert fetch(store, [1, 1], [10, 11]) == [(1, "PRESENT"), (None, "EXPIRED")]


def test_a_missing_entity_is_not_reported_as_present(store):
    define(store, {"x": "int64"})
    store.ingest("v", [row(1, 5, 1)], now=NOW)
    assert fetch(store, [1, 2, None], [4, 9, 9]) == [(None, "NOT_FOUND")] * 3


def test_an_all_zero_vector_stays_a_vector(store):
    define(store, {"x": "vector<float32,3>"})
    store.ingest("v", [row(1, 0, [0.0, 0.0, 0.0])], now=NOW)
    assert fetch(store, [1], [1]) == [([0.0, 0.0, 0.0], "PRESENT")]


def test_int64_beyond_2_to_53_keeps_every_digit_beside_nulls(store):
    define(store, {"x": "int64"})
    store.ingest("v", [row(1, 0, BIG), row(2, 0, None)], now=NOW)
    spine = pd.DataFrame({"k": [1, 2, 3], "event_timestamp": [at(1)] * 3})
    result = store.get_historical_features(spine, "v")
    assert result.to_arrow()["x"].to_pylist() == [BIG, None, None]
    frame = result.to_pandas()
    assert str(frame["x"].dtype) == "Int64" and frame["x"][0] == BIG
    assert result.to_polars()["x"].to_list() == [BIG, None, None]


def test_an_int64_key_beyond_2_to_53_is_itself_and_no_other(store):
    define(store, {"x": "int64"})
    store.ingest("v", [row(BIG, 0, 1), row(BIG - 1, 0, 2)], now=NOW)
    assert [value for value, _ in fetch(store, [BIG, BIG - 1, BIG + 1], [1, 1, 1])] == [1, 2, None]
    with pytest.raises(InvalidInput, match="lost digits"):
        store.ingest("v", pd.DataFrame([row(float(2**53), 0, 3)]), now=NOW)


def test_text_that_looks_like_a_number_nan_or_true_stays_text(store):
    define(store, {"x": "string"}, key="string")
    texts = ["007", "7", "nan", "NaN", "None", "null", "True", "", " ", "1e3"]
    store.ingest("v", pd.DataFrame([row(text, 0, text) for text in texts]), now=NOW)
    found = fetch(store, texts, [1] * len(texts))
    assert found == [(text, "PRESENT") for text in texts]
    assert (
        store.get_historical_features(pd.DataFrame({"k": texts, "event_timestamp": [at(1)] * len(texts)}), "v")
        .to_pandas()["x"]
        .to_list()
        == texts
    )


def test_a_number_is_never_made_text_nor_text_a_number(store):
    define(store, {"x": "string"}, key="string")
    for bad in (row(7, 0, "a"), row("a", 0, 7)):
        with pytest.raises(InvalidInput):
            store.ingest("v", [bad], now=NOW)
    with pytest.raises(InvalidInput):
        fetch(store, [7], [1])


@pytest.mark.parametrize(("kind", "zero"), [("int64", 0), ("string", ""), ("bytes", b"")])
def test_zero_and_empty_are_keys(store, kind, zero):
    define(store, {"x": "int64"}, key=kind)
    store.ingest("v", [row(zero, 0, 1)], now=NOW)
    assert fetch(store, [zero], [1]) == [(1, "PRESENT")]


def test_zero_and_false_are_values(store):
    define(store, {"x": "int64", "b": "bool", "s": "string"})
    store.ingest("v", [row(1, 0, 0, b=False, s="")], now=NOW)
    assert fetch(store, [1], [1]) == [(0, "PRESENT")]
    assert fetch(store, [1], [1], name="b") == [(False, "PRESENT")]
    assert fetch(store, [1], [1], name="s") == [("", "PRESENT")]


def test_nan_and_null_stay_two_things(store):
    define(store, {"x": "float64"})
    rows = pa.table(
        {
            "k": [1, 2, 3],
            "event_timestamp": pa.array([at(0)] * 3),
            "x": pa.array([math.nan, None, 1.0], from_pandas=False),
        }
    )
    store.ingest("v", rows, now=NOW)
    found = fetch(store, [1, 2, 3], [1, 1, 1])
    assert math.isnan(found[0][0]) and found[1:] == [(None, "NULL"), (1.0, "PRESENT")]
    spine = pd.DataFrame({"k": [1, 2, 3], "event_timestamp": [at(1)] * 3})
    values = store.get_historical_features(spine, "v").to_pandas()["x"].to_list()
    assert math.isnan(values[0]) and values[1] is pd.NA and values[2] == 1.0


def test_nan_in_a_numpy_column_of_pandas_stays_nan(store):
    define(store, {"x": "float64"})
    store.ingest("v", pd.DataFrame([row(1, 0, math.nan), row(2, 0, 1.0)]), now=NOW)
    value, status = fetch(store, [1], [1])[0]
    assert math.isnan(value) and status == "PRESENT"


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York", "Asia/Kolkata", "+05:30"])
@pytest.mark.filterwarnings("ignore:times in")
def test_times_of_every_unit_and_zone_mean_the_same_moment(store, unit, zone):
    define(store, {"x": "int64"})
    instants = pa.array([at(0), at(10)]).cast(pa.timestamp(unit, zone))
    store.ingest("v", pa.table({"k": [1, 1], "event_timestamp": instants, "x": [1, 2]}), now=NOW)
    spine = pa.table({"k": [1, 1], "event_timestamp": pa.array([at(9), at(10)]).cast(pa.timestamp(unit, zone))})
    assert store.get_historical_features(spine, "v").features["x"].to_pylist() == [1, 2]
    assert fetch(store, [1, 1, 1], [-1, 9, 10]) == [(None, "NOT_FOUND"), (1, "PRESENT"), (2, "PRESENT")]


def test_nanoseconds_are_cut_down_the_same_way_on_both_sides_also_before_1970(store):
    define(store, {"x": "int64"})
    nanoseconds = [-1_999, -1_000, -1, 999, 1_000]
    events = pa.array(nanoseconds, pa.int64()).cast(pa.timestamp("ns", "UTC"))
    store.ingest("v", pa.table({"k": range(5), "event_timestamp": events, "x": range(5)}), now=NOW)
    spine = pa.table({"k": range(5), "event_timestamp": events})
    assert store.get_historical_features(spine, "v").features["x"].to_pylist() == list(range(5))
    earlier = pa.array([n - 1_000 for n in nanoseconds], pa.int64()).cast(pa.timestamp("ns", "UTC"))
    spine = pa.table({"k": range(5), "event_timestamp": earlier})
    assert store.get_historical_features(spine, "v").features["x"].null_count == 5


def test_a_correction_at_the_same_timestamp_wins(store):
    define(store, {"x": "int64"})
    store.ingest("v", [row(1, 0, 1)], now=NOW)
    store.ingest("v", [row(1, 0, 2)], now=NOW)
    assert fetch(store, [1], [0]) == [(2, "PRESENT")]
    store.offline.compact(store.catalog.view("v"))
    assert fetch(store, [1], [0]) == [(2, "PRESENT")]


def test_of_equal_times_the_later_created_wins_whatever_came_last(store):
    define(store, {"x": "int64"}, created_timestamp="created")
    store.ingest("v", [row(1, 0, 2, created=at(5))], now=NOW)
    store.ingest("v", [row(1, 0, 1, created=at(3))], now=NOW)  # an older version that arrives late
    assert fetch(store, [1, 1], [4, 5]) == [(1, "PRESENT"), (2, "PRESENT")]


def test_a_late_row_is_found_from_its_event_time_on_and_listed_as_a_change(store):
    define(store, {"x": "int64"})
    first = store.ingest("v", [row(1, 100, 2)], now=NOW)
    store.ingest("v", [row(1, 50, 1)], now=NOW)
    assert fetch(store, [1, 1], [60, 100]) == [(1, "PRESENT"), (2, "PRESENT")]
    assert sum(file.rows for file in store.offline.changes("v", first.version)[1]) == 1


def test_half_a_batch_is_never_written(store):
    define(store, {"x": "int64"})
    good = pa.table({"k": [1], "event_timestamp": pa.array([at(0)]), "x": [1]})
    bad = pa.table({"k": [2], "event_timestamp": pa.array([at(0)]), "x": ["two"]})
    with pytest.raises(InvalidInput):
        store.ingest("v", iter([good, bad]), now=NOW, batch_rows=1)
    assert fetch(store, [1, 2], [1, 1]) == [(None, "NOT_FOUND")] * 2


def test_an_event_of_a_later_second_is_never_seen_however_the_rows_lie(store):
    define(store, {"x": "int64"}, buckets=1)
    random = np.random.default_rng(3)
    seconds = random.permutation(500)
    for part in np.array_split(seconds, 7):
        store.ingest("v", [row(int(s) % 5, int(s), int(s)) for s in part], now=NOW)
    moments = random.integers(0, 500, 200)
    found = fetch(store, [int(m) % 5 for m in moments], [int(m) for m in moments])
    assert [value for value, _ in found] == [int(m) for m in moments]
