"""Faults that were seen in other feature stores, on the online side."""

from __future__ import annotations

import datetime
import threading
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore import Aggregation, Entity, FeatureView

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=UTC)
MINUTE, DAY = datetime.timedelta(minutes=1), datetime.timedelta(days=1)
USER = Entity("user_id", "int64")


@pytest.fixture
def make(shared_store):
    """Apply a view under a name of its own and return the name and helpers."""

    def build(fields, entities=(USER,), **options):
        view = FeatureView(f"v{uuid.uuid4().hex[:10]}", list(entities), fields, online=True, buckets=2, **options)
        shared_store.apply(view)
        return view.name

    return build


def push(store, view, when=NOW, **values):
    return store.push(view, {"event_timestamp": when, **values}, now=NOW)


def read(store, view, features, now=NOW, **entities):
    return store.get_online_features([f"{view}:{feature}" for feature in features], entities, now=now)


def one(store, view, feature, now=NOW, **entity):
    """Value and status of one cell."""
    found = read(store, view, [feature], now, **{key: [value] for key, value in entity.items()})
    return found.to_dict()[feature][0], found.statuses[feature][0]


def test_ttl_is_checked_on_every_read(make, shared_store):
    name = make({"amount": "float64"}, ttl="1d")
    push(shared_store, name, user_id=1, amount=5.0)
    assert one(shared_store, name, "amount", NOW + DAY, user_id=1) == (5.0, "PRESENT")
    late = NOW + DAY + datetime.timedelta(microseconds=1)
    assert one(shared_store, name, "amount", late, user_id=1) == (None, "EXPIRED")
    assert np.isnan(read(shared_store, name, ["amount"], late, user_id=[1]).to_numpy()).all()


def test_a_missing_entity_is_not_found(make, shared_store):
    name = make({"amount": "float64"})
    assert one(shared_store, name, "amount", user_id=404) == (None, "NOT_FOUND")


def test_an_all_zero_vector_stays_a_vector(make, shared_store):
    name = make({"embedding": "vector<float32,3>", "amount": "float64"})
    push(shared_store, name, user_id=1, embedding=[0.0, 0.0, 0.0], amount=0.0)
    assert one(shared_store, name, "embedding", user_id=1) == ([0.0, 0.0, 0.0], "PRESENT")
    assert one(shared_store, name, "amount", user_id=1) == (0.0, "PRESENT")


def test_big_integers_survive_beside_nulls(make, shared_store):
    name = make({"n": "int64"})
    push(shared_store, name, user_id=1, n=2**53 + 1)
    push(shared_store, name, user_id=2, n=None)
    found = read(shared_store, name, ["n"], user_id=[1, 2, 3])
    assert found.to_dict()["n"] == [2**53 + 1, None, None]
    assert found.statuses["n"] == ["PRESENT", "NULL", "NOT_FOUND"]
    assert found.to_pandas()["n"].tolist()[0] == 2**53 + 1 and str(found.to_pandas()["n"].dtype) == "Int64"
    with pytest.raises(InvalidInput, match="missing values"):
        found.to_numpy()
    assert read(shared_store, name, ["n"], user_id=[1]).to_numpy()[0, 0] == 2**53 + 1


@pytest.mark.parametrize("text", ["007", "nan", "True", "", "null", "1e5"])
def test_text_is_read_back_as_the_same_text(make, shared_store, text):
    name = make({"code": "string"}, [Entity("name", "string")])
    push(shared_store, name, name=text, code=text)
    assert one(shared_store, name, "code", name=text) == (text, "PRESENT")


@pytest.mark.parametrize(
    ("kind", "key"), [("int64", 0), ("string", ""), ("bytes", b""), ("uuid", str(uuid.UUID(int=0)))]
)
def test_zero_and_empty_keys_are_keys(make, shared_store, kind, key):
    name = make({"amount": "float64"}, [Entity(f"{kind}_key", kind)])
    push(shared_store, name, **{f"{kind}_key": key, "amount": 1.0})
    assert one(shared_store, name, "amount", **{f"{kind}_key": key}) == (1.0, "PRESENT")


def test_text_keys_are_taken_as_they_are(make, shared_store):
    name = make({"amount": "float64"}, [Entity("name", "string")])
    composed, apart = "caf\u00e9", "cafe\u0301"  # look the same, and are two keys online and offline
    for amount, key in enumerate([composed, apart, "Cafe", "cafe ", "caf\0", "{x}", "\U0001f600"]):
        push(shared_store, name, name=key, amount=float(amount))
    keys = [apart, composed, "caf\0", "{x}", "\U0001f600", "cafe", "caf"]
    expected = [1.0, 0.0, 4.0, 5.0, 6.0, None, None]
    assert read(shared_store, name, ["amount"], name=keys).to_dict()["amount"] == expected
    spine = {"name": keys, "event_timestamp": [NOW] * len(keys)}
    joined = shared_store.get_historical_features(spine, [f"{name}:amount"]).to_arrow()
    assert joined["amount"].to_pylist() == expected


def test_nan_and_null_are_different(make, shared_store):
    name = make({"amount": "float64"})
    push(shared_store, name, user_id=1, amount=float("nan"))
    push(shared_store, name, user_id=2, amount=None)
    found = read(shared_store, name, ["amount"], user_id=[1, 2])
    values = found.to_arrow()["amount"]
    assert values.null_count == 1 and np.isnan(values[0].as_py()) and found.statuses["amount"] == ["PRESENT", "NULL"]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", None])
