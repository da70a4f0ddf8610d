"""From an endpoint's registry row to what should run and what the router should do; pure.

Traffic never moves to a revision that has not answered: the registry's `traffic` is what serves, and a change of it
is first a `rollout`, which becomes the traffic when its revisions are ready, or is dropped when they fail.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mlfuncs.serving.deployment import check_endpoint_options
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs_runtime.routes import Access, Limits, Replica, Route
from mlfuncs_runtime.supervisor.reconcile import Failures, Key, Observed, Wish, ZygotePhase

if TYPE_CHECKING:
    from mlfuncs.registry.endpoints import EndpointRow

BROKEN_AFTER = 3  # guess: so many failures in a row are no accident, and callers need not wait for the next start
FAILURES_ALLOWED = 1  # a rollout outlives one death of a starting process (a kill, a moment without memory)
STOP_MARGIN_S = 5.0


@dataclass(frozen=True)
class Rollout:
    """A change of traffic under way."""

    id: str
    traffic: Mapping[str, int]
    replicas: Mapping[str, int] = field(default_factory=dict)  # revision -> replicas that must be ready


@dataclass(frozen=True)
class EndpointPlan:
    """One endpoint as the registry wishes it."""

    project: str
    name: str
    generation: int
    traffic: Mapping[str, int]
    tags: Mapping[str, str]
    mirror: Mapping[str, int]
    previous: Mapping[str, int]
    rollout: Rollout | None
    revisions: Mapping[str, RevisionConfig]
    digests: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)  # access, limits and stickiness
    target: str = "process"  # or "docker": where its workers run

    @classmethod
    def from_row(cls, row: EndpointRow) -> EndpointPlan:
        """The plan in a registry row; what names a revision that is gone is left out."""
        revisions = {r.revision: RevisionConfig.from_dict(r.config) for r in row.revisions}
        desired = row.desired
        rollout = desired.get("rollout")
        return cls(
            project=row.project,
            name=row.name,
            generation=row.generation,
            traffic=_known(desired.get("traffic"), revisions),
            tags={tag: rev for tag, rev in (desired.get("tags") or {}).items() if rev in revisions},
            mirror=_known(desired.get("mirror"), revisions),
            previous=_known(desired.get("previous"), revisions),
            rollout=Rollout(rollout["id"], _known(rollout["traffic"], revisions)) if rollout else None,
            revisions=revisions,
            digests={r.revision: r.digest for r in row.revisions},
            options=desired.get("options") or {},
            target=row.target,
        )

    @property
    def reachable(self) -> set[str]:
        """Revisions that requests can reach now."""
        return {*self.traffic, *self.mirror, *self.tags.values()}

    @property
    def warm(self) -> set[str]:
        """Revisions that keep a zygote: the reachable ones, those coming, and those a rollback returns to."""
        coming = self.rollout.traffic if self.rollout else {}
        return {*self.reachable, *coming, *self.previous}


def _known(shares: Mapping[str, int] | None, revisions: Mapping[str, Any]) -> dict[str, int]:
    return {revision: share for revision, share in (shares or {}).items() if revision in revisions and share > 0}


def bounds(plan: EndpointPlan, revision: str) -> tuple[int, int]:
    """The fewest and the most replicas of a revision; `scale.min` holds only for one that has traffic."""
    scale = plan.revisions[revision].spec.scale
    if revision in plan.traffic:
        return scale.min, scale.max
    if revision in plan.mirror:
        return min(1, scale.max), scale.max  # copies never wait, so nothing else would start one
    return 0, scale.max if revision in plan.reachable else 0


def initial_replicas(plan: EndpointPlan, revision: str) -> int:
    """How many replicas a revision starts with when nothing is known of its load."""
    scale = plan.revisions[revision].spec.scale
    low, high = bounds(plan, revision)
    return max(low, min(high, scale.initial if revision in plan.traffic else 0))


def wanted_by_load(plan: EndpointPlan, revision: str, scaled: Mapping[Key, int]) -> int:
    """The autoscaler's word on a revision, within its bounds."""
    low, high = bounds(plan, revision)
    return max(low, min(high, scaled.get((plan.name, revision), initial_replicas(plan, revision))))


