"""A sweep as a pipeline: a ParallelFor over the points, and a step that collects what came of them.

The same pipeline runs on the local engine and on Kubeflow. Either way each point leaves its outcome at the artifact
URL (see `mlfuncs.runs.outcome`), from where it comes into the registry as a run of the sweep.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlfuncs.decorator import Function, function
from mlfuncs.errors import SpecError, Unavailable
from mlfuncs.interface.signature import Signature
from mlfuncs.results import HTML
from mlfuncs.runs.isolation import child_values
from mlfuncs.runs.journal import failed
from mlfuncs.runs.outcome import NOTHING, Left, forget_outcomes, read_outcome, stored_outcomes
from mlfuncs.runs.starting import Started
from mlfuncs.runs.sweep_plan import Plan, Sweep, unbroken
from mlfuncs_pipelines.engine import Observer, Options
from mlfuncs_pipelines.function_component import FunctionComponent
from mlfuncs_pipelines.kubeflow import KubeflowRun, submit
from mlfuncs_pipelines.pipeline import Pipeline
from mlfuncs_pipelines.point import point_signature
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord
from mlfuncs_pipelines.runner import run_pipeline

_POLL_S = 5.0  # how often Kubeflow is asked
_AWAY_S = 300.0  # how long a cluster that does not answer is waited for (guess: an API server's restart)


class PointComponent(FunctionComponent):
    """A function as the step that runs one point of a sweep."""

    flags = ("--point",)

    @property
    def signature(self) -> Signature:
        """The interface of every point, whatever the function's own."""
        return point_signature()

    def _may_pickle(self) -> bool:
        return True  # the function's own outputs, which are stored as those of a run


class Collected(NamedTuple):
    """What the last step makes: the table of all points as a page, and the best point with its numbers."""

    table: HTML
    best: dict[str, Any]


@function(name="collect", requirements=[])
def collect(outcomes: list[dict[str, Any]], objective: str) -> Collected:
    """The points of a sweep in one table."""
    from mlfuncs.display import Table
    from mlfuncs.runs.objective import Objective

    goal = Objective.parse(objective) if objective else None
    found = {n: goal.among(one["numbers"]) for n, one in enumerate(outcomes)} if goal else {}
    number = goal.best_of({n: value for n, value in found.items() if value is not None}) if goal else None
    rows = [
        {"point": one["point"], "status": one["status"], **one["params"], **one["numbers"], "error": one["error"]}
        for one in outcomes
    ]
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    best = {(number, name) for name in (goal.name, "output") if name in columns} if goal and number is not None else ()
    page = Table(columns, tuple(rows), best=frozenset(best))._repr_html_()
    return Collected(HTML(page), {} if number is None else outcomes[number])


def sweep_pipeline(swept: Function[Any, Any], parallel: int) -> Pipeline:
    """The pipeline that sweeps `swept`, `parallel` points at once; the points are its parameters."""
    from kfp import dsl

    component = PointComponent(swept)

    def body(points: list[str], shared: str, sweep: str, objective: str = "") -> None:
        with dsl.ParallelFor(points, parallelism=parallel) as point:
            one = component(point=point, shared=shared, sweep=sweep)
            one.set_caching_options(False)  # its outcome lies outside of the pipeline
        collect(dsl.Collected(one.output), objective)

    name = f"sweep-{swept.spec.name}"
    return Pipeline(body, name=name, description=f"{swept.spec.name} at each of `points`; what came of them, collected")


def run_here(sweep: Sweep) -> None:
    """Run the points as a pipeline on the local engine."""
    plan, settings = sweep.plan, sweep.plan.packed.settings
    observer = _Points(sweep)
    try:
        options = Options(parallel=max(plan.parallel, Options().slots))
        run = run_pipeline(_pipeline(plan).ir, _parameters(sweep), settings, options, [observer])
        for number in range(len(plan.points)):
            observer.give_up(number, f"it never began: {run.error}")
    except BaseException:
        observer.cancel()
        raise
    finally:
        forget_outcomes(settings, sweep.parent.row.id)


