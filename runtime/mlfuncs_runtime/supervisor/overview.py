"""What runs, as the supervisor tells it: pure functions from plans and observations to JSON-ready values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlfuncs.serving.rollouts import serving_revision
from mlfuncs_runtime.supervisor.books import Books, ReplicaRecord
from mlfuncs_runtime.supervisor.plan import EndpointPlan, judge, wanted_by_load
from mlfuncs_runtime.supervisor.reconcile import Failures, Key, Phase

_ENDING = (Phase.DRAINING, Phase.STOPPING, Phase.KILLED)
_BROKEN = 2  # failures in a row from which on an endpoint is called failing
_RECENT_S = 60.0  # how long it is told


def endpoint_overview(plan: EndpointPlan, books: Books, scaled: Mapping[Key, int], now_s: float) -> dict[str, Any]:
    """One endpoint as in `mlfuncs.serving.targets.EndpointStatus.to_dict`, its load and URL left to who knows them.

    `scaled` is the autoscaler's word by (endpoint, revision).
    """
    records = [r for r in books.replicas.values() if r.seen.endpoint == plan.name]
    state, message = judge_state(plan, books, scaled, now_s)
    return {
        "name": plan.name,
        "project": plan.project,
        "revision": serving_revision(plan.traffic, next(reversed(list(plan.revisions)), "")),
        "state": state,
        "message": message,
        "traffic": dict(plan.traffic),
        "replicas": [replica_overview(record) for record in _in_order(records)],
        "revisions": list(plan.revisions),
        "load": {
            "desired": sum(wanted_by_load(plan, revision, scaled) for revision in plan.traffic),
            "ready": sum(record.seen.phase is Phase.READY for record in records),
            "draining": sum(record.seen.phase in _ENDING for record in records),
        },
    }


def replica_overview(record: ReplicaRecord) -> dict[str, Any]:
    """One worker: its id, revision, process and phase."""
    phase = Phase.STOPPING if record.seen.phase is Phase.KILLED else record.seen.phase
    return {"id": record.seen.id, "revision": record.seen.revision, "pid": record.pid, "state": str(phase)}


def judge_state(plan: EndpointPlan, books: Books, scaled: Mapping[Key, int], now_s: float) -> tuple[str, str]:
    """The endpoint's state in one word, and what to say about it."""
    observed = books.observe()
    verdict = judge(plan, observed, scaled)
    under_way = verdict.message if plan.rollout else ""
    if not plan.traffic:
        return ("starting", under_way) if plan.rollout else ("empty", "no revision has traffic")
    failures = [observed.failures.get((plan.name, revision), Failures()) for revision in plan.traffic]
    worst = max(failures, key=lambda failure: failure.count)
    ready = sum(observed.ready((plan.name, revision)) for revision in plan.traffic)
    wish = sum(wanted_by_load(plan, revision, scaled) for revision in plan.traffic)
    is_trouble = worst.count >= _BROKEN and now_s - worst.last_s < _RECENT_S
    message = f"{worst.reason} ({worst.count} times in a row)" if is_trouble else under_way
    if ready:
        return "ready", message
    if is_trouble and wish:
        return "failing", message
    return ("starting" if wish else "idle"), message


def _in_order(records: Iterable[ReplicaRecord]) -> list[ReplicaRecord]:
    return sorted(records, key=lambda record: (record.seen.since_s, record.seen.id))
