"""Online windows equal the batch ones: at every event and in between, whatever order events arrive in."""

from __future__ import annotations

import datetime
import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs_featurestore import Aggregation, Entity, FeatureView
from mlfuncs_featurestore.online_rows import pack_table, read_stamps
from mlfuncs_featurestore.rows import RowCodec
from mlfuncs_featurestore.stream_windows import MAX_EVENTS, EntityEvents, new_header, read_value, to_record
from mlfuncs_featurestore.verify import verify
from mlfuncs_featurestore.windows import Events, Moments, aggregate

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=UTC)
SECOND = 10**6
USER = Entity("user_id", "int64")
FUNCTIONS = ["sum", "mean", "count", "min", "max", "std", "first", "last", "count_distinct", "top_k"]
VIEW = FeatureView(
    "clicks", [USER], {"amount": "float64", "page": "string"}, online=True,
    aggregations=[
        Aggregation("amount", FUNCTIONS, ["10s", "1m"]),
        Aggregation("page", ["count", "last", "top_k"], ["10s"]),
    ],
)  # fmt: skip
CODEC = RowCodec(VIEW.fields)
floats = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 1e300, -1e300, 0.1, 0.2, float("nan")]), st.floats())


def table(events):
    """Rows as they are stored, from (event second, amount, page)."""
    times = pa.array([at * SECOND for at, _, _ in events], pa.int64()).cast(pa.timestamp("us", tz="UTC"))
    return pa.table(
        {
            "user_id": pa.array([1] * len(events), pa.int64()),
            "event_timestamp": times,
            "amount": pa.array([amount for _, amount, _ in events], pa.float64(), from_pandas=False),
            "page": pa.array([page for _, _, page in events], pa.string()),
            "__ingest": pa.array(np.arange(len(events)), pa.int64()),
        }
    )


def records(rows, view=VIEW, codec=CODEC):
    return [to_record(row) for row in pack_table(codec, rows, read_stamps(view, rows))]


def batch(rows, at_us):
    """Every aggregate at one moment, by the batch kernels over the whole history."""
    order = np.lexsort((rows["__ingest"].to_numpy(), rows["event_timestamp"].cast(pa.int64()).to_numpy()))
    ordered = rows.take(pa.array(order))
    events = Events.of_one(ordered["event_timestamp"].cast(pa.int64()).to_numpy())
    columns = {name: ordered[name].combine_chunks() for name in ("amount", "page")}
    found = aggregate(list(VIEW.aggregates.values()), events, columns, Moments.of_one([at_us]))
    return {name: array[0].as_py() for name, array in found.items()}


def online(value, at_us):
    found = EntityEvents(VIEW, CODEC, [value]).evaluate(list(VIEW.aggregates), at_us)
    return {name: array[0].as_py() for name, array in found.columns.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), floats, st.sampled_from(["a", "b", None])), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_stream_equals_batch_for_any_order_of_arrival(events, random, data):
    rows = table(events)
    arrived = records(rows)
    random.shuffle(arrived)
    arrived += arrived[: data.draw(st.integers(0, len(arrived)))]  # some arrive twice
    value = new_header() + b"".join(arrived)
    first = min(at for at, _, _ in events)
    for at in {*(at for at, _, _ in events), *(at + 10 for at, _, _ in events), 95}:
        for moment in (at * SECOND, at * SECOND + 1, at * SECOND - 1):
            if moment >= first * SECOND:
                assert repr(online(value, moment)) == repr(batch(rows, moment))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), floats, st.just("a")), min_size=1, max_size=30), st.integers(0, 400))
def test_compaction_changes_no_value_from_then_on(events, now):
    rows = table(events)
    value = new_header() + b"".join(records(rows))
    compacted = EntityEvents(VIEW, CODEC, [value]).compacted(0, now * SECOND)
    assert len(compacted) <= len(value)
    for later in (0, 1, 9, 10, 60, 100):
        at_us = (now + later) * SECOND
        assert repr(online(compacted, at_us)) == repr(online(value, at_us))


def test_a_window_beyond_the_kept_events_is_null_never_wrong(monkeypatch):
    monkeypatch.setattr("mlfuncs_featurestore.stream_windows.MAX_EVENTS", 3)
    rows = table([(second, 1.0, "a") for second in range(0, 50, 5)])
    compacted = EntityEvents(VIEW, CODEC, [new_header() + b"".join(records(rows))]).compacted(0, 45 * SECOND)
    horizon, kept = read_value(compacted)
    assert len(kept) == 3 and horizon == 30 * SECOND and MAX_EVENTS == 100_000
    found = online(compacted, 45 * SECOND)
    assert found["amount_sum_1m"] is None and found["amount_sum_10s"] == 2.0