class _Points(Observer):
    """Keeps the runs of a sweep while the engine runs its steps."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._open: dict[int, Started] = {}
        self._left: dict[int, Left] = {}  # by the last attempt at a point

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if record.is_group or "point" not in record.inputs.parameters:
            return
        number = json.loads(record.inputs.parameters["point"])["point"]
        with unbroken():
            if number not in self._sweep.runs:
                self._open[number] = self._sweep.begin(number, pipeline_run=run.id, step=record.id)
            if record.log:
                self._left[number] = Left.under(Path(record.log).parent)
            if record.status not in ("running", "cancelled") and number in self._open:
                self._end(number, record.reason)

    def give_up(self, number: int, reason: str) -> None:
        """Fail a point that nothing was heard of."""
        if number not in self._sweep.runs:
            self._sweep.fail(number, self._sweep.begin(number), failed("NotStarted", reason))

    def cancel(self) -> None:
        """Mark the points that were stopped."""
        with unbroken():
            for number, started in self._open.items():
                self._sweep.cancel(started, self._left.get(number, NOTHING))

    def _end(self, number: int, reason: str) -> None:
        started = self._open.pop(number)
        outcome = read_outcome(self._sweep.plan.packed.settings, self._sweep.parent.row.id, number)
        if outcome is None:
            left = self._left.get(number, NOTHING)
            self._sweep.fail(number, started, failed("StepFailed", reason), left)
        else:
            self._sweep.end(number, started, outcome)


def run_on_kubeflow(sweep: Sweep) -> None:
    """Run the points as a pipeline on Kubeflow and wait for it. Raises SpecError before anything is sent."""
    plan, settings = sweep.plan, sweep.plan.packed.settings
    if "://" not in settings.artifacts_url:
        raise SpecError(
            "a sweep on Kubeflow leaves its results at the artifact URL: set MLFUNCS_ARTIFACTS_URL to one that pods "
            f"and this machine reach, like s3://bucket/artifacts (now: {settings.resolved_artifacts_url!r})"
        )
    run = submit(_pipeline(plan), _parameters(sweep), host=plan.address)
    try:
        _follow(sweep, run)
    except BaseException:
        run.cancel()
        raise
    finally:
        forget_outcomes(settings, sweep.parent.row.id)


def _follow(sweep: Sweep, run: KubeflowRun) -> None:
    """Take in outcomes as they come, until the run is over."""
    settings, sweep_id = sweep.plan.packed.settings, sweep.parent.row.id
    heard = time.monotonic()
    over = False
    while not over:
        try:
            over = run.is_over()  # asked first: what is left when it is over is all there will be
            heard = time.monotonic()
        except Unavailable:
            if time.monotonic() - heard > _AWAY_S:
                raise
        for number in sorted(stored_outcomes(settings, sweep_id) - set(sweep.runs)):
            outcome = read_outcome(settings, sweep_id, number)
            if outcome is not None:
                with unbroken():
                    sweep.end(number, sweep.begin(number, url=run.url), outcome)
        if not over:
            time.sleep(_POLL_S)
    for number in set(range(len(sweep.plan.points))) - set(sweep.runs):
        cause = f"it left no result; the pipeline {run.status()}: {run.cause()}; see {run.url}"
        sweep.fail(number, sweep.begin(number, url=run.url), failed("StepFailed", cause))


def _pipeline(plan: Plan) -> Pipeline:
    spec = plan.function.spec
    if plan.packed.timeout_s is not None:
        spec = dataclasses.replace(spec, timeout_s=plan.packed.timeout_s)
    return sweep_pipeline(Function(plan.function.target, spec), plan.parallel)


def _parameters(sweep: Sweep) -> dict[str, Any]:
    """The pipeline's parameters: each point as JSON text, which keeps integers and long numbers as they are."""
    plan = sweep.plan
    values = [child_values(plan.packed, arguments) for arguments in plan.arguments]
    shared = {name: document for name, document in values[0].items() if _is_everywhere(name, plan.points)}
    points = [
        json.dumps({"point": number, "values": {name: item for name, item in one.items() if name not in shared}})
        for number, one in enumerate(values)
    ]
    objective = str(plan.objective) if plan.objective else ""
    return {"points": points, "shared": json.dumps(shared), "sweep": sweep.parent.row.id, "objective": objective}


def _is_everywhere(name: str, points: Sequence[dict[str, Any]]) -> bool:
    return not any(name in point for point in points)
