"""One function, many parameter settings, and the best of them.

    result = train.sweep(grid={"depth": [2, 4, 8], "rate": [0.1, 0.3]}, objective="max:auc", parallel=4)
    result.best.params, result.best.outputs["model"]

Points run in child interpreters of this machine, on a Dask cluster, or as the steps of a pipeline, here or on Kubeflow;
the result is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

from mlfuncs import adapters
from mlfuncs.errors import InvalidInput, RunFailed, SpecError, did_you_mean
from mlfuncs.progress import progress
from mlfuncs.runs.handle import Run
from mlfuncs.runs.isolation import pack_function
from mlfuncs.runs.journal import failed
from mlfuncs.runs.objective import Objective
from mlfuncs.runs.recorder import recorder
from mlfuncs.runs.search import LogUniform, grid_points, random_points
from mlfuncs.runs.starting import Arguments, Place, begin, check_arguments
from mlfuncs.runs.sweep_plan import Plan, StopEarly, Sweep
from mlfuncs.runs.sweep_result import SweepResult, describe_point
from mlfuncs.runs.values import as_handle, describe, encode_for_child
from mlfuncs.settings import Settings, read_settings

if TYPE_CHECKING:
    from mlfuncs.decorator import Function

__all__ = ["LogUniform", "SweepResult", "sweep"]

Target = Literal["process", "dask", "pipeline", "kubeflow"]
_TARGETS = ("process", "dask", "pipeline", "kubeflow")


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
    target: Target = "process",
    address: str = "",
    **others: Any,
) -> SweepResult:
    """Run `function` at each point of `grid` (all combinations), `list` (as given) or `random` (`n` draws, `seed`).

    `params` are arguments that all points share. `objective` is "max:<metric>" or "min:<metric>"; the number is logged,
    or returned by name or alone. `stop_early` is a value that is good enough, or a function of the objectives so far
    (in the order of finishing) that answers whether to stop; points not begun are then left out. One failing point
    does not stop the others. Ctrl-C cancels what runs, marks it so, and raises KeyboardInterrupt.

    `target` is where points run: "process" (here), "dask", "pipeline" (a ParallelFor on the local engine) or
    "kubeflow" (that same pipeline there). `address` is Dask's scheduler (default: the active client) or Kubeflow's URL
    (default: the setting kubeflow_host).

    Raises SpecError or InvalidInput before anything runs, InvalidInput when the first good run lacks the objective,
    RunFailed when every point failed.
    """
    from mlfuncs.decorator import function_of

    if others:
        name = next(iter(others))
        known = [option for option in signature(sweep).parameters if option not in ("function", "others")]
        shared = f"an argument that all points share goes into params={{{name!r}: ...}}"
        raise SpecError(f"a sweep has no option {name!r}{did_you_mean(name, known)}; {shared}")
    points = _points(grid, list, random, n, seed)
    if parallel < 1:
        raise SpecError(f"parallel must be 1 or more processes, not {parallel!r}")
    _check_target(target, stop_early)
    if stop_early is not None and objective is None:
        raise SpecError("stop_early looks at the objective: give one too, like objective='max:auc'")
    wrapped, settings = function_of(function), read_settings()
    goal = None if objective is None else Objective.parse(objective)
    arguments = _check_points(wrapped, points, dict(params or {}), settings)
    packed = pack_function(wrapped, settings, timeout_s, "process" if target == "process" else "elsewhere")
    plan = Plan(wrapped, packed, points, arguments, goal, min(parallel, len(points)), stop_early, target, address)
    return _run_sweep(plan, progress)


def _check_target(target: str, stop_early: StopEarly | None) -> None:
    if target not in _TARGETS:
        raise SpecError(f"a sweep's target is one of {', '.join(_TARGETS)}, not {target!r}")
    if stop_early is not None and target in ("pipeline", "kubeflow"):
        raise SpecError(
            f"with target={target!r} all points run: leave out stop_early, or choose target='process' or 'dask'"
        )


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


def _run_sweep(plan: Plan, show: bool) -> SweepResult:
    details = {"objective": str(plan.objective) if plan.objective else None, "points": len(plan.points)}
    run_points = adapters.load(f"sweep:{plan.target}")
    parent = begin(plan.function, Arguments({}, {}), Place("sweep", plan.target, details=details), plan.packed.settings)
    recorder().watch(parent.record)
    error: BaseException | None = None
    with progress(f"sweep of {plan.function.spec.name}", total=len(plan.points), enabled=show) as bar:
        sweep = Sweep(plan, parent, bar)
        try:
            run_points(sweep)
        except BaseException as exc:
            error = exc
            raise
        finally:
            parent.end(_ending(sweep, error))
            recorder().release(parent.record)
    return _result(sweep)


def _ending(sweep: Sweep, error: BaseException | None) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        return {**failed("Cancelled", "it was interrupted"), "status": "cancelled"}
    if error is not None:
        return failed(type(error).__name__, str(error))
    if all(run.status != "succeeded" for run in sweep.runs.values()):
        return failed("RunFailed", "every point failed")
    outputs = {}
    best = sweep.plan.objective.best_of(sweep.values) if sweep.plan.objective else None
    if best is not None:
        chosen = {name: describe(value, {}) for name, value in sweep.plan.points[best].items()}
        outputs = {"best_run": {"value": sweep.runs[best].id}, "best_params": {"value": chosen}}
    return {"status": "succeeded", "error": None, "finished_at": time.time(), "outputs": outputs}


def _result(sweep: Sweep) -> SweepResult:
    plan, parent = sweep.plan, sweep.parent
    run = Run(parent.registry.runs.get(parent.row.id), parent.registry, plan.packed.settings)
    numbers = sorted(sweep.runs)
    runs = tuple(sweep.runs[number] for number in numbers)
    if all(each.status == "failed" for each in runs):
        raise RunFailed(
            f"every point of the sweep failed; the first: {runs[0].error}; see ml.get_run({runs[0].id!r})", run.id
        )
    values = []
    for number, each in zip(numbers, runs, strict=True):
        if plan.objective is not None and number not in sweep.values and each.status == "succeeded":
            sweep.values[number] = plan.objective.value(each.metrics, each.outputs)
        values.append(sweep.values.get(number))
    return SweepResult(run, runs, tuple(plan.points[number] for number in numbers), tuple(values), plan.objective)
