"""Knative's pod autoscaler (KPA, v1.23) as pure functions: how many replicas a revision should have.

`decide` is the decider (knative/serving pkg/autoscaler/scaling), run once a tick on the load that `windows.py`
averages. `apply_bounds` is what Knative applies to its answer (pkg/reconciler/autoscaling/kpa): bounds, the scale to
start with, and the patience before zero. Times are seconds on any one clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from mlfuncs_runtime.autoscaler_config import AutoscalerConfig

__all__ = [
    "AutoscalerConfig",
    "AutoscalerState",
    "Decision",
    "Observation",
    "Replicas",
    "ScaleState",
    "apply_bounds",
    "decide",
    "initial_scale_state",
    "initial_state",
]

DELAY_BUCKET_S = 2  # the delay window's granularity: Knative's tick
_ACTIVATION_BUFFER_S = 30.0  # Knative's addition to the progress deadline


@dataclass(frozen=True)
class Observation:
    """The averages over both windows (None: no data, which is not zero) and the replicas ready and starting."""

    stable: float | None
    panic: float | None
    ready: int
    starting: int = 0


@dataclass(frozen=True)
class Decision:
    """Replicas wished; `valid` is False when there was nothing to decide on, and then the rest means nothing.

    A negative `excess_burst_capacity` says that the replicas alone could not take the wished burst.
    """

    desired: int
    excess_burst_capacity: int
    panicking: bool
    valid: bool


@dataclass(frozen=True)
class AutoscalerState:
    """What one tick hands to the next: since when there is panic (None: calm), its high-water mark, recent wishes."""

    panic_since_s: float | None = None
    max_panic_pods: int = 0
    delayed: tuple[tuple[int, int], ...] = ()  # (bucket, replicas): buckets rise, replicas fall


def initial_state(config: AutoscalerConfig, ready: int, now_s: float) -> AutoscalerState:
    """The state to start from. With more than one replica it is panic, so that lost history scales nothing down.

    >>> initial_state(AutoscalerConfig(), 3, 0.0).max_panic_pods
    3
    """
    return AutoscalerState(panic_since_s=now_s if ready > 1 else None, max_panic_pods=ready)


def decide(
    config: AutoscalerConfig, observation: Observation, state: AutoscalerState, now_s: float
) -> tuple[Decision, AutoscalerState]:
    """How many replicas there should be, and the state for the next tick.

    >>> config = AutoscalerConfig(target=10, target_utilization_percentage=100)
    >>> decision, _ = decide(config, Observation(stable=25.0, panic=25.0, ready=2), AutoscalerState(), 0.0)
    >>> decision.desired
    3
    """
    stable, panic = observation.stable, observation.panic
    if stable is None or panic is None:
        return Decision(0, 0, state.panic_since_s is not None, valid=False), state
    wishes = _Wishes.of(config, observation, stable, panic)
    state = _enter_or_leave_panic(config, state, wishes.over_threshold, now_s)
    desired = wishes.stable
    if state.panic_since_s is not None:
        desired = max(wishes.stable, wishes.panic, state.max_panic_pods)
        if observation.starting > 0:
            # The backlog that waits for replicas under way asks for no more of them (knative/serving#13284, #15121).
            under_way = max(observation.ready, 0) + observation.starting
            desired = min(desired, max(state.max_panic_pods, under_way))
        state = replace(state, max_panic_pods=desired)
    if config.reachable and config.scale_down_delay_s > 0:
        state = replace(state, delayed=_record_delayed(config, state.delayed, desired, now_s))
        desired = state.delayed[0][1]
    excess = _excess_burst_capacity(config, observation.ready, panic)
    return Decision(desired, excess, state.panic_since_s is not None, valid=True), state


@dataclass(frozen=True)
class _Wishes:
    """What each window alone asks for, within the bounds of one tick."""

    stable: int
    panic: int
    over_threshold: bool

    @classmethod
    def of(cls, config: AutoscalerConfig, observation: Observation, stable: float, panic: float) -> _Wishes:
        ready = max(1, observation.ready)
        highest = math.ceil(config.max_scale_up_rate * ready)
        lowest = math.floor(ready / config.max_scale_down_rate) if config.reachable else 0
        unbounded_panic = math.ceil(panic / config.target_value)

        def bound(unbounded: int) -> int:
            wish = min(max(unbounded, lowest), highest)
            activates = config.activation_scale > 1 and unbounded > 0
            return max(wish, config.activation_scale) if activates else wish

        return cls(
            stable=bound(math.ceil(stable / config.target_value)),
            panic=bound(unbounded_panic),
            over_threshold=unbounded_panic / ready >= config.panic_threshold_percentage / 100,
        )


def _enter_or_leave_panic(
    config: AutoscalerConfig, state: AutoscalerState, over_threshold: bool, now_s: float
) -> AutoscalerState:
    """Panic begins or is extended above the threshold, and ends after a whole stable window below it."""
    if over_threshold:
        return replace(state, panic_since_s=now_s)
    if state.panic_since_s is not None and state.panic_since_s + config.window_s < now_s:
        return replace(state, panic_since_s=None, max_panic_pods=0)
    return state


def _record_delayed(
    config: AutoscalerConfig, delayed: tuple[tuple[int, int], ...], desired: int, now_s: float
) -> tuple[tuple[int, int], ...]:
    """The wishes of the delay window that can still be its maximum (ascending minima), `desired` included."""
    bucket = math.floor(now_s) // DELAY_BUCKET_S
    size = math.ceil(config.scale_down_delay_s / DELAY_BUCKET_S)
    kept = [(at, wish) for at, wish in delayed if wish > desired and bucket - at < size]
    if kept and kept[-1][0] == bucket:
        desired = kept.pop()[1]
    return (*kept, (bucket, desired))


def _excess_burst_capacity(config: AutoscalerConfig, ready: int, panic: float) -> int:
    if config.target_burst_capacity == 0:
        return 0
    if config.target_burst_capacity < 0:
        return -1
    return math.floor(ready * config.total_value - config.target_burst_capacity - panic)


@dataclass(frozen=True)
class Replicas:
    """What runs: replicas ready, and for how long requests have gone through the queue in front (Knative's activator).

    `proxied_s` 0 is the careful answer: then the whole grace period passes between idle and zero.
    """

    ready: int
    proxied_s: float = 0.0


@dataclass(frozen=True)
class ScaleState:
    """The replicas to run, and the activity since `since_s`; `initialized` once the initial scale was met."""

    replicas: int
    activity: Literal["activating", "active", "inactive"] = "activating"
    since_s: float = 0.0
    initialized: bool = False


def initial_scale_state(config: AutoscalerConfig, now_s: float) -> ScaleState:
    """The state of a new revision, which starts with its initial scale, or its min-scale when that is more."""
    return ScaleState(replicas=max(_initial_scale(config), _min_scale(config)), since_s=now_s)


def apply_bounds(
    config: AutoscalerConfig, desired: int | None, running: Replicas, state: ScaleState, now_s: float
) -> ScaleState:
    """The replicas to run, in the new state's `replicas`; `desired` is a valid decision's wish, or None before one.

    Zero is reached when the wish was zero for a whole stable window of activity, and then for the grace period and
    the pod retention period.

    >>> config = AutoscalerConfig(max_scale=3)
    >>> apply_bounds(config, 7, Replicas(ready=1), initial_scale_state(config, 0.0), 1.0).replicas
    3
    """
    wish = _wish(config, desired, running, state, now_s)
    minimum = max(_min_scale(config), 1 if state.initialized else _initial_scale(config))
    initialized = state.initialized or running.ready >= minimum
    activity = _activity(wish.replicas, running.ready, minimum, state.activity)
    return ScaleState(
        replicas=wish.replicas if wish.applies and wish.replicas is not None else state.replicas,
        activity=activity,
        since_s=state.since_s if activity == state.activity else now_s,
        initialized=initialized,
    )


@dataclass(frozen=True)
class _Wish:
    replicas: int | None  # None: not known yet
    applies: bool


def _wish(config: AutoscalerConfig, desired: int | None, running: Replicas, state: ScaleState, now_s: float) -> _Wish:
    if desired is None and state.activity != "activating":
        return _Wish(None, applies=False)
    minimum, initial = _min_scale(config), _initial_scale(config)
    if initial > 1 and not state.initialized and config.reachable:
        minimum = max(minimum, initial)
    bounded = -1 if desired is None else desired
    if bounded < minimum:
        bounded = minimum
    elif config.max_scale and bounded > config.max_scale:
        bounded = config.max_scale
    if bounded > 0:
        return _Wish(bounded, applies=True)
    if not config.enable_scale_to_zero:
        return _Wish(1, applies=True)
    return _wish_of_zero(config, running, state, now_s)


def _wish_of_zero(config: AutoscalerConfig, running: Replicas, state: ScaleState, now_s: float) -> _Wish:
    elapsed_s = now_s - state.since_s
    if state.activity == "activating":
        gave_up = elapsed_s > config.progress_deadline_s + _ACTIVATION_BUFFER_S
        return _Wish(0, applies=True) if gave_up else _Wish(None, applies=False)
    if state.activity == "active":
        return _Wish(0, applies=False) if elapsed_s >= config.window_s else _Wish(1, applies=True)
    retention_s = config.scale_to_zero_pod_retention_period_s if config.reachable else 0.0
    grace_s = config.scale_to_zero_grace_period_s
    if elapsed_s >= max(grace_s, retention_s):
        return _Wish(0, applies=True)
    return _Wish(0, applies=elapsed_s >= retention_s and running.proxied_s >= grace_s)


def _activity(
    wish: int | None, ready: int, minimum: int, before: Literal["activating", "active", "inactive"]
) -> Literal["activating", "active", "inactive"]:
    if wish == 0 or minimum == 0:
        return "inactive"
    if before == "inactive" and not wish:
        return "inactive"
    return "active" if ready >= minimum else "activating"


def _min_scale(config: AutoscalerConfig) -> int:
    return config.min_scale if config.reachable else 0


def _initial_scale(config: AutoscalerConfig) -> int:
    return config.initial_scale if config.initial_scale > 0 or config.allow_zero_initial_scale else 1
