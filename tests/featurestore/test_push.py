"""Push and materialize under crashes: at every step the old state or the new one, and nothing twice."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import threading
import time

import pytest

from mlfuncs.errors import InvalidInput, SpecError, StorageError, Unavailable
from mlfuncs_featurestore import Entity, Expectation, FeatureStore, FeatureView, checkpoints, push
from mlfuncs_featurestore.flusher import Flusher
from mlfuncs_featurestore.pushlog import PushLog
from mlfuncs_featurestore.redis_embedded import Server, stop_embedded
from mlfuncs_featurestore.verify import verify

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=UTC)
USER = Entity("user_id", "int64")
PUSH_STEPS = ["push:checked", "push:written", "push:logged", "push:online"]
FLUSH_STEPS = ["flush:written", "flush:intended", "flush:committed", "flush:remembered", "flush:rotated"]
MATERIALIZE_STEPS = ["materialize:file", "materialize:sent"]


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def store(online_store):
    online_store.apply(FeatureView("spend", [USER], {"amount": "float64"}, online=True, buckets=2))
    yield online_store
    checkpoints.hook = None


def row(user, amount, seconds=0):
    return {"user_id": user, "event_timestamp": NOW - datetime.timedelta(seconds=seconds), "amount": amount}


def crash_at(step, count=1):
    left = [count]

    def hook(moment):
        if moment == step:
            left[0] -= 1
            if left[0] == 0:
                raise Crash(step)

    checkpoints.hook = hook


def again(store):
    """The store as another process sees it after the crash."""
    checkpoints.hook = None
    return FeatureStore(store.settings)


def online(store, *users):
    return store.get_online_features(["spend:amount"], {"user_id": list(users)}, now=NOW).to_dict()["amount"]


def offline(store, *users):
    spine = {"user_id": list(users), "event_timestamp": [NOW] * len(users)}
    return store.get_historical_features(spine, ["spend:amount"]).to_arrow()["amount"].to_pylist()


def stored_rows(store):
    return store.offline.snapshot("spend").rows


def test_a_pushed_row_is_online_at_once_and_in_history(store):
    report = store.push("spend", row(1, 5.0), now=NOW)
    assert online(store, 1) == [5.0] and report.rows == 1
    assert stored_rows(store) == 0  # it waits in the log
    assert offline(store, 1) == [5.0] and stored_rows(store) == 1


@pytest.mark.parametrize("step", PUSH_STEPS)
def test_a_push_that_crashes_is_nowhere_or_in_both(store, step):
    store.push("spend", row(1, 1.0), now=NOW)
    crash_at(step)
    with pytest.raises(Crash):
        store.push("spend", row(1, 2.0), push_id="second", now=NOW)
    after = again(store)
    after.flush()
    assert online(after, 1) == offline(after, 1) in ([1.0], [2.0])
    after.push("spend", row(1, 2.0), push_id="second", now=NOW)  # the caller tries again
    assert online(after, 1) == offline(after, 1) == [2.0]
    assert stored_rows(after) == 2


@pytest.mark.parametrize("step", FLUSH_STEPS)
def test_a_flush_that_crashes_commits_every_push_once(store, step):
    for user in range(3):
        store.push("spend", row(user, float(user)), push_id=f"p{user}", now=NOW)
    crash_at(step)
    with pytest.raises(Crash):
        store.flush()
    after = again(store)
    assert after.push("spend", row(1, 9.0), push_id="p1", now=NOW).repeated
    after.push("spend", row(5, 5.0), now=NOW)
    assert offline(after, 0, 1, 2, 5) == [0.0, 1.0, 2.0, 5.0] == online(after, 0, 1, 2, 5)
    assert stored_rows(after) == 4 and after.flush() == {"spend": 0}


@pytest.mark.parametrize("step", MATERIALIZE_STEPS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_materialize_that_crashes_goes_on_where_it_stopped(store, step, count):
    for start in range(3):
        store.ingest("spend", [row(user, float(user), seconds=start) for user in range(20)], now=NOW)
    crash_at(step, count)
    with contextlib.suppress(Crash):
        store.materialize("spend", now=NOW)
    after = again(store)
    files = len(after.offline.snapshot("spend").files)
    report = after.materialize("spend", now=NOW)
    assert verify(after, "spend", now=NOW).is_equal
    assert report.views[0].files < files or step == "materialize:file"
    assert after.materialize("spend", now=NOW).rows == 0


def test_a_torn_record_is_cut_off(store):
    store.push("spend", row(1, 1.0), now=NOW)
    log = PushLog(store.settings, "spend")
    segment = next(log.folder.glob("*.log"))
    with open(segment, "ab") as file:
        file.write(b"\xff\x00\x00\x00torn")
    after = again(store)
    after.push("spend", row(2, 2.0), now=NOW)
    assert offline(after, 1, 2) == [1.0, 2.0]


def test_a_full_disk_leaves_nothing_half_pushed(store, monkeypatch):
    store.push("spend", row(1, 1.0), now=NOW)

    def refuse(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlfuncs_featurestore.pushlog.sync_file", refuse)
    with pytest.raises(StorageError, match="No space left"):
        store.push("spend", row(1, 2.0), now=NOW)
    monkeypatch.undo()
    assert online(store, 1) == offline(store, 1) == [1.0]


def test_a_push_while_redis_is_away_leaves_nothing(store, monkeypatch):
    store.push("spend", row(1, 1.0), now=NOW)
    stop_embedded(store.settings)
    monkeypatch.setattr("mlfuncs_featurestore.redis_embedded.choose_server", lambda _: Server("/bin/false", (7, 0, 0)))
    with pytest.raises(Unavailable, match="embedded"):
        FeatureStore(store.settings).push("spend", row(1, 2.0), now=NOW)
    monkeypatch.undo()
    after = again(store)
    assert online(after, 1) == offline(after, 1) == [1.0]  # the server came back with what it had


def test_a_push_that_loses_redis_half_way_waits_and_is_completed(store, monkeypatch):
    def away(*_):
        raise Unavailable("Redis went away")

    monkeypatch.setattr(type(store.online), "write", away)
    with pytest.raises(Unavailable, match="not acknowledged"):
        store.push("spend", row(1, 2.0), push_id="half", now=NOW)
    assert offline(store, 1) == [None]  # not in the table either while Redis is away
    monkeypatch.undo()
    assert offline(store, 1) == [2.0] == online(store, 1)


def test_processes_push_at_once(store):
    workers = [multiprocessing.get_context("spawn").Process(target=push_many, args=(store.settings, n)) for n in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert offline(store, *range(40)) == [float(user) for user in range(40)] == online(store, *range(40))


def push_many(settings, start):
    store = FeatureStore(settings)
    for user in range(start, 40, 2):
        store.push("spend", row(user, float(user)), now=NOW)


def test_a_killed_server_loses_no_acknowledged_row(store):
    store.push("spend", row(1, 1.0), now=NOW)
    os.kill(int((store.settings.home / "redis" / "redis.pid").read_text()), signal.SIGKILL)
    assert online(store, 1) == [1.0]  # the next read starts it again


def test_quarantined_rows_are_kept_and_not_served(online_store):
    rule = Expectation("amount", minimum=0, action="quarantine")
    online_store.apply(FeatureView("spend", [USER], {"amount": "float64"}, online=True, expectations=[rule]))
    report = online_store.push("spend", [row(1, 1.0), row(2, -1.0)], now=NOW)
    assert (report.rows, report.quarantined) == (1, 1) and online(online_store, 1, 2) == [1.0, None]
    online_store.flush()
    assert online_store.offline.quarantined("spend")["user_id"].to_pylist() == [2]


def test_refusals_name_what_is_wrong(store):
    with pytest.raises(InvalidInput, match=r"'amount'.*missing"):
        store.push("spend", {"user_id": 1, "event_timestamp": NOW}, now=NOW)
    with pytest.raises(SpecError, match="event_id"):
        store.push("spend", row(1, 1.0), deleted=True)
    store.apply(FeatureView("cold", [USER], {"amount": "float64"}))
    with pytest.raises(SpecError, match="online=True"):
        store.push("cold", row(1, 1.0))


def test_the_log_is_committed_at_each_of_the_moments_it_says(store, monkeypatch):
    store.push("spend", row(1, 1.0), now=NOW)
    store.push("spend", row(2, 1.0), now=NOW)
    assert stored_rows(store) == 0  # two young, small pushes wait
    monkeypatch.setattr(push, "FLUSH_AGE_S", 0.0)
    store.push("spend", row(3, 1.0), now=NOW)
    assert stored_rows(store) == 3  # one of them was old
    monkeypatch.undo()
    store.push("spend", row(4, 1.0), now=NOW)
    monkeypatch.setattr(push, "FLUSH_BYTES", 10)
    store.push("spend", row(5, 1.0), now=NOW)
    assert stored_rows(store) == 5  # the log was large
    monkeypatch.undo()
    store.push("spend", row(6, 1.0), now=NOW)
    store.ingest("spend", [row(7, 1.0)], now=NOW)
    assert stored_rows(store) == 7
    with again(store) as other:
        other.push("spend", row(8, 1.0), now=NOW)
    assert stored_rows(store) == 8  # closed


def test_a_flusher_commits_in_the_background_and_at_the_end(store, monkeypatch):
    with Flusher(store, every_s=0.01):
        store.push("spend", row(1, 1.0), now=NOW)
        deadline = time.monotonic() + 60
        while not stored_rows(store):
            assert time.monotonic() < deadline
    with Flusher(store, every_s=3600):
        store.push("spend", row(2, 1.0), now=NOW)
    assert stored_rows(store) == 2


def test_a_flusher_goes_on_after_a_fault(store, monkeypatch, caplog):
    failed = threading.Event()

    def refuse(*_, **__):
        failed.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(push, "commit_pushes", refuse)
    with Flusher(store, every_s=0.01):
        store.push("spend", row(1, 1.0), now=NOW)
        assert failed.wait(30)
        monkeypatch.undo()
    assert stored_rows(store) == 1 and "the disk is full" in caplog.text
