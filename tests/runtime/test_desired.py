"""What the supervisor reads from the registry and writes back, on a real one; and how it tells what runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlfuncs.registry import open_registry, site_id
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.serving.rollouts import start_rollout
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec, Scale
from mlfuncs_runtime.supervisor.desired import DesiredState
from mlfuncs_runtime.supervisor.launching import worker_config
from mlfuncs_runtime.supervisor.overview import endpoint_overview, judge_state
from mlfuncs_runtime.supervisor.plan import Verdict
from mlfuncs_runtime.supervisor.reconcile import Failures, Observed, Phase, ReplicaSeen

SPEC = FunctionSpec(name="churn", scale=Scale(concurrency=3), timeout_s=9, secrets=("KEY",), env={"A": "b"})


def add(settings: Settings, name: str = "churn", digest: str = "d1", site: str | None = None) -> None:
    """A revision with a rollout to it under way."""
    endpoints = open_registry(settings).endpoints
    config = RevisionConfig(SPEC, init_args={"model": {"digest": "a"}}).to_dict()
    revision = endpoints.add_revision(name, digest, config, site=site_id(settings) if site is None else site)
    endpoints.update(name, lambda desired, _row: start_rollout(desired, digest, {revision.revision: 100}))


def test_nothing_may_be_stopped_before_the_registry_was_read(settings: Settings):
    state = DesiredState(settings)
    assert not state.is_known
    assert state.refresh()
    assert state.is_known
    assert not state.refresh()


def test_only_endpoints_of_this_home_count(settings: Settings):
    add(settings)
    add(settings, "elsewhere", site="another-home")
    state = DesiredState(settings)
    state.refresh()
    assert list(state.plans) == ["churn"]
    assert state.plans["churn"].rollout is not None


def test_a_complete_rollout_becomes_the_traffic(settings: Settings):
    add(settings)
    state = DesiredState(settings)
    state.refresh()
    plan = state.plans["churn"]
    assert plan.rollout is not None
    state.finish(plan, plan.rollout, Verdict("complete"))
    assert state.plans["churn"].traffic == {"rev-1": 100}
    assert state.plans["churn"].rollout is None
    assert state.outcomes["churn"]["state"] == "complete"


def test_a_failed_rollout_says_why_and_moves_nothing(settings: Settings):
    add(settings)
    state = DesiredState(settings)
    state.refresh()
    plan = state.plans["churn"]
    assert plan.rollout is not None
    state.finish(plan, plan.rollout, Verdict("failed", "no memory"))
    assert state.plans["churn"].traffic == {}
    assert state.outcomes["churn"] == {"id": "d1", "state": "failed", "message": "no memory"}


def test_a_name_belongs_to_the_project_that_had_it_first(settings: Settings):
    add(settings)
    other = dataclasses.replace(settings, project="other")
    add(other, digest="d2")
    add(other, "theirs", digest="d3")
    state = DesiredState(settings)
    state.refresh()
    assert {name: plan.project for name, plan in state.plans.items()} == {"churn": "test", "theirs": "other"}


def test_a_deleted_endpoint_is_kept_until_it_is_purged(settings: Settings):
    add(settings)
    state = DesiredState(settings)
    state.refresh()
    open_registry(settings).endpoints.delete("churn")
    state.refresh()
    assert state.plans == {}
    state.purge(state.deleted["churn"])
    assert state.deleted == {}
    assert open_registry(settings).endpoints.changes(0) == []


def test_a_worker_is_told_what_the_revision_says(settings: Settings, tmp_path: Path):
    add(settings)
    state = DesiredState(settings)
    state.refresh()
    config = worker_config(state.plans["churn"], "rev-1", str(tmp_path / "log"))
    assert (config.endpoint, config.project, config.revision, config.bundle) == ("churn", "test", "rev-1", "d1")
    assert (config.timeout_s, config.drain_s, config.concurrency) == (9, 9, 3)
    assert config.secrets == ("KEY",)
    assert config.env == {"A": "b"}
    assert config.init_args == {"model": {"digest": "a"}}


@pytest.fixture
def plan(settings: Settings) -> Any:
    add(settings)
    state = DesiredState(settings)
    state.refresh()
    moving = state.plans["churn"]
    return dataclasses.replace(moving, traffic={"rev-1": 100}, rollout=None)


def books(*replicas: ReplicaSeen, failures: Failures | None = None) -> Any:
    """As much of the books as the overview reads."""
    observed = Observed(replicas, (), {("churn", "rev-1"): failures} if failures else {})
    records = {r.id: SimpleNamespace(seen=r, pid=7) for r in replicas}
    return SimpleNamespace(observe=lambda: observed, replicas=records)


READY = ReplicaSeen("r1", "churn", "rev-1", Phase.READY, 5.0)
BROKEN = Failures(3, 100.0, "worker 9 ended with status 3")


def test_the_state_in_one_word(plan: Any):
    one = {("churn", "rev-1"): 1}
    assert judge_state(plan, books(READY), one, 101.0)[0] == "ready"
    assert judge_state(plan, books(), one, 101.0)[0] == "starting"
    assert judge_state(plan, books(), {("churn", "rev-1"): 0}, 101.0)[0] == "idle"
    assert judge_state(plan, books(failures=BROKEN), one, 101.0)[0] == "failing"
    assert judge_state(dataclasses.replace(plan, traffic={}), books(), {}, 101.0)[0] == "empty"


def test_repeated_deaths_are_told_for_a_while(plan: Any):
    one = {("churn", "rev-1"): 1}
    assert judge_state(plan, books(READY, failures=BROKEN), one, 101.0) == (
        "ready",
        "worker 9 ended with status 3 (3 times in a row)",
    )
    assert judge_state(plan, books(READY, failures=BROKEN), one, 900.0) == ("ready", "")


def test_the_overview_has_what_scripts_read(plan: Any):
    values = endpoint_overview(plan, books(READY), {("churn", "rev-1"): 1}, 101.0)
    assert values["name"] == "churn"
    assert values["revision"] == "rev-1"
    assert values["replicas"] == [{"id": "r1", "revision": "rev-1", "pid": 7, "state": "ready"}]
    assert values["load"] == {"desired": 1, "ready": 1, "draining": 0}
