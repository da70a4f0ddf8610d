"""The points of a sweep in child interpreters of this machine, used again from point to point.

A fork would be faster to start, but it hangs when the parent ever ran an OpenMP kernel (scikit-learn, xgboost), so
children are spawned.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from mlfuncs.runs.isolation import child_environ, see_through
from mlfuncs.runs.sweep_plan import Sweep
from mlfuncs.runs.worker_process import Child


@dataclass
class _Lanes:
    """What the threads of a sweep share: the points to run (None: no more), and those that ended, or an error."""

    sweep: Sweep
    waiting: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)
    ended: queue.SimpleQueue[int | BaseException] = field(default_factory=queue.SimpleQueue)


def run_in_processes(sweep: Sweep) -> None:
    """Run the points, `parallel` at once, until all have ended or the sweep has seen enough."""
    lanes = _Lanes(sweep)
    numbers = iter(range(len(sweep.plan.points)))
    for number in itertools.islice(numbers, sweep.plan.parallel):
        lanes.waiting.put(number)
    threads = [threading.Thread(target=_work, args=(lanes,)) for _ in range(sweep.plan.parallel)]
    for thread in threads:
        thread.start()
    try:
        for _ in sweep.plan.points:
            ended = lanes.ended.get()
            if isinstance(ended, BaseException):
                raise ended
            if sweep.note(ended):
                break
            following = next(numbers, None)
            if following is not None:
                lanes.waiting.put(following)
    except BaseException:
        sweep.cancelled.set()
        raise
    finally:
        for _ in threads:
            lanes.waiting.put(None)
        for thread in threads:
            _join(thread, sweep)


def _join(thread: threading.Thread, sweep: Sweep) -> None:
    """Wait for a thread; a Ctrl-C meanwhile cancels what still runs."""
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            sweep.cancelled.set()


def _work(lanes: _Lanes) -> None:
    """One lane of the sweep: a child interpreter, one point after another."""
    sweep = lanes.sweep
    packed = sweep.plan.packed
    threads = str(max(1, (os.cpu_count() or 1) // sweep.plan.parallel))
    chosen = {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    child: Child | None = None

    def usable_child() -> Child:
        nonlocal child
        if child is not None and not child.is_usable():
            child.close()
            child = None
        child = child or Child(packed.python, child_environ(packed, **chosen))
        return child

    try:
        while (number := lanes.waiting.get()) is not None and not sweep.cancelled.is_set():
            _run_point(sweep, number, usable_child)
            lanes.ended.put(number)
    except BaseException as exc:  # noqa: BLE001 - raised again in the thread that waits for the points
        lanes.ended.put(exc)
    finally:
        if child is not None:
            child.close()


def _run_point(sweep: Sweep, number: int, children: Callable[[], Child]) -> None:
    started = sweep.begin(number)
    see_through(sweep.plan.packed, started, sweep.plan.arguments[number], children, sweep.cancelled)
