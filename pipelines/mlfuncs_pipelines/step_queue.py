"""The steps that are to run next: in order, and those that wait between two attempts once their time has come."""

from __future__ import annotations

import heapq
import itertools
from collections import deque

from mlfuncs_pipelines.instructions import Step


class StepQueue:
    """Steps in the order in which they came. `now` is in seconds, by any clock that only goes on."""

    def __init__(self) -> None:
        self._ready: deque[Step] = deque()
        self._delayed: list[tuple[float, int, Step]] = []  # when it is due, in order of arrival
        self._order = itertools.count()

    def add(self, step: Step, now: float) -> None:
        """Take a step that may run `step.delay_s` from now."""
        if step.delay_s > 0:
            heapq.heappush(self._delayed, (now + step.delay_s, next(self._order), step))
        else:
            self._ready.append(step)

    def next(self, now: float) -> Step | None:
        """The step to run now; None when none may."""
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])
        return self._ready.popleft() if self._ready else None

    def due_in(self, now: float) -> float | None:
        """Seconds until the next of the delayed steps may run; None when there is none."""
        return max(0.0, self._delayed[0][0] - now) if self._delayed else None
