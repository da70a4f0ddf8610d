"""What `mlfuncs status` says of an endpoint's workers: those that serve, those wished for, and what the others do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mlfuncs.cli.home import _replicas
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.spec import FunctionSpec, Scale
from mlfuncs_runtime.supervisor.books import Books, Launch, ReplicaRecord
from mlfuncs_runtime.supervisor.overview import endpoint_overview
from mlfuncs_runtime.supervisor.places import Places
from mlfuncs_runtime.supervisor.plan import EndpointPlan
from mlfuncs_runtime.supervisor.reconcile import Key, Phase, ReplicaSeen


async def no_launch(key: Key) -> Launch:
    raise AssertionError(key)


@pytest.mark.parametrize(
    ("phases", "desired", "shown"),
    [
        ([Phase.READY], 1, "1/1"),
        ([Phase.READY, Phase.DRAINING], 1, "1/1 (+1 draining)"),
        ([Phase.READY, Phase.READY], 1, "1/1 (+1 draining)"),  # the next pass tells one of them
        ([Phase.READY, Phase.STARTING, Phase.STARTING], 3, "1/3 (+2 starting)"),
        ([Phase.READY, Phase.PARKED, Phase.KILLED], 1, "1/1 (+1 draining, +1 spare)"),
        ([], 0, "0/0"),
    ],
)
def test_workers_that_are_not_among_the_wished_ones_are_named(
    tmp_path: Path, phases: Sequence[Phase], desired: int, shown: str
) -> None:
    revisions = {name: RevisionConfig(FunctionSpec("churn", scale=Scale(min=0, max=9))) for name in ("rev-1", "rev-2")}
    plan = EndpointPlan("test", "churn", 1, {"rev-2": 100}, {}, {}, {}, None, revisions, dict.fromkeys(revisions, "d"))
    books = Books(Places(tmp_path, tmp_path), no_launch, lambda: None)
    for number, phase in enumerate(phases):
        seen = ReplicaSeen(f"r{number}", "churn", "rev-2", phase, 0.0)
        books.replicas[seen.id] = ReplicaRecord(seen, str(tmp_path / seen.id))
    overview = endpoint_overview(plan, books, {("churn", "rev-2"): desired}, 0.0)
    assert _replicas(overview) == shown
    ending = sum(phase in (Phase.DRAINING, Phase.STOPPING, Phase.KILLED) for phase in phases)
    assert overview["load"] == {"desired": desired, "ready": phases.count(Phase.READY), "draining": ending}


def test_workers_of_a_revision_without_traffic_are_counted_apart() -> None:
    replicas = [{"revision": "rev-2", "state": "ready"}, {"revision": "rev-1", "state": "ready"}]
    endpoint = {"traffic": {"rev-2": 100}, "replicas": replicas, "load": {"desired": 1}}
    assert _replicas(endpoint) == "1/1 (+1 no traffic)"
