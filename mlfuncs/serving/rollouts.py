"""How an endpoint's traffic changes, as pure functions on its `desired` document.

A change is a `rollout` first. Whoever reconciles the endpoint completes it when every revision it names is ready, or
drops it; `outcome` tells how the last one ended. What serves is always `traffic`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlfuncs.errors import Conflict, NotFound, SpecError

Desired = dict[str, Any]

REPLACED = (
    "another deploy or change of its traffic came in between and was carried out instead; 'mlfuncs status' shows what "
    "serves, and the same command again makes this one the last"
)


@dataclass(frozen=True)
class Outcome:
    """How a rollout ended: `state` is "pending", "complete", "failed" or "replaced" (by a later one)."""

    state: str
    message: str = ""


def check_traffic(traffic: Mapping[str, int], revisions: Iterable[str], endpoint: str) -> dict[str, int]:
    """`traffic` without zero shares. Raises NotFound for a revision, SpecError for a share that cannot be right.

    >>> check_traffic({"rev-1": 90, "rev-2": 10, "rev-3": 0}, ["rev-1", "rev-2", "rev-3"], "churn")
    {'rev-1': 90, 'rev-2': 10}
    """
    known = list(revisions)
    for revision, share in traffic.items():
        if revision not in known:
            raise NotFound(f"revision of endpoint {endpoint!r}", revision, known)
        if not isinstance(share, int) or isinstance(share, bool) or share < 0:
            raise SpecError(f"the share of {revision!r} must be a whole number of 0 or more, not {share!r}")
    wanted = {revision: share for revision, share in traffic.items() if share}
    if not wanted:
        raise SpecError("traffic needs at least one revision with a share above 0; 'delete' takes an endpoint away")
    return wanted


def start_rollout(desired: Desired, rollout_id: str, traffic: Mapping[str, int]) -> Desired:
    """The document with a rollout to `traffic` under way; one that was under way is replaced."""
    return {**desired, "rollout": {"id": rollout_id, "traffic": dict(traffic)}}


def complete_rollout(desired: Desired, rollout_id: str) -> Desired:
    """The document with that rollout's traffic in force; unchanged when it is not the one under way."""
    rollout = desired.get("rollout")
    if not rollout or rollout["id"] != rollout_id:
        return desired
    traffic = dict(rollout["traffic"])
    previous = _previous(dict(desired.get("traffic") or {}), dict(desired.get("previous") or {}), traffic)
    rest = {key: value for key, value in desired.items() if key != "rollout"}
    outcome = {"id": rollout_id, "state": "complete", "message": ""}
    return {**rest, "traffic": traffic, "previous": previous, "outcome": outcome}


def fail_rollout(desired: Desired, rollout_id: str, message: str) -> Desired:
    """The document without that rollout, its traffic as before; unchanged when it is not the one under way."""
    rollout = desired.get("rollout")
    if not rollout or rollout["id"] != rollout_id:
        return desired
    rest = {key: value for key, value in desired.items() if key != "rollout"}
    return {**rest, "outcome": {"id": rollout_id, "state": "failed", "message": message}}


def outcome_of(desired: Mapping[str, Any], rollout_id: str) -> Outcome:
    """How that rollout stands."""
    if (desired.get("rollout") or {}).get("id") == rollout_id:
        return Outcome("pending")
    outcome = desired.get("outcome") or {}
    if outcome.get("id") == rollout_id:
        return Outcome(outcome["state"], outcome["message"])
    return Outcome("replaced", REPLACED)


def rollback_traffic(desired: Mapping[str, Any], endpoint: str) -> dict[str, int]:
    """The traffic that a rollback restores. Raises Conflict when there is none."""
    previous = dict(desired.get("previous") or {})
    if not previous:
        raise Conflict(f"endpoint {endpoint!r} has no earlier traffic to go back to; name one with traffic({{...}})")
    return previous


def _previous(old: dict[str, int], before: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    """Where a rollback leads: the last traffic that was not a canary's split, so that it is one step from anywhere."""
    settled = old if len(old) == 1 or not before else before
    return {} if settled == new else settled


def serving_revision(traffic: Mapping[str, int], default: str = "") -> str:
    """The revision with the largest share, of equal ones the newest.

    >>> serving_revision({"rev-9": 50, "rev-10": 50})
    'rev-10'
    """
    if not traffic:
        return default
    return max(traffic, key=lambda revision: (traffic[revision], int(revision.rpartition("-")[2] or 0)))
