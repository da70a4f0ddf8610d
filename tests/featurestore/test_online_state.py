"""The bounded state of windows online: what it no longer has is known, made whole, or NULL; never wrong."""

from __future__ import annotations

import datetime
import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlfuncs.errors import SpecError, Unavailable
from mlfuncs_featurestore import Aggregation, Entity, FeatureView
from mlfuncs_featurestore.online_rows import pack_table, read_stamps
from mlfuncs_featurestore.online_write import compact_key
from mlfuncs_featurestore.rows import RowCodec
from mlfuncs_featurestore.stream_windows import NEVER, EntityEvents, new_header, read_value, to_record
from mlfuncs_featurestore.verify import verify

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=UTC)
SECOND = 10**6
USER = Entity("user_id", "int64")
FIELDS = {"amount": "float64", "id": "string"}


def view(name, windows=("1m",), **options):
    aggregations = [Aggregation("amount", ["sum", "count", "last"], windows)]
    return FeatureView(name, [USER], FIELDS, online=True, buckets=2, aggregations=aggregations, **options)


@pytest.fixture
def name(shared_store):
    return f"s{uuid.uuid4().hex[:10]}"


def event(seconds, amount, identity="", user=1):
    when = NOW - datetime.timedelta(seconds=seconds)
    return {"user_id": user, "event_timestamp": when, "amount": float(amount), "id": identity or str(seconds)}


def read(store, name, *features):
    found = store.get_online_features([f"{name}:{one}" for one in features], {"user_id": [1]}, now=NOW)
    return [found.to_dict()[one][0] for one in features]


def compact(store, name):
    plan = store.online.plan(name)
    return compact_key(store.online, plan.reads[name], plan.keys({"user_id": [1]})[0], int(NOW.timestamp() * SECOND))


def is_equal(store, name):
    found = verify(store, name, now=NOW)
    assert found.cells and found.is_equal, str(found)
    return True


def test_deletes_beyond_the_kept_events_bring_back_the_one_before_them(shared_store, name):
    shared_store.apply(view(name, event_id="id"))
    shared_store.push(name, [event(1000 + n, n) for n in range(60)], now=NOW)
    assert compact(shared_store, name) and read(shared_store, name, "amount") == [0.0]
    key = shared_store.online.plan(name).keys({"user_id": [1]})[0]
    assert len(read_value(shared_store.online.client.get(key))[1]) < 60
    shared_store.push(name, [event(1000 + n, n) for n in range(40)], deleted=True, now=NOW)
    assert read(shared_store, name, "amount", "amount_count_1m") == [40.0, 0]
    assert is_equal(shared_store, name)
    shared_store.push(name, [event(1000 + n, n) for n in range(60)], deleted=True, now=NOW)
    assert read(shared_store, name, "amount") == [None] and is_equal(shared_store, name)


def test_corrections_that_move_every_kept_event_back_are_noticed(shared_store, name):
    shared_store.apply(view(name, event_id="id"))
    shared_store.push(name, [event(1000 + n, n) for n in range(60)], now=NOW)
    compact(shared_store, name)
    shared_store.push(name, [event(5000 + n, -n, str(1000 + n)) for n in range(40)], now=NOW)
    assert read(shared_store, name, "amount") == [40.0] and is_equal(shared_store, name)


def test_a_state_that_cannot_be_made_whole_is_refused_with_the_command(shared_store, name, monkeypatch):
    shared_store.apply(view(name, event_id="id"))
    shared_store.push(name, [event(1000 + n, n) for n in range(60)], now=NOW)
    compact(shared_store, name)
    shared_store.push(name, [event(1000 + n, n) for n in range(40)], deleted=True, now=NOW)
    shared_store.flush(name)
    folder = shared_store.settings.home / "warehouse"
    uri = shared_store.offline.uri(name)
    assert uri.startswith(str(folder))
    log = next((folder / "shop" / name / "_delta_log").glob("*.json"))
    kept = log.read_bytes()
    log.write_bytes(b"torn")
    with pytest.raises(Unavailable, match=f"mlfuncs features materialize {name} --backfill"):
        read(shared_store, name, "amount")
    log.write_bytes(kept)
    assert read(shared_store, name, "amount") == [40.0]


def test_a_longer_window_is_null_until_the_next_materialize_and_then_right(shared_store, name):
    shared_store.apply(view(name))
    history = [event(seconds, 1.0) for seconds in (7000, 3000, 2000, 50, 5)]
    shared_store.ingest(name, history, now=NOW)
    shared_store.push(name, event(2, 1.0), now=NOW)
    shared_store.materialize(name, now=NOW)
    assert is_equal(shared_store, name)
    shared_store.apply(view(name, ["1m", "1h"]))
    assert read(shared_store, name, "amount_sum_1m", "amount_sum_1h") == [3.0, None]
    assert shared_store.materialize(name, now=NOW).views[0].since == -1  # from nothing: the window goes further back
    assert read(shared_store, name, "amount_sum_1m", "amount_sum_1h") == [3.0, 5.0] and is_equal(shared_store, name)
    assert shared_store.materialize(name, now=NOW).rows == 0
    shared_store.apply(view(name))  # and back: nothing to do
    assert shared_store.materialize(name, now=NOW).rows == 0


