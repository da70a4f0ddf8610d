"""A sweep under way: what it runs, and what is known so far. The places that run its points share this."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlfuncs.progress import Progress
from mlfuncs.runs.handle import Run
from mlfuncs.runs.isolation import Packed, begin_isolated
from mlfuncs.runs.journal import failed
from mlfuncs.runs.objective import Objective
from mlfuncs.runs.outcome import NOTHING, Left, keep_outcome
from mlfuncs.runs.starting import Arguments, Place, Started
from mlfuncs.runs.sweep_result import describe_point

if TYPE_CHECKING:
    from mlfuncs.decorator import Function

StopEarly = float | Callable[[list[float]], bool]


@contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C waits until the block is over, so that what it writes down is whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    pressed: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: pressed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):
        before(*pressed[-1])


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do. `arguments` are those of `points`, in order; `address` is the target's, "" its default."""

    function: Function[Any, Any]
    packed: Packed
    points: Sequence[dict[str, Any]]
    arguments: Sequence[Arguments]
    objective: Objective | None
    parallel: int
    stop_early: StopEarly | None
    target: str = "process"
    address: str = ""


@dataclass
class Sweep:
    """The state of a sweep: the runs begun and the objectives known, by the number of their point."""

    plan: Plan
    parent: Started
    bar: Progress
    cancelled: threading.Event = field(default_factory=threading.Event)
    runs: dict[int, Run] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)

    def begin(self, number: int, **details: Any) -> Started:
        """Begin the run of one point."""
        plan = self.plan
        place = Place(isolation=plan.target, parent_id=self.parent.row.id, details={"point": number, **details})
        started = begin_isolated(plan.function, plan.packed, plan.arguments[number], place)
        self.runs[number] = Run(started.row, started.registry, plan.packed.settings)
        return started

    def end(self, number: int, started: Started, outcome: Mapping[str, Any]) -> bool:
        """End the run of one point with what came of it elsewhere; whether the sweep has seen enough."""
        keep_outcome(started, outcome)
        return self.note(number)

    def fail(self, number: int, started: Started, final: Mapping[str, Any], left: Left = NOTHING) -> bool:
        """End the run of a point that did not end itself, with what it `left`; whether the sweep has seen enough."""
        return self.end(number, started, left.ended(final))

    def cancel(self, started: Started, left: Left = NOTHING) -> None:
        """Mark the run of a point that was stopped, with what it `left`."""
        final = {**failed("Cancelled", "it was cancelled"), "status": "cancelled"}
        keep_outcome(started, left.ended(final))

    def note(self, number: int) -> bool:
        """Take in the end of a point and show it; whether the sweep has seen enough.

        Raises InvalidInput when the run lacks the objective.
        """
        run, goal = self.runs[number], self.plan.objective
        if goal is not None and run.status == "succeeded":
            self.values[number] = goal.value(run.metrics, run.outputs)
        best = goal.best_of(self.values) if goal else None
        failures = sum(each.row.status == "failed" for each in list(self.runs.values()) if each.row.finished_at)
        notes = [f"{failures} failed"] if failures else []
        if best is not None and goal is not None:
            notes.append(f"best {goal.name}={self.values[best]:.6g} ({describe_point(self.plan.points[best])})")
        self.bar.update(note=", ".join(notes))
        self.bar.advance()
        return self._is_enough()

    def _is_enough(self) -> bool:
        plan = self.plan
        if plan.stop_early is None or plan.objective is None or not self.values:
            return False
        if callable(plan.stop_early):
            return bool(plan.stop_early([*self.values.values()]))
        last = [*self.values.values()][-1]
        return not plan.objective.is_better(plan.stop_early, last)
