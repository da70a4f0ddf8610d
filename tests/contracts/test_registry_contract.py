"""What every registry does, on SQLite and on PostgreSQL alike."""

import math
import multiprocessing
import threading

import pytest

from mlfuncs.errors import Conflict, NotFound, SpecError
from mlfuncs.registry import MetricPoint, RunArtifact, RunRow, open_registry
from mlfuncs.settings import read_settings


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request, monkeypatch):
    if request.param == "postgresql":
        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", request.getfixturevalue("postgres_url"))
    registry = open_registry(read_settings())
    yield registry
    registry.database.close()


def other_project(monkeypatch):
    monkeypatch.setenv("MLFUNCS_PROJECT", "other")
    return open_registry(read_settings())


def run_row(run_id, **values):
    return RunRow(**{"id": run_id, "project": "test", "function": "train", "created_at": 1.0, **values})


class TestFunctions:
    def test_versions_are_numbered_in_the_order_first_recorded(self, registry):
        assert registry.functions.record("f", "aa", {"n": 1}).number == 1
        assert registry.functions.record("f", "bb", {"n": 2}).number == 2
        assert registry.functions.record("g", "cc", {}).number == 1
        assert registry.functions.names() == ["f", "g"]

    def test_recording_a_digest_again_keeps_its_number_and_makes_it_latest(self, registry):
        first = registry.functions.record("f", "aa", {"n": 1})
        registry.functions.record("f", "bb", {})
        again = registry.functions.record("f", "aa", {"n": 1})
        assert (again.number, again.created_at) == (first.number, first.created_at)
        assert registry.functions.get("f").digest == "aa"
        assert registry.functions.get("f", "bb").number == 2

    def test_unknown_function_names_the_close_ones(self, registry):
        registry.functions.record("churn", "aa", {})
        with pytest.raises(NotFound, match="churn") as caught:
            registry.functions.get("chrun")
        assert caught.value.near == ["churn"]

    def test_projects_do_not_see_each_other(self, registry, monkeypatch):
        registry.functions.record("f", "aa", {})
        assert other_project(monkeypatch).functions.versions("f") == []


