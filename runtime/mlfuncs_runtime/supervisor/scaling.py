"""The autoscaler's shell: feeds what the router measured to the pure decider, one memory per revision.

All times come in as arguments. The supervisor calls `woken` when a request waits at zero, and `tick` twice a second, or
at once and ten times a second while requests wait for replicas (`is_pressed`). Such an early tick takes the second that
is not over for what it has come to so far, the least it will be: it decides sooner, and never more, than the ticks
after it would.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs_runtime.autoscaler import (
    AutoscalerConfig,
    AutoscalerState,
    Observation,
    Replicas,
    ScaleState,
    apply_bounds,
    decide,
    initial_state,
)
from mlfuncs_runtime.supervisor.plan import EndpointPlan, bounds, initial_replicas, needed_for_rollout
from mlfuncs_runtime.supervisor.reconcile import Key, Observed, Phase
from mlfuncs_runtime.windows import LoadWindows

log = logging.getLogger("mlfuncs.supervisor")

RATE_S = 5.0  # the span that rates and durations are told over


@dataclass
class _Memory:
    """What is remembered of one revision between ticks."""

    config: AutoscalerConfig
    windows: LoadWindows
    state: AutoscalerState
    scale: ScaleState
    panicking: bool = False


class Scaler:
    """How many replicas each revision should have, by load. `scaled` is its word.

    `waiting` has the revisions that requests waited for and that had no ready replica since; `is_pressed` says that
    requests waited for a replica at the last tick where there may be more of them.
    """

    def __init__(self) -> None:
        self.scaled: dict[Key, int] = {}
        self.waiting: set[Key] = set()
        self.is_pressed = False
        self._memories: dict[Key, _Memory] = {}
        self._loads: dict[str, _Load] = {}

    def tick(self, plans: Iterable[EndpointPlan], observed: Observed, stats: Mapping[str, Any], now_s: float) -> bool:
        """Take the router's measures in and decide anew; True when some number changed."""
        before = dict(self.scaled)
        known: set[Key] = set()
        self.is_pressed = False
        for plan in plans:
            measured = (stats.get("endpoints") or {}).get(plan.name) or {}
            for revision in plan.reachable:
                key = (plan.name, revision)
                known.add(key)
                told = (measured.get("revisions") or {}).get(revision) or {}
                self._decide(plan, revision, observed, told, now_s)
                self.is_pressed |= bool(told.get("queued")) and self.scaled[key] < bounds(plan, revision)[1]
            memories = [self._memories.get((plan.name, revision)) for revision in plan.traffic]
            panicking = any(memory.panicking for memory in memories if memory)
            self._loads.setdefault(plan.name, _Load()).take(measured, panicking, now_s)
        for key in [key for key in self._memories if key not in known]:
            del self._memories[key]
            self.scaled.pop(key, None)
        self.waiting = {key for key in self.waiting if key in known and not observed.ready(key)}
        return self.scaled != before

    def woken(self, plan: EndpointPlan, revision: str | None, now_s: float) -> bool:
        """A request waits and no replica is there: want at least one now; True when that is news."""
        names = [revision] if revision in plan.reachable else list(plan.traffic)
        woken = False
        for name in names:
            assert name is not None
            key = (plan.name, name)
            _, high = bounds(plan, name)
            woken |= high > 0 and key not in self.waiting
            self.waiting.add(key)
            if self.scaled.get(key, initial_replicas(plan, name)) < 1 <= high:
                self.scaled[key] = 1
                woken = True
                if memory := self._memories.get(key):
                    memory.scale = ScaleState(1, "activating", now_s, initialized=True)
        return woken

    def start(self, plan: EndpointPlan) -> None:
        """A rollout of the plan is complete: go on from the replicas it needed."""
        revisions = plan.rollout.traffic if plan.rollout else ()
        counts = {(plan.name, revision): needed_for_rollout(plan, revision, self.scaled) for revision in revisions}
        for key, count in counts.items():
            self._memories.pop(key, None)
            self.scaled[key] = count

    def forget(self, endpoint: str) -> None:
        """The endpoint is gone."""
        self._loads.pop(endpoint, None)
        for key in [key for key in {*self.scaled, *self._memories} if key[0] == endpoint]:
            self.scaled.pop(key, None)
            self._memories.pop(key, None)

    def load_of(self, endpoint: str) -> dict[str, Any]:
        """What the router measured last: queued, in_flight, rps, p50_ms, p99_ms; and whether there is panic."""
        return self._loads[endpoint].to_dict() if endpoint in self._loads else {}

    def to_dict(self) -> dict[str, int]:
        """The numbers for the next supervisor; `restore` reads them."""
        return {f"{endpoint}/{revision}": count for (endpoint, revision), count in self.scaled.items()}

    def restore(self, values: Mapping[str, int]) -> None:
        """Go on with the numbers of an earlier supervisor."""
        for name, count in values.items():
            endpoint, _, revision = name.partition("/")
            self.scaled[(endpoint, revision)] = count

    def _decide(
        self, plan: EndpointPlan, revision: str, observed: Observed, measured: Mapping[str, Any], now_s: float
    ) -> None:
        key = (plan.name, revision)
        memory = self._memory(plan, revision, observed, now_s)
        for second, value in _measures(memory.config, measured.get("buckets") or ()):
            # A second is known once it is over: as Knative's scrapes, it counts for the time at which it was seen. In
            # its own place it would be outside a window of one second before anybody looked.
            if value or memory.scale.replicas:  # at zero nobody measures: silence is no data there, as for Knative
                memory.windows.record(second + 1, value)
        coming = [(second + 1, value) for second, value in _measures(memory.config, _under_way(measured))]
        starting = sum(r.key == key and r.phase is Phase.STARTING for r in observed.replicas)
        averages = memory.windows.averages(now_s, coming[0] if coming else None)
        observation = Observation(*averages, observed.ready(key), starting)
        decision, memory.state = decide(memory.config, observation, memory.state, now_s)
        desired = decision.desired if decision.valid else None
        memory.scale = apply_bounds(memory.config, desired, Replicas(observation.ready), memory.scale, now_s)
        memory.panicking = decision.panicking
        if self.scaled.get(key) != memory.scale.replicas:
            log.info(
                "%s %s: %s -> %d replicas (load %s over the window, %s now%s)",
                *key,
                self.scaled.get(key, "new"),
                memory.scale.replicas,
                _shown(observation.stable),
                _shown(observation.panic),
                ", panic" if decision.panicking else "",
            )
        self.scaled[key] = memory.scale.replicas

    def _memory(self, plan: EndpointPlan, revision: str, observed: Observed, now_s: float) -> _Memory:
        low, high = bounds(plan, revision)
        scale = plan.revisions[revision].spec.scale
        config = dataclasses.replace(AutoscalerConfig.of_scale(scale), min_scale=low, max_scale=high)
        key = (plan.name, revision)
        memory = self._memories.get(key)
        if memory is None:
            count = self.scaled.get(key, initial_replicas(plan, revision))
            scale_state = ScaleState(count, "active" if count else "inactive", now_s, initialized=True)
            state = initial_state(config, observed.ready(key), now_s)
            memory = self._memories[key] = _Memory(config, LoadWindows(config), state, scale_state)
        memory.config = config  # traffic may have come or gone, and with it the lower bound
        return memory


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


