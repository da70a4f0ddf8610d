"""One function, many parameter settings, and the best of them.

    result = train.sweep(grid={"depth": [2, 4, 8], "rate": [0.1, 0.3]}, objective="max:auc", parallel=4)
    result.best.params, result.best.outputs["model"]

Points run in child interpreters that are used again from point to point. A fork would be faster to start, but it hangs
when the parent ever ran an OpenMP kernel (scikit-learn, xgboost), so children are spawned.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput, RunFailed, SpecError
from mlfuncs.progress import Progress, progress
from mlfuncs.runs.handle import Run
from mlfuncs.runs.isolation import Packed, begin_isolated, child_environ, pack_function, see_through
from mlfuncs.runs.journal import failed
from mlfuncs.runs.objective import Objective
from mlfuncs.runs.recorder import recorder
from mlfuncs.runs.search import LogUniform, grid_points, random_points
from mlfuncs.runs.starting import Arguments, Place, Started, begin, check_arguments
from mlfuncs.runs.sweep_result import SweepResult, describe_point
from mlfuncs.runs.values import as_handle, describe, encode_for_child
from mlfuncs.runs.worker_process import Child
from mlfuncs.settings import Settings, read_settings

if TYPE_CHECKING:
    from mlfuncs.decorator import Function

__all__ = ["LogUniform", "SweepResult", "sweep"]

StopEarly = float | Callable[[list[float]], bool]


def sweep(
    function: Function[Any, Any] | Callable[..., Any],
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    list: Sequence[Mapping[str, Any]] | None = None,
    random: Mapping[str, Any] | None = None,
    n: int = 20,
    seed: int | None = None,
    params: Mapping[str, Any] | None = None,
    objective: str | None = None,
    parallel: int = 4,
    stop_early: StopEarly | None = None,
    timeout_s: float | None = None,
    progress: bool = True,
) -> SweepResult:
    """Run `function` at each point of `grid` (all combinations), `list` (as given) or `random` (`n` draws, `seed`).

    `params` are arguments that all points share. `objective` is "max:<metric>" or "min:<metric>"; the number is logged,
    or returned by name or alone. `stop_early` is a value that is good enough, or a function of the objectives so far
    (in the order of finishing) that answers whether to stop; points not begun are then left out. One failing point
    does not stop the others. Ctrl-C cancels what runs, marks it so, and raises KeyboardInterrupt.

    Raises SpecError or InvalidInput before anything runs, InvalidInput when the first good run lacks the objective,
    RunFailed when every point failed.
    """
    from mlfuncs.decorator import function_of

    points = _points(grid, list, random, n, seed)
    if parallel < 1:
        raise SpecError(f"parallel must be 1 or more processes, not {parallel!r}")
    wrapped, settings = function_of(function), read_settings()
    goal = None if objective is None else Objective.parse(objective)
    arguments = _check_points(wrapped, points, dict(params or {}), settings)
    packed = pack_function(wrapped, settings, timeout_s)
    plan = _Plan(wrapped, packed, arguments, goal, min(parallel, len(points)), stop_early)
    return _run_sweep(plan, points, progress)


@dataclass(frozen=True)
class _Plan:
    function: Function[Any, Any]
    packed: Packed
    arguments: Sequence[Arguments]
    objective: Objective | None
    parallel: int
    stop_early: StopEarly | None


@dataclass
class _State:
    """What the threads of a sweep share."""

    waiting: queue.SimpleQueue[int]
    ended: queue.SimpleQueue[int | BaseException] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    runs: dict[int, Run] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)


def _points(
    grid: Mapping[str, Sequence[Any]] | None,
    points: Sequence[Mapping[str, Any]] | None,
    distributions: Mapping[str, Any] | None,
    n: int,
    seed: int | None,
) -> list[dict[str, Any]]:
    if sum(each is not None for each in (grid, points, distributions)) != 1:
        raise SpecError("a sweep takes exactly one of grid={...}, list=[...] and random={...}")
    if grid is not None:
        found = grid_points(grid)
    elif points is not None:
        found = [dict(point) for point in points]
    else:
        found = random_points(distributions or {}, n, seed)
    if not found:
        raise SpecError("the sweep has no points: each list of values needs at least one")
    return found


def _check_points(
    function: Function[Any, Any], points: Sequence[Mapping[str, Any]], shared: dict[str, Any], settings: Settings
) -> list[Arguments]:
    """Every point's arguments, checked before anything runs; shared values are stored and loaded once."""
    hints = {parameter.name: parameter.annotation for parameter in function.signature.parameters}
    for name, value in shared.items():
        shared[name] = as_handle(encode_for_child(value, hints.get(name), settings), settings)
    loaded: dict[Any, Any] = {}
    found = []
    for number, point in enumerate(points, 1):
        try:
            found.append(check_arguments(function, (), {**shared, **point}, settings, loaded))
        except InvalidInput as exc:
            raise InvalidInput(f"point {number} of the sweep ({describe_point(point)}): {exc}", exc.fields) from exc
    return found