def wishes(plan: EndpointPlan, scaled: Mapping[Key, int], waiting: Collection[Key] = ()) -> list[Wish]:
    """What each warm revision should have running; `scaled` is the autoscaler's word by (endpoint, revision).

    Requests wait for those in `waiting`. They, what is rolled out and what has a lower bound are started first.
    """
    found = []
    for revision in sorted(plan.warm):
        spec = plan.revisions[revision].spec
        count = wanted_by_load(plan, revision, scaled)
        is_coming = plan.rollout is not None and revision in plan.rollout.traffic
        if is_coming:
            count = max(count, needed_for_rollout(plan, revision, scaled))
        found.append(
            Wish(
                plan.name,
                revision,
                replicas=count,
                spares=spec.scale.buffer if revision in plan.traffic else 0,
                drain_timeout_s=spec.timeout_s + 1.0,
                stop_timeout_s=spec.timeout_s + STOP_MARGIN_S,
                patient=not (is_coming or bounds(plan, revision)[0] or (plan.name, revision) in waiting),
            )
        )
    return found


def needed_for_rollout(plan: EndpointPlan, revision: str, scaled: Mapping[Key, int]) -> int:
    """Ready replicas before traffic moves: its share of what the load asks for now, so that it finds room there.

    Not of what runs now, which a rollout itself makes more.
    """
    assert plan.rollout is not None
    scale = plan.revisions[revision].spec.scale
    serving = sum(wanted_by_load(plan, name, scaled) for name in plan.traffic)
    share = plan.rollout.traffic[revision] / sum(plan.rollout.traffic.values())
    return max(1, min(scale.max, max(scale.min, scale.initial, math.ceil(serving * share - 1e-9))))


@dataclass(frozen=True)
class Verdict:
    """How a rollout stands, and a line for people."""

    state: Literal["pending", "complete", "failed"]
    message: str = ""


def judge(plan: EndpointPlan, observed: Observed, scaled: Mapping[Key, int]) -> Verdict:
    """Whether the plan's rollout is complete, has failed (with the reason), or what it waits for."""
    if plan.rollout is None:
        return Verdict("complete")
    if not plan.rollout.traffic:
        return Verdict("failed", "the rollout names no revision that exists")
    waiting = []
    for revision in plan.rollout.traffic:
        key = (plan.name, revision)
        ready, needed = observed.ready(key), needed_for_rollout(plan, revision, scaled)
        failures = observed.failures.get(key, Failures())
        if ready < needed and failures.count > FAILURES_ALLOWED:
            return Verdict("failed", f"{revision} did not become ready: {failures.reason}")
        if ready < needed:
            waiting.append(_waits_for(key, ready, needed, observed))
    return Verdict("pending", "; ".join(waiting)) if waiting else Verdict("complete")


def _waits_for(key: Key, ready: int, needed: int, observed: Observed) -> str:
    zygote = next((z for z in observed.zygotes if z.key == key), None)
    if zygote is None or zygote.phase is ZygotePhase.STARTING:
        return f"{key[1]}: loading the function"
    return f"{key[1]}: {ready} of {needed} workers ready"


def route(plan: EndpointPlan, replicas: Iterable[Replica], failures: Mapping[Key, Failures] = {}) -> Route:
    """The router's entry; `replicas` are those of this endpoint that are ready.

    Raises SpecError for options that no router takes, so that one endpoint's row keeps no other from being served.
    """
    check_endpoint_options(plan.options)
    specs = {revision: plan.revisions[revision].spec for revision in sorted(plan.reachable)}
    options = plan.options
    limits = {"timeout_s": max((specs[revision].timeout_s for revision in plan.traffic), default=Limits.timeout_s)}
    access = dict(options.get("access") or {})
    tokens = tuple(token["sha256"] for token in access.pop("tokens", ()))
    return Route(
        endpoint=plan.name,
        project=plan.project,
        traffic=dict(plan.traffic),
        replicas=tuple(sorted((r for r in replicas if r.revision in plan.reachable), key=lambda r: r.id)),
        limits=Limits(**{**limits, **(options.get("limits") or {})}),
        access=Access(token_sha256=tokens, **{**access, "cors_origins": tuple(access.get("cors_origins") or ())}),
        tags=dict(plan.tags),
        mirror=dict(plan.mirror),
        sticky_header=options.get("sticky_header", ""),
        sticky_cookie=options.get("sticky_cookie", ""),
        concurrency={revision: spec.scale.concurrency for revision, spec in specs.items()},
        broken_until_s={
            revision: failure.last_s + failure.delay_s
            for revision in specs
            if (failure := failures.get((plan.name, revision), Failures())).count >= BROKEN_AFTER
        },
    )
