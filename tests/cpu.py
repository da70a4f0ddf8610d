"""CPU time that means the same on a slow or shared machine: measured against a fixed piece of work beside it."""

from __future__ import annotations

import time
from collections.abc import Callable


def cost_of(work: Callable[[], object], times: int = 40) -> float:
    """The least CPU time of `work` in this thread, in units of `_fixed_work` (about 0.9 ms on an idle machine)."""
    spent, fixed = [], []
    for _ in range(times):
        fixed.append(_cpu_s(_fixed_work))
        spent.append(_cpu_s(work))
    return min(spent) / min(fixed)


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def _fixed_work() -> int:
    return sum(number * number for number in range(20_000))