class TestEndpoints:
    def test_a_revision_is_made_only_when_something_differs(self, registry):
        add = registry.endpoints.add_revision
        assert add("e", "aa", {"init": {"x": 1}}).revision == "rev-1"
        before = registry.endpoints.generation()
        assert add("e", "aa", {"init": {"x": 1}}).revision == "rev-1"
        assert registry.endpoints.generation() == before
        assert add("e", "aa", {"init": {"x": 2}}).revision == "rev-2"
        assert add("e", "bb", {"init": {"x": 2}}).revision == "rev-3"
        assert add("e", "aa", {"init": {"x": 1}}).revision == "rev-4"
        assert [r.revision for r in registry.endpoints.get("e").revisions] == ["rev-1", "rev-2", "rev-3", "rev-4"]

    def test_traffic_keeps_what_it_replaced(self, registry):
        registry.endpoints.add_revision("e", "aa", {})
        registry.endpoints.add_revision("e", "bb", {})
        registry.endpoints.set_traffic("e", {"rev-1": 100})
        row = registry.endpoints.set_traffic("e", {"rev-1": 90, "rev-2": 10})
        assert row.desired["traffic"] == {"rev-1": 90, "rev-2": 10}
        assert row.desired["previous"] == {"rev-1": 100}

    @pytest.mark.parametrize("share", [0, -1, 0.5, True, "9"])
    def test_traffic_refuses_a_share_that_is_no_weight(self, registry, share):
        registry.endpoints.add_revision("e", "aa", {})
        with pytest.raises(SpecError, match="rev-1"):
            registry.endpoints.set_traffic("e", {"rev-1": share})

    def test_traffic_refuses_an_unknown_revision(self, registry):
        registry.endpoints.add_revision("e", "aa", {})
        with pytest.raises(NotFound, match="rev-7"):
            registry.endpoints.set_traffic("e", {"rev-7": 1})
        assert registry.endpoints.get("e").desired["traffic"] == {}

    def test_every_change_is_seen_by_who_asks_since_a_generation(self, registry):
        registry.endpoints.add_revision("a", "aa", {}, site="s1")
        registry.endpoints.add_revision("b", "aa", {}, site="s2")
        seen = registry.endpoints.generation()
        assert registry.endpoints.changes(seen) == []
        registry.endpoints.set_traffic("a", {"rev-1": 1})
        assert [row.name for row in registry.endpoints.changes(seen, "s1")] == ["a"]
        assert registry.endpoints.changes(seen, "s2") == []
        assert [row.name for row in registry.endpoints.changes(0)] == ["b", "a"]

    def test_reconcilers_see_all_projects_and_users_their_own(self, registry, monkeypatch):
        registry.endpoints.add_revision("e", "aa", {}, site="s")
        other = other_project(monkeypatch)
        other.endpoints.add_revision("e", "bb", {}, site="s")
        assert [row.project for row in registry.endpoints.changes(0, "s")] == ["test", "other"]
        assert [row.latest.digest for row in other.endpoints.list()] == ["bb"]

    def test_observing_keeps_the_generation(self, registry):
        registry.endpoints.add_revision("e", "aa", {})
        row = registry.endpoints.get("e")
        registry.endpoints.observe(row, {"status": "ready"})
        after = registry.endpoints.get("e")
        assert (after.observed, after.generation) == ({"status": "ready"}, row.generation)

    def test_a_stale_expected_generation_is_a_conflict(self, registry):
        registry.endpoints.add_revision("e", "aa", {})
        stale = registry.endpoints.get("e").generation
        registry.endpoints.set_desired("e", {"traffic": {"rev-1": 1}}, expected=stale)
        with pytest.raises(Conflict, match="changed meanwhile"):
            registry.endpoints.set_desired("e", {"traffic": {}}, expected=stale)

    def test_deleting_leaves_a_tombstone_until_purged(self, registry):
        registry.endpoints.add_revision("e", "aa", {}, site="s")
        registry.endpoints.delete("e")
        with pytest.raises(NotFound):
            registry.endpoints.get("e")
        (tombstone,) = registry.endpoints.changes(0, "s")
        assert tombstone.deleted and tombstone.desired["traffic"] == {}
        assert registry.endpoints.purge(tombstone)
        assert registry.endpoints.changes(0) == []

    def test_a_deploy_after_delete_goes_on_counting_and_stops_the_purge(self, registry):
        registry.endpoints.add_revision("e", "aa", {})
        tombstone = registry.endpoints.delete("e")
        assert registry.endpoints.add_revision("e", "aa", {}).revision == "rev-2"
        assert not registry.endpoints.purge(tombstone)
        assert registry.endpoints.get("e").latest.revision == "rev-2"

    def test_another_site_may_not_take_a_live_endpoint(self, registry):
        registry.endpoints.add_revision("e", "aa", {}, site="s1")
        with pytest.raises(Conflict, match="s1"):
            registry.endpoints.add_revision("e", "aa", {}, site="s2")
        with pytest.raises(Conflict, match="knative"):
            registry.endpoints.add_revision("e", "aa", {}, site="s1", target="knative")
        registry.endpoints.delete("e")
        assert registry.endpoints.add_revision("e", "aa", {}, site="s2").number == 2

    def test_changes_arrive_in_commit_order_while_many_write(self, registry):
        seen, done = [], threading.Event()

        def watch():
            since = 0
            while not done.is_set() or registry.endpoints.generation() > since:
                for row in registry.endpoints.changes(since):
                    since = row.generation
                    seen.append((row.name, row.latest.number))

        watcher = threading.Thread(target=watch)
        watcher.start()
        writers = [
            threading.Thread(
                target=lambda n=n: [registry.endpoints.add_revision(f"e{n}", "aa", {"i": i}) for i in range(5)]
            )
            for n in range(3)
        ]
        for thread in writers:
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        watcher.join(timeout=60)
        assert {(f"e{n}", 5) for n in range(3)} <= set(seen)