@pytest.fixture
def applied(shared_store):
    def build(**options):
        name = f"w{uuid.uuid4().hex[:10]}"
        fields = {"amount": "float64", "page": "string", "id": "string"}
        windows = [Aggregation("amount", ["sum", "count", "max", "last"], ["1m", "1h"])]
        shared_store.apply(FeatureView(name, [USER], fields, online=True, buckets=2, aggregations=windows, **options))
        return name

    return build


def row(seconds, amount, identity, **more):
    when = NOW - datetime.timedelta(seconds=seconds)
    return {"user_id": 1, "event_timestamp": when, "amount": amount, "page": "p", "id": identity, **more}


def cells(store, name, at=NOW):
    found = store.get_online_features([name], {"user_id": [1, 2]}, now=at)
    assert verify(store, name, now=at).is_equal, str(verify(store, name, now=at))
    return found.to_dict()


def test_corrections_and_deletes_count_online_as_offline(applied, shared_store):
    name = applied(event_id="id")
    for seconds, amount, identity in [(30, 1.0, "a"), (20, 2.0, "b"), (4000, 8.0, "old")]:
        shared_store.push(name, row(seconds, amount, identity), now=NOW)
    assert cells(shared_store, name)["amount_sum_1m"] == [3.0, None]
    shared_store.push(name, row(20, 5.0, "b"), now=NOW)  # corrected
    assert cells(shared_store, name)["amount_sum_1m"][0] == 6.0
    shared_store.push(name, row(2000, 5.0, "b"), now=NOW)  # moved out of the minute
    assert cells(shared_store, name)["amount_sum_1m"][0] == 1.0
    shared_store.push(name, row(30, None, "a"), deleted=True, now=NOW)
    found = cells(shared_store, name)
    assert found["amount_count_1m"][0] == 0 and found["amount_sum_1h"][0] == 5.0 and found["amount"][0] == 5.0
    shared_store.push(name, row(2000, None, "b"), deleted=True, now=NOW)
    assert cells(shared_store, name)["amount"][0] == 8.0  # the last event that is left
    shared_store.push(name, row(4000, None, "old"), deleted=True, now=NOW)
    assert cells(shared_store, name)["amount_sum_1h"] == [None, None]


def test_a_value_counts_from_its_created_time(applied, shared_store):
    name = applied(created_timestamp="known_at")
    later = NOW + datetime.timedelta(seconds=30)
    shared_store.push(name, row(10, 1.0, "a", known_at=NOW), now=NOW)
    shared_store.push(name, row(5, 2.0, "b", known_at=later), now=NOW)
    assert cells(shared_store, name)["amount_sum_1m"][0] == 1.0
    assert cells(shared_store, name, later)["amount_sum_1m"][0] == 3.0


def test_a_busy_entity_is_compacted(applied, shared_store):
    name = applied()
    view = shared_store.catalog.view(name)
    key = shared_store.online.plan(name).keys({"user_id": [1]})[0]
    for start in range(10):
        rows = [row(36_000 - 3_000 * start - n, 1.0, str(n)) for n in range(200)]
        shared_store.push(name, rows, now=NOW - datetime.timedelta(seconds=36_000 - 3_000 * start - 1))
    size = len(shared_store.online.client.get(key))
    per_event = RowCodec(view.fields).fixed_size + 8
    assert size < 1200 * per_event  # 2,000 came; an hour holds 400
    assert verify(shared_store, name, now=NOW).is_equal


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 200), floats, st.integers(1, 3), st.sampled_from("abcd"), st.booleans()), max_size=12
    )
)
def test_push_and_join_agree_on_any_history(applied, shared_store, history):
    name = applied(event_id="id", ttl="2m")
    for seconds, amount, user, identity, deleted in history:
        values = row(seconds, None if deleted else amount, identity) | {"user_id": user}
        shared_store.push(name, values, deleted=deleted, now=NOW)
    for later in (0, 1, 45, 130):
        found = verify(shared_store, name, now=NOW + datetime.timedelta(seconds=later))
        assert found.is_equal, str(found)