def _run_sweep(plan: _Plan, points: list[dict[str, Any]], show: bool) -> SweepResult:
    details = {"objective": str(plan.objective) if plan.objective else None, "points": len(points)}
    place = Place(kind="sweep", isolation="process", details=details)
    parent = begin(plan.function, Arguments({}, {}), place, plan.packed.settings)
    recorder().watch(parent.record)
    state = _State(queue.SimpleQueue())
    for number in range(len(points)):
        state.waiting.put(number)
    error: BaseException | None = None
    try:
        with progress(f"sweep of {plan.function.spec.name}", total=len(points), enabled=show) as bar:
            _run_points(plan, parent, state, points, bar)
    except BaseException as exc:
        error = exc
        raise
    finally:
        parent.end(_ending(plan, state, error, points))
        recorder().release(parent.record)
    return _result(plan, parent, state, points)


def _run_points(plan: _Plan, parent: Started, state: _State, points: list[dict[str, Any]], bar: Progress) -> None:
    threads = [threading.Thread(target=_work, args=(plan, parent, state)) for _ in range(plan.parallel)]
    for thread in threads:
        thread.start()
    try:
        for _ in points:
            ended = state.ended.get()
            if isinstance(ended, BaseException):
                raise ended
            _note(plan, state, ended, points, bar)
            if _is_enough(plan, state):
                break
    except BaseException:
        state.cancelled.set()
        raise
    finally:
        _empty(state.waiting)
        for thread in threads:
            _join(thread, state)


def _join(thread: threading.Thread, state: _State) -> None:
    """Wait for a thread; a Ctrl-C meanwhile cancels what still runs."""
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            state.cancelled.set()


def _work(plan: _Plan, parent: Started, state: _State) -> None:
    """One lane of the sweep: a child interpreter, one point after another."""
    threads = str(max(1, (os.cpu_count() or 1) // plan.parallel))
    chosen = {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    child: Child | None = None

    def usable_child() -> Child:
        nonlocal child
        if child is not None and not child.is_usable():
            child.close()
            child = None
        child = child or Child(plan.packed.python, child_environ(plan.packed, **chosen))
        return child

    try:
        while not state.cancelled.is_set():
            number = state.waiting.get_nowait()
            _run_point(plan, parent, state, number, usable_child)
            state.ended.put(number)
    except queue.Empty:
        pass
    except BaseException as exc:  # noqa: BLE001 - raised again in the thread that waits for the points
        state.ended.put(exc)
    finally:
        if child is not None:
            child.close()


def _run_point(plan: _Plan, parent: Started, state: _State, number: int, children: Callable[[], Child]) -> None:
    place = Place(isolation="process", parent_id=parent.row.id, details={"point": number})
    arguments = plan.arguments[number]
    started = begin_isolated(plan.function, plan.packed, arguments, place)
    state.runs[number] = Run(started.row, started.registry, plan.packed.settings)
    see_through(plan.packed, started, arguments, children, state.cancelled)


def _note(plan: _Plan, state: _State, number: int, points: list[dict[str, Any]], bar: Progress) -> None:
    run = state.runs[number]
    if plan.objective is not None and run.status == "succeeded":
        state.values[number] = plan.objective.value(run.metrics, run.outputs)
    best = plan.objective.best_of(state.values) if plan.objective else None
    failures = sum(each.row.status == "failed" for each in list(state.runs.values()) if each.row.finished_at)
    notes = [f"{failures} failed"] if failures else []
    if best is not None and plan.objective is not None:
        notes.append(f"best {plan.objective.name}={state.values[best]:.6g} ({describe_point(points[best])})")
    bar.update(note=", ".join(notes))
    bar.advance()


def _is_enough(plan: _Plan, state: _State) -> bool:
    if plan.stop_early is None or plan.objective is None or not state.values:
        return False
    if callable(plan.stop_early):
        return bool(plan.stop_early([*state.values.values()]))
    last = [*state.values.values()][-1]
    return not plan.objective.is_better(plan.stop_early, last)


def _ending(plan: _Plan, state: _State, error: BaseException | None, points: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return {**failed("Cancelled", "it was interrupted"), "status": "cancelled"}
    if error is not None:
        return failed(type(error).__name__, str(error))
    if all(run.status != "succeeded" for run in state.runs.values()):
        return failed("RunFailed", "every point failed")
    outputs = {}
    best = plan.objective.best_of(state.values) if plan.objective else None
    if best is not None:
        chosen = {name: describe(value, {}) for name, value in points[best].items()}
        outputs = {"best_run": {"value": state.runs[best].id}, "best_params": {"value": chosen}}
    return {"status": "succeeded", "error": None, "finished_at": time.time(), "outputs": outputs}


def _result(plan: _Plan, parent: Started, state: _State, points: list[dict[str, Any]]) -> SweepResult:
    run = Run(parent.registry.runs.get(parent.row.id), parent.registry, plan.packed.settings)
    numbers = sorted(state.runs)
    runs = tuple(state.runs[number] for number in numbers)
    if all(each.status == "failed" for each in runs):
        raise RunFailed(
            f"every point of the sweep failed; the first: {runs[0].error}; see ml.get_run({runs[0].id!r})", run.id
        )
    values = []
    for number, each in zip(numbers, runs, strict=True):
        if plan.objective is not None and number not in state.values and each.status == "succeeded":
            state.values[number] = plan.objective.value(each.metrics, each.outputs)
        values.append(state.values.get(number))
    return SweepResult(run, runs, tuple(points[number] for number in numbers), tuple(values), plan.objective)


def _empty(waiting: queue.SimpleQueue[int]) -> None:
    try:
        while True:
            waiting.get_nowait()
    except queue.Empty:
        return