@pytest.mark.parametrize("unit", ["ns", "us", "s"])
def test_times_of_any_unit_and_zone_are_the_same_moment(make, shared_store, zone, unit):
    name = make({"amount": "float64", "seen": "timestamp"})
    local = pd.Series([NOW]).dt.tz_convert(zone or "UTC")
    local = local.dt.tz_localize(None) if zone is None else local
    local = local.dt.as_unit(unit)
    shared_store.push(
        name, pd.DataFrame({"user_id": [1], "event_timestamp": local, "seen": local, "amount": [1.0]}), now=NOW
    )
    found = read(shared_store, name, ["seen"], user_id=[1])
    assert found.to_dict()["seen"] == [NOW] and found.event_us["seen"][0] == int(NOW.timestamp()) * 10**6


def test_an_old_writer_never_wins_over_a_new_one(make, shared_store):
    name = make({"amount": "float64"})
    view = shared_store.catalog.view(name)
    start = threading.Barrier(2)

    def write(offset, value):
        when = pa.array([NOW + offset * MINUTE] * 40, pa.timestamp("us", tz="UTC"))
        rows = {"user_id": list(range(40)), "event_timestamp": when, "amount": [value] * 40, "__ingest": [1] * 40}
        start.wait()
        for _ in range(20):
            shared_store.online.write(view, pa.table(rows), int(NOW.timestamp() * 1e6))

    writers = [threading.Thread(target=write, args=(-5, 1.0)), threading.Thread(target=write, args=(-1, 2.0))]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert read(shared_store, name, ["amount"], user_id=list(range(40))).to_dict()["amount"] == [2.0] * 40


def test_a_correction_at_the_same_timestamp_is_accepted(make, shared_store):
    name = make({"amount": "float64"})
    push(shared_store, name, user_id=1, amount=1.0)
    push(shared_store, name, user_id=1, amount=2.0)
    assert one(shared_store, name, "amount", user_id=1) == (2.0, "PRESENT")
    assert offline(shared_store, name, "amount") == 2.0


def offline(store, name, feature, at=NOW, user=1):
    spine = {"user_id": [user], "event_timestamp": [at]}
    return store.get_historical_features(spine, [f"{name}:{feature}"]).to_arrow()[feature][0].as_py()


def test_a_late_row_is_materialized_by_the_next_run(make, shared_store):
    name = make({"amount": "float64"})
    rows = {"user_id": [1], "event_timestamp": [NOW - MINUTE], "amount": [1.0]}
    shared_store.ingest(name, rows, now=NOW)
    shared_store.materialize(name, now=NOW)
    shared_store.ingest(name, {**rows, "user_id": [2], "event_timestamp": [NOW - 30 * DAY], "amount": [7.0]}, now=NOW)
    report = shared_store.materialize(name, now=NOW)
    assert report.rows == 1 and one(shared_store, name, "amount", user_id=2) == (7.0, "PRESENT")


def test_duplicates_and_order_of_entities_are_kept(make, shared_store):
    name = make({"amount": "float64"})
    for user in (1, 2):
        push(shared_store, name, user_id=user, amount=float(user))
    found = read(shared_store, name, ["amount"], user_id=[2, 1, 2, 9, 2])
    assert found.to_dict() == {"user_id": [2, 1, 2, 9, 2], "amount": [2.0, 1.0, 2.0, None, 2.0]}


def test_half_a_batch_is_never_written(make, shared_store):
    name = make({"amount": "float64"})
    rows = {"user_id": [1, None], "event_timestamp": [NOW, NOW], "amount": [1.0, 2.0]}
    with pytest.raises(InvalidInput, match="null"):
        shared_store.push(name, rows, now=NOW)
    assert one(shared_store, name, "amount", user_id=1) == (None, "NOT_FOUND")
    assert shared_store.flush(name) == {name: 0}


def test_windows_expire_without_a_new_event(make, shared_store):
    name = make({"amount": "float64"}, aggregations=[Aggregation("amount", ["sum", "count"], ["1h"])])
    push(shared_store, name, NOW - 30 * MINUTE, user_id=1, amount=3.0)
    push(shared_store, name, NOW, user_id=1, amount=4.0)
    sums = [
        one(shared_store, name, "amount_sum_1h", NOW + minutes * MINUTE, user_id=1)[0] for minutes in (0, 29, 30, 60)
    ]
    assert sums == [7.0, 7.0, 4.0, 0.0]


def test_a_row_of_the_future_does_not_hide_the_present_one(make, shared_store):
    name = make({"amount": "float64"})
    push(shared_store, name, user_id=1, amount=1.0)
    push(shared_store, name, NOW + DAY, user_id=1, amount=9.0)
    assert one(shared_store, name, "amount", user_id=1) == (1.0, "PRESENT")
    assert shared_store.materialize(name, now=NOW).views[0].future_rows == 1
    shared_store.materialize(name, now=NOW + 2 * DAY)
    assert one(shared_store, name, "amount", NOW + 2 * DAY, user_id=1) == (9.0, "PRESENT")