class _Load:
    """What one endpoint has to do now, for people: rates over the last seconds, the last durations known."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()
        self._durations: tuple[float, dict[str, float]] = (0.0, {})
        self._now: dict[str, Any] = {}

    def take(self, measured: Mapping[str, Any], panicking: bool, now_s: float) -> None:
        """Take in what the router measured since the last tick."""
        revisions = list((measured.get("revisions") or {}).values())
        for revision in revisions:
            self._arrivals.extend((second, requests) for second, _, requests in revision["buckets"])
        while self._arrivals and self._arrivals[0][0] < now_s - RATE_S - 1:
            self._arrivals.popleft()
        slowest = {
            f"{name}_ms": max(revision[f"{name}_s"] for revision in revisions if revision[f"{name}_s"]) * 1000
            for name in ("p50", "p99")
            if any(revision[f"{name}_s"] for revision in revisions)
        }
        if slowest or now_s - self._durations[0] > RATE_S:
            self._durations = (now_s, slowest)
        self._now = {
            "queued": measured.get("queued", 0),
            "in_flight": sum((measured.get("in_flight") or {}).values()),
            "rps": sum(requests for _, requests in self._arrivals) / RATE_S,
            "panicking": panicking,
        }

    def to_dict(self) -> dict[str, Any]:
        """The load as `mlfuncs.serving.targets.EndpointStatus.load`."""
        return {**self._now, **self._durations[1]}


def _measures(config: AutoscalerConfig, buckets: Iterable[Sequence[float]]) -> list[tuple[float, float]]:
    """(second, value) of each of the router's buckets."""
    return [(second, requests if config.metric == "rps" else concurrency) for second, concurrency, requests in buckets]


def _under_way(measured: Mapping[str, Any]) -> list[Sequence[float]]:
    """The bucket of the second that is not over, when the router told it."""
    return [measured["under_way"]] if measured.get("under_way") else []
