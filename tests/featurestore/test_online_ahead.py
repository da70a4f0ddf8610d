"""Rows a little ahead of the clock: online before their time, shown when it has come, as the join shows them."""

from __future__ import annotations

import datetime
import uuid

import pytest

from mlfuncs_featurestore import Entity, FeatureView
from mlfuncs_featurestore.verify import verify

NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)
USER = Entity("user_id", "int64")


@pytest.fixture
def name(shared_store):
    view = FeatureView(
        f"a{uuid.uuid4().hex[:10]}", [USER], {"amount": "float64", "note": "string"}, online=True, buckets=2, ttl="1m"
    )
    shared_store.apply(view)
    return view.name


def after(seconds):
    return NOW + datetime.timedelta(seconds=seconds)


def row(seconds, user=1):
    return {"user_id": user, "event_timestamp": after(seconds), "amount": float(seconds), "note": f"at {seconds}"}


def shown(store, name, seconds, user=1):
    found = store.get_online_features([f"{name}:amount", f"{name}:note"], {"user_id": [user]}, now=after(seconds))
    values = found.to_dict()
    assert values["note"] == [None if values["amount"] == [None] else f"at {int(values['amount'][0])}"]
    return values["amount"][0], found.statuses["amount"][0], found.event_us["amount"][0] / 1e6 - NOW.timestamp()


@pytest.mark.filterwarnings("ignore:view .* lies in the future")
@pytest.mark.parametrize("way", ["push", "materialize"])
def test_a_row_ahead_of_the_clock_is_shown_when_it_is_due(shared_store, name, way):
    rows = [row(-5), row(0), row(10), row(30), row(7, user=2)]
    if way == "push":
        shared_store.push(name, rows, now=NOW)
    else:
        shared_store.ingest(name, rows, now=NOW)
        shared_store.materialize(name, now=NOW)
    assert shown(shared_store, name, 0) == (0.0, "PRESENT", 0)
    assert shown(shared_store, name, 0, user=2)[:2] == (None, "NOT_FOUND")
    shared_store.push(name, row(3), now=after(4))  # between the row that counts and those that wait
    for seconds, amount in [(4, 3.0), (9.999, 3.0), (10, 10.0), (29, 10.0), (30, 30.0), (90, 30.0)]:
        assert shown(shared_store, name, seconds)[0] == amount
    assert shown(shared_store, name, 91)[:2] == (None, "EXPIRED")
    for seconds in (4, 8, 10, 31, 70, 120):
        found = verify(shared_store, name, now=after(seconds))
        assert found.cells and found.is_equal, str(found)


@pytest.mark.filterwarnings("ignore:view .* lies in the future")
def test_rows_that_wait_are_replaced_by_corrections_and_newer_rows(shared_store, name):
    shared_store.push(name, [row(0), row(10)], now=NOW)
    shared_store.push(name, row(10) | {"amount": 11.0, "note": "at 11"}, now=NOW)
    assert shown(shared_store, name, 10)[0] == 11.0
    shared_store.push(name, row(12), now=after(15))
    key = shared_store.online.plan(name).keys({"user_id": [1]})
    assert len(shared_store.online.rows.read(key)[0]) < 100  # nothing waits any more: one row
    found = shared_store.get_online_features([f"{name}:amount"], {"user_id": [1]}, now=after(13))
    assert found.to_numpy().tolist() == [[12.0]] and verify(shared_store, name, now=after(15)).is_equal