class TestRuns:
    def test_a_run_comes_back_whole(self, registry):
        row = run_row("r1", status="running", owner={"pid": 1}, versions={"code": "aa"}, details={"log": "x"})
        params = {"lr": 0.1, "inf": math.inf, "nul": "\0"}
        registry.runs.create(row, params, [RunArtifact("input", "d", {"v": 1}, "ff")])
        found = registry.runs.get("r1")
        assert (found.owner, found.versions, found.details) == ({"pid": 1}, {"code": "aa"}, {"log": "x"})
        assert registry.runs.contents(["r1"])["r1"].params == params
        assert registry.runs.touching("ff") == [("r1", "input", "d")]

    def test_finish_keeps_metrics_and_outputs_with_the_status(self, registry):
        registry.runs.create(run_row("r1", status="running"))
        points = [MetricPoint(1, "auc", 0.5, 0, 1.0), MetricPoint(2, "auc", 0.7, 1, 2.0)]
        registry.runs.finish("r1", {"status": "succeeded"}, points, [RunArtifact("output", "model", {}, "aa")])
        contents = registry.runs.contents(["r1"])["r1"]
        assert registry.runs.get("r1").status == "succeeded"
        assert contents.metrics == {"auc": 0.7}
        assert contents.artifacts == {"output": {"model": {}}}

    def test_who_finds_a_run_dead_does_not_overwrite_what_the_run_said(self, registry):
        registry.runs.create(run_row("r1", status="running"))
        assert registry.runs.finish("r1", {"status": "succeeded"})
        assert not registry.runs.finish("r1", {"status": "failed"}, only_active=True)
        assert registry.runs.get("r1").status == "succeeded"

    def test_metrics_keep_nan_infinity_large_steps_and_order(self, registry):
        registry.runs.create(run_row("r1"))
        values = [math.nan, math.inf, -math.inf, 0.1]
        registry.runs.log("r1", [MetricPoint(i, "m", v, 2**40 + i, float(i)) for i, v in enumerate(values)])
        points = registry.runs.metric_history("r1", "m")
        assert math.isnan(points[0].value)
        assert [p.value for p in points[1:]] == values[1:]
        assert points[3].step == 2**40 + 3
        assert registry.runs.metric_history("r1", "other") == []

    def test_logging_the_same_points_twice_keeps_them_once(self, registry):
        registry.runs.create(run_row("r1"))
        points = [MetricPoint(i, "m", float(i), i, 0.0) for i in range(10)]
        registry.runs.log("r1", points)
        registry.runs.log("r1", points)
        assert len(registry.runs.metric_history("r1", "m")) == 10

    def test_a_unique_prefix_finds_a_run_and_a_shared_one_does_not(self, registry):
        registry.runs.create(run_row("abc1"))
        registry.runs.create(run_row("abd2"))
        assert registry.runs.get("abc").id == "abc1"
        with pytest.raises(NotFound, match="several"):
            registry.runs.get("ab")
        with pytest.raises(NotFound):
            registry.runs.get("%")

    def test_list_filters_and_puts_the_newest_first(self, registry):
        for number in range(5):
            registry.runs.create(run_row(f"r{number}", function="fg"[number % 2], created_at=float(number)))
        assert [row.id for row in registry.runs.list(limit=3)] == ["r4", "r3", "r2"]
        assert [row.id for row in registry.runs.list(function="g")] == ["r3", "r1"]
        assert registry.runs.list(status="failed") == []

    def test_active_runs_come_with_the_clock_of_their_heartbeats(self, registry):
        registry.runs.create(run_row("r1", status="running"))
        registry.runs.create(run_row("r2", status="succeeded"))
        registry.runs.heartbeat(["r1", "r2"])
        rows, now = registry.runs.active()
        assert [row.id for row in rows] == ["r1"]
        assert 0 <= now - rows[0].heartbeat_at < 60

    def test_projects_do_not_see_each_others_runs(self, registry, monkeypatch):
        registry.runs.create(run_row("r1"))
        other = other_project(monkeypatch)
        assert other.runs.list() == []
        assert not other.runs.update("r1", status="failed")
        with pytest.raises(NotFound):
            other.runs.get("r1")


class TestArtifacts:
    def test_an_artifact_is_found_by_digest_or_its_start(self, registry):
        ref = {"digest": "abcd", "kind": "parquet", "type_name": "T", "size_bytes": 2**40, "metadata": {"rows": 3}}
        registry.artifacts.record(ref)
        registry.artifacts.record({**ref, "kind": "other"})
        assert registry.artifacts.get("ab") == ref
        assert registry.artifacts.list(kind="parquet") == [ref]
        with pytest.raises(NotFound):
            registry.artifacts.get("ff")


