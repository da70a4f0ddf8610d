"""From registry rows to wishes, routes and verdicts on rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlfuncs.registry import EndpointRow, Revision
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.spec import FunctionSpec, Scale
from mlfuncs_runtime.routes import Replica
from mlfuncs_runtime.supervisor.plan import EndpointPlan, Rollout, bounds, judge, needed_for_rollout, route, wishes
from mlfuncs_runtime.supervisor.reconcile import Failures, Observed, Phase, ReplicaSeen, ZygotePhase, ZygoteSeen

SPEC = FunctionSpec(name="churn", scale=Scale(min=1, max=4, concurrency=8), timeout_s=20)


def plan(*revisions: str, **changes: object) -> EndpointPlan:
    names = revisions or ("rev-1", "rev-2")
    base = EndpointPlan(
        project="test",
        name="churn",
        generation=1,
        traffic={"rev-1": 100},
        tags={},
        mirror={},
        previous={},
        rollout=None,
        revisions={name: RevisionConfig(SPEC) for name in names},
        digests=dict.fromkeys(names, "d" * 64),
    )
    return replace(base, **changes)


def ready(revision: str, count: int) -> tuple[ReplicaSeen, ...]:
    return tuple(ReplicaSeen(f"{revision}-{n}", "churn", revision, Phase.READY, 0.0) for n in range(count))


def numbers(**scaled: int) -> dict[tuple[str, str], int]:
    return {("churn", name.replace("_", "-")): count for name, count in scaled.items()}


def wished(the_plan: EndpointPlan, **scaled: int) -> dict[str, int]:
    return {wish.revision: wish.replicas for wish in wishes(the_plan, numbers(**scaled))}


def test_the_autoscaler_is_held_within_the_bounds():
    assert wished(plan(), rev_1=0) == {"rev-1": 1}
    assert wished(plan(), rev_1=9) == {"rev-1": 4}
    assert wished(plan()) == {"rev-1": 1}


def test_only_what_nobody_waits_for_is_patient():
    def patient(the_plan: EndpointPlan, waiting: tuple[tuple[str, str], ...] = ()) -> set[str]:
        return {wish.revision for wish in wishes(the_plan, {}, waiting) if wish.patient}

    at_zero = {name: RevisionConfig(replace(SPEC, scale=replace(SPEC.scale, min=0))) for name in ("rev-1", "rev-2")}
    assert patient(plan()) == set()  # it has a minimum
    assert patient(plan(revisions=at_zero)) == {"rev-1"}
    assert patient(plan(revisions=at_zero), (("churn", "rev-1"),)) == set()
    assert patient(plan(revisions=at_zero, rollout=Rollout("r", {"rev-2": 100}))) == {"rev-1"}


def test_only_revisions_with_traffic_keep_the_minimum():
    tagged = plan(tags={"next": "rev-2"})
    assert bounds(tagged, "rev-2") == (0, 4)
    assert wished(tagged) == {"rev-1": 1, "rev-2": 0}
    assert wished(tagged, rev_2=2)["rev-2"] == 2


def test_a_mirror_has_a_replica_because_copies_never_wait():
    assert wished(plan(mirror={"rev-2": 10}))["rev-2"] == 1


def test_the_revision_a_rollback_returns_to_keeps_its_zygote_but_no_replica():
    assert wished(plan(traffic={"rev-2": 100}, previous={"rev-1": 100})) == {"rev-1": 0, "rev-2": 1}


def test_a_rollout_brings_up_as_many_as_serve_now():
    moving = plan(rollout=Rollout("r", {"rev-2": 100}))
    assert needed_for_rollout(moving, "rev-2", numbers(rev_1=3)) == 3
    canary = plan(rollout=Rollout("r", {"rev-1": 90, "rev-2": 10}))
    assert wished(canary, rev_1=3) == {"rev-1": 3, "rev-2": 1}


def test_a_rollout_to_a_revision_that_serves_already_does_not_feed_on_itself():
    back = plan(traffic={"rev-1": 50, "rev-2": 50}, rollout=Rollout("r", {"rev-2": 100}))
    assert wished(back, rev_1=1, rev_2=1)["rev-2"] == 2


def test_a_rollout_waits_until_every_revision_is_ready():
    moving = plan(rollout=Rollout("r", {"rev-1": 50, "rev-2": 50}))
    verdict = judge(moving, Observed(ready("rev-1", 1)), {})
    assert (verdict.state, verdict.message) == ("pending", "rev-2: loading the function")
    zygote = ZygoteSeen("churn", "rev-2", ZygotePhase.READY, 0.0)
    assert judge(moving, Observed(ready("rev-1", 1), (zygote,)), {}).message == "rev-2: 0 of 1 workers ready"
    assert judge(moving, Observed(ready("rev-1", 1) + ready("rev-2", 1)), {}).state == "complete"


def test_a_rollout_outlives_one_death_and_fails_at_the_second():
    moving = plan(rollout=Rollout("r", {"rev-2": 100}))
    once = Observed(failures={("churn", "rev-2"): Failures(1, 0.0, "was killed by SIGKILL")})
    twice = Observed(failures={("churn", "rev-2"): Failures(2, 0.0, "ended with status 78")})
    assert judge(moving, once, {}).state == "pending"
    assert judge(moving, twice, {}).state == "failed"
    assert "ended with status 78" in judge(moving, twice, {}).message


def test_failures_of_the_revision_that_serves_do_not_stop_a_rollout_away_from_it():
    moving = plan(rollout=Rollout("r", {"rev-2": 100}))
    observed = Observed(ready("rev-2", 1), failures={("churn", "rev-1"): Failures(9, 0.0, "crash loop")})
    assert judge(moving, observed, {}).state == "complete"


def test_the_route_of_an_endpoint_without_traffic_is_there_and_empty():
    assert route(plan(traffic={}), []).traffic == {}


def test_the_route_names_only_replicas_of_reachable_revisions():
    entry = route(plan(), [Replica("b", "rev-1", "/s/b"), Replica("a", "rev-1", "/s/a"), Replica("c", "rev-2", "/s/c")])
    assert [replica.id for replica in entry.replicas] == ["a", "b"]
    assert entry.concurrency == {"rev-1": 8}
    assert entry.limits.timeout_s == 20


def test_the_route_names_revisions_that_fail_time_and_again_until_their_next_start():
    failures = {("churn", "rev-1"): Failures(3, 10.0, "ended"), ("churn", "rev-2"): Failures(9, 10.0, "ended")}
    assert route(plan(), [], failures).broken_until_s == {"rev-1": 11.0}
    assert route(plan(), [], {("churn", "rev-1"): Failures(2, 10.0, "ended")}).broken_until_s == {}


def test_options_of_the_endpoint_reach_the_route():
    options = {
        "access": {"tokens": [{"sha256": "ab"}], "rate_per_s": 5.0, "cors_origins": ["https://a.example"]},
        "limits": {"queue_size": 7},
        "sticky_header": "X-User",
    }
    entry = route(plan(options=options), [])
    assert entry.access.token_sha256 == ("ab",)
    assert entry.access.rate_per_s == 5.0
    assert entry.access.cors_origins == ("https://a.example",)
    assert entry.limits.queue_size == 7
    assert entry.sticky_header == "X-User"


def test_a_row_becomes_a_plan_without_what_it_does_not_know():
    desired = {"traffic": {"rev-1": 100, "rev-0": 5}, "tags": {"x": "rev-9"}, "mirror": {}, "previous": {}}
    desired["rollout"] = {"id": "r", "traffic": {"rev-2": 100}}
    made = [Revision(f"rev-{n}", n, "d", RevisionConfig(SPEC).to_dict(), 0.0) for n in (1, 2)]
    row = EndpointRow("test", "churn", "process", "s", desired, {}, 3, False, 0.0, 0.0, tuple(made))
    found = EndpointPlan.from_row(row)
    assert found.traffic == {"rev-1": 100}
    assert found.tags == {}
    assert found.rollout == Rollout("r", {"rev-2": 100})
    assert found.revisions["rev-2"].spec == SPEC


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_rollout_never_asks_for_more_than_the_maximum(count):
    moving = plan(rollout=Rollout("r", {"rev-2": 100}))
    assert needed_for_rollout(moving, "rev-2", numbers(rev_1=count)) == min(4, count)