def test_a_compacted_entity_gets_its_longer_window_back(shared_store, name):
    shared_store.apply(view(name))
    shared_store.push(name, [event(seconds, 1.0) for seconds in range(0, 3000, 100)], now=NOW)
    compact(shared_store, name)
    shared_store.apply(view(name, ["1m", "1h"]))
    assert read(shared_store, name, "amount_count_1h") == [None]
    shared_store.materialize(name, now=NOW)
    assert read(shared_store, name, "amount_count_1h") == [30] and is_equal(shared_store, name)


def test_one_window_is_filled_from_the_events_it_reaches(shared_store, name, capsys):
    shared_store.apply(view(name))
    for seconds in (90_000, 3000, 2000, 30):
        shared_store.ingest(name, [event(seconds, 1.0)], now=NOW)
    shared_store.materialize(name, now=NOW)
    shared_store.apply(view(name, ["1m", "1h"]))
    filled = shared_store.materialize(name, window="1h", now=NOW, progress=True).views[0]
    assert (filled.files, filled.rows) == (3, 3)
    assert f"Materializing {name}  3/3" in capsys.readouterr().err
    assert read(shared_store, name, "amount_count_1h") == [3]
    with pytest.raises(SpecError, match="not both"):
        shared_store.materialize(name, window="1h", start=NOW)
    with pytest.raises(SpecError, match="swap"):
        shared_store.materialize(name, start=NOW, end=NOW - datetime.timedelta(1))
    with pytest.raises(SpecError, match="duration"):
        shared_store.materialize(name, window="an hour")


VIEW = view("kept", ["10s", "1m"], event_id="id")
TIMED = view("timed", ["10s", "1m"], event_id="id", created_timestamp="known_at")
moments = st.integers(0, 400)


@pytest.fixture
def few_kept(monkeypatch):
    monkeypatch.setattr("mlfuncs_featurestore.stream_windows.KEPT_BEFORE", 1)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(moments, moments, st.sampled_from("abcdef"), st.booleans()), min_size=1, max_size=40),
    moments,
    st.booleans(),
)
@example([(0, 62, "a", True), (1, 0, "a", False)], 121, True)
@example([(0, 62, "a", False), (1, 0, "a", False), (1, 0, "b", False), (1, 0, "a", False)], 121, True)
@example([(0, 62, "a", True), (1, 0, "a", False), (2, 0, "b", False), (3, 0, "a", False)], 121, True)
def test_compaction_keeps_what_corrections_and_deletes_made(few_kept, history, now, timed):
    one = TIMED if timed else VIEW
    seconds = lambda values: pa.array([v * SECOND for v in values], pa.int64()).cast(pa.timestamp("us", tz="UTC"))  # noqa: E731
    columns = {
        "user_id": pa.array([1] * len(history), pa.int64()),
        "event_timestamp": seconds(at for at, _, _, _ in history),
        "known_at": seconds(known for _, known, _, _ in history),
        "amount": pa.array(np.arange(len(history), dtype=float)),
        "id": pa.array([identity for _, _, identity, _ in history]),
        "__deleted": pa.array([deleted for _, _, _, deleted in history]),
        "__ingest": pa.array(np.arange(len(history)), pa.int64()),
    }
    rows, codec = pa.table(columns), RowCodec(one.fields)
    value = new_header() + b"".join(to_record(row) for row in pack_table(codec, rows, read_stamps(one, rows)))
    compacted = EntityEvents(one, codec, [value]).compacted(0, now * SECOND)
    for later in (0, 1, 9, 10, 60, 100):
        at_us = (now + later) * SECOND
        before, after = (EntityEvents(one, codec, [kept]) for kept in (value, compacted))
        if after.doubtful(at_us)[0]:
            assert EntityEvents(one, codec, [compacted]).horizon[0] > NEVER
            continue
        names = list(one.features)
        expected, found = before.evaluate(names, at_us), after.evaluate(names, at_us)
        assert found.status.tolist() == expected.status.tolist()
        for feature in names:
            assert found.columns[feature].equals(expected.columns[feature]), feature


def test_an_event_of_the_far_future_does_not_hide_the_last_one_before_now(shared_store, name):
    shared_store.apply(view(name))
    shared_store.ingest(name, [event(600, 1), event(500, 2), event(-86_400, 3)], now=NOW + datetime.timedelta(days=2))
    shared_store.materialize(name, now=NOW)
    assert read(shared_store, name, "amount") == [2.0]
    assert is_equal(shared_store, name)