class TestDefinitions:
    def test_an_equal_body_makes_no_new_version(self, registry):
        put = registry.definitions.put
        assert put("view", "v", {"a": 1, "b": 2}).version == 1
        assert put("view", "v", {"b": 2, "a": 1}).version == 1
        assert put("view", "v", {"a": 2}).version == 2
        assert put("service", "v", {}).version == 1
        assert registry.definitions.get("view", "v", 1).body == {"a": 1, "b": 2}

    def test_deleted_is_gone_but_its_versions_stay(self, registry):
        registry.definitions.put("view", "v", {"a": 1})
        registry.definitions.delete("view", "v")
        assert registry.definitions.list("view") == []
        with pytest.raises(NotFound):
            registry.definitions.get("view", "v")
        assert registry.definitions.get("view", "v", 1).body == {"a": 1}
        assert registry.definitions.put("view", "v", {"a": 1}).version == 3

    def test_put_all_keeps_all_or_none(self, registry):
        with pytest.raises(SpecError, match="view 'b'"):
            registry.definitions.put_all([("view", "a", {}), ("view", "b", {"bad": object()})])
        assert registry.definitions.list("view") == []
        registry.definitions.put_all([("view", "a", {}), ("view", "b", {})])
        assert [d.name for d in registry.definitions.list("view")] == ["a", "b"]

    def test_a_decision_on_what_was_changed_since_is_not_written(self, registry):
        definitions = registry.definitions
        seen = definitions.look(("view", "service"))
        definitions.put("other", "x", {})  # of a kind that was not looked at
        definitions.put_all([("view", "a", {"n": 1})], seen)
        with pytest.raises(Conflict, match="view 'a' changed meanwhile"):
            definitions.put_all([("view", "b", {})], seen)
        seen = definitions.look(("view", "service"))
        definitions.put_all([("view", "a", None)], seen)
        with pytest.raises(Conflict):
            definitions.put_all([("service", "s", {})], seen)
        assert definitions.list("view") == [] == definitions.list("service")


def write_everything(number, barrier, failures):
    try:
        barrier.wait(60)
        registry = open_registry(read_settings())
        for i in range(6):
            run_id = f"r{number:02d}-{i}"
            registry.runs.create(run_row(run_id, status="running"), {"i": i})
            registry.runs.log(run_id, [MetricPoint(s, "loss", float(s), s, 0.0) for s in range(20)])
            registry.runs.finish(run_id, {"status": "succeeded"})
            registry.endpoints.add_revision("shared", "aa", {"by": run_id})
            registry.definitions.put("view", "shared", {"by": run_id})
            registry.functions.record("f", run_id, {})
    except BaseException as exc:
        failures.put(f"{type(exc).__name__}: {exc}")
        raise


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_sixteen_processes_writing_at_once_lose_nothing(backend, request, monkeypatch):
    """From the very start: the sixteen also race to create the schema."""
    if backend == "postgresql":
        monkeypatch.setenv("MLFUNCS_REGISTRY_URL", request.getfixturevalue("postgres_url"))
    context = multiprocessing.get_context("fork")
    barrier, failures = context.Barrier(16), context.Queue()
    processes = [context.Process(target=write_everything, args=(n, barrier, failures)) for n in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0] * 16
    registry = open_registry(read_settings())
    ids = [row.id for row in registry.runs.list(limit=1000, status="succeeded")]
    assert len(ids) == 96
    assert all(contents.metrics == {"loss": 19.0} for contents in registry.runs.contents(ids).values())
    assert all(len(registry.runs.metric_history(run_id, "loss")) == 20 for run_id in ids[:10])
    assert [r.number for r in registry.endpoints.get("shared").revisions] == list(range(1, 97))
    assert [d.version for d in registry.definitions.versions("view", "shared")] == list(range(96, 0, -1))
    assert sorted(v.number for v in registry.functions.versions("f")) == list(range(1, 97))
    registry.database.close()
