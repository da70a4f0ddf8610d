"""Tracked runs: `run` starts one, `Run` is what came of it, `list_runs` and `compare_runs` look back.

run = train.run(depth=3)                                  # in this process
run = ml.run(train, {"depth": 3}, isolation="process")    # in a process of its own, in the function's environment
run = train.run(target="kubernetes", depth=3)             # as a Job of a cluster; "docker": in a container here
run.metrics["auc"], run.outputs["output"], run.logs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from mlfuncs.display import Table
from mlfuncs.errors import InvalidInput, RunFailed, SpecError
from mlfuncs.registry import Registry, RunRow, open_registry
from mlfuncs.runs.capture import captured
from mlfuncs.runs.comparison import compare
from mlfuncs.runs.execution import execute
from mlfuncs.runs.handle import Run
from mlfuncs.runs.provenance import collect_versions, is_complete, quick_versions
from mlfuncs.runs.reconciling import reconcile
from mlfuncs.runs.recorder import recorder
from mlfuncs.runs.starting import Arguments, Place, Started, begin, check_arguments
from mlfuncs.settings import Settings, read_settings

if TYPE_CHECKING:
    from mlfuncs.decorator import Function
    from mlfuncs.runs.isolation import Supervision

Isolation = Literal["inline", "process"]
Target = Literal["docker", "kubernetes"]
_TARGETS = ("docker", "kubernetes")


def run(
    function: Function[Any, Any] | Callable[..., Any],
    params: Mapping[str, Any] | None = None,
    *,
    isolation: Isolation = "inline",
    target: Target | None = None,
    wait: bool = True,
    timeout_s: float | None = None,
) -> Run:
    """Execute `function` with `params` as a tracked run; `isolation` "process" gives it an interpreter of its own.

    `target` "docker" runs it in a container of this machine, "kubernetes" as a Job of the cluster of KUBECONFIG, which
    goes on when this process ends. A run with either has the function's own environment, its spec's `retries`, and a
    time limit: `timeout_s`, else the spec's when one was set (the default of 60 s is meant for requests). With `wait`
    False it returns at once. Raises RunFailed when the function raises, InvalidInput for arguments that do not fit,
    SpecError for options that do not go together.
    """
    if params is not None and not isinstance(params, Mapping):
        raise InvalidInput(f"params must be a dict of argument names and values, like {{'depth': 3}}, not {params!r}")
    return run_function(function, (), params, isolation=isolation, target=target, wait=wait, timeout_s=timeout_s)


def run_function(
    function: Function[Any, Any] | Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    isolation: Isolation = "inline",
    target: Target | None = None,
    wait: bool = True,
    timeout_s: float | None = None,
    place: Place | None = None,
) -> Run:
    """Like `run`, with positional arguments, and `place` for a run that is part of a pipeline or a sweep."""
    from mlfuncs.decorator import function_of

    where = _where(isolation, target)
    if where == "inline" and (not wait or timeout_s is not None):
        raise SpecError("wait=False and timeout_s need a process of the run's own: add isolation='process' or a target")
    wrapped = function_of(function)
    settings = read_settings()
    arguments = check_arguments(wrapped, args, kwargs or {}, settings)
    place = replace(place or Place(), isolation=where)
    if where == "inline":
        return _run_inline(wrapped, arguments, place, settings)
    if where == "kubernetes":
        from mlfuncs.runs.elsewhere import start_elsewhere as start
    else:
        from mlfuncs.runs.isolation import start_isolated as start

    started, supervision = start(wrapped, arguments, place, settings, timeout_s, where)
    result = Run(started.row, started.registry, settings, supervision)
    return _finished(supervision, result) if wait else result


def _where(isolation: str, target: str | None) -> str:
    if isolation not in ("inline", "process"):
        mend = f"; write target={isolation!r}" if isolation in _TARGETS else ""
        raise SpecError(f"isolation is 'inline' or 'process', not {isolation!r}{mend}")
    if target is None:
        return isolation
    if target not in _TARGETS:
        raise SpecError(f"a run's target is {' or '.join(map(repr, _TARGETS))}, not {target!r}")
    return target


def get_run(run_id: str) -> Run:
    """The run with this id, or the only one whose id starts with it. Raises NotFound."""
    settings = read_settings()
    registry = _reconciled(open_registry(settings), settings)
    return Run(registry.runs.get(run_id), registry, settings)


class RunList(list[Run]):
    """Runs that show as a table."""

    def table(self) -> Table:
        """Id, function, status, start, duration, parameters and metrics of each."""
        return compare(list(self), details=True)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def list_runs(
    function: str | None = None,
    status: str | None = None,
    pipeline: str | None = None,
    *,
    parent: str | None = None,
    limit: int = 100,
    settings: Settings | None = None,
) -> RunList:
    """The newest `limit` runs that match, newest first."""
    settings = settings or read_settings()
    registry = _reconciled(open_registry(settings), settings)
    rows = registry.runs.list(limit=limit, function=function, status=status, pipeline=pipeline, parent_id=parent)
    contents = registry.runs.contents([row.id for row in rows])
    return RunList(Run.of(row, contents[row.id], registry, settings) for row in rows)


def compare_runs(runs: Sequence[Run | str]) -> Table:
    """The runs side by side: parameters that differ, all metrics, the best value of each metric highlighted.

    Takes runs or ids. Best is the highest, or the lowest for a name that says so (loss, error, rmse, ...).
    """
    return compare([get_run(item) if isinstance(item, str) else item for item in runs])


def _run_inline(function: Function[Any, Any], arguments: Arguments, place: Place, settings: Settings) -> Run:
    versions = quick_versions(function.target, function.spec, settings)
    started = begin(function, arguments, place, settings, versions)
    keeper = recorder()
    keeper.watch(started.record)
    if not is_complete(versions):
        keeper.submit(started.row.id, lambda: _keep_versions(started, function, settings))
    try:
        with captured(started.row.id, started.log):
            outcome = execute(
                function.target, arguments.values, function.signature.returns, function.spec, started.active
            )
        started.end(outcome.final)
    finally:
        started.log.close()
        keeper.release(started.record)
    row = _ended(started.row, outcome.final)
    if outcome.raised is None:
        return Run(row, started.registry, settings)
    if isinstance(outcome.raised, KeyboardInterrupt):
        raise outcome.raised
    raise _failure(row) from outcome.raised


def _finished(supervision: Supervision, result: Run) -> Run:
    try:
        supervision.join(None)
    except KeyboardInterrupt:
        supervision.cancel()
        supervision.join(None)
        raise
    row = result.row
    if row.status == "failed":
        raise _failure(row) from RemoteTraceback(result.traceback)
    return result


class RemoteTraceback(Exception):
    """The traceback of another process, as text; the cause of a RunFailed from an isolated run."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _failure(row: RunRow) -> RunFailed:
    error = row.error or {"type": "", "message": "unknown"}
    return RunFailed(
        f"run {row.id} of {row.function!r} failed: {error['type']}: {error['message']}; its logs and traceback: "
        f"ml.get_run({row.id!r})",
        row.id,
    )


def _keep_versions(started: Started, function: Function[Any, Any], settings: Settings) -> None:
    versions = {**started.row.versions, **collect_versions(function.target, function.spec, settings)}
    started.registry.runs.update(started.row.id, versions=versions)


def _ended(row: RunRow, final: Mapping[str, Any]) -> RunRow:
    return replace(row, **{key: value for key, value in final.items() if key != "outputs"})


def _reconciled(registry: Registry, settings: Settings) -> Registry:
    reconcile(registry, settings)
    return registry


__all__ = ["Run", "RunList", "compare_runs", "get_run", "list_runs", "run", "run_function"]
