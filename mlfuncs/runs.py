"""Tracked runs: `run` starts one, `Run` is what came of it, `list_runs` and `compare_runs` look back.

run = train.run(depth=3)                                  # in this process
run = ml.run(train, {"depth": 3}, isolation="process")    # in a process of its own, in the function's environment
run.metrics["auc"], run.outputs["output"], run.logs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mlfuncs.comparison import compare
from mlfuncs.display import Table, card_html, fold_html, format_duration, format_time, table_html
from mlfuncs.errors import Conflict, DeadlineExceeded, NotFound, RunFailed, SpecError
from mlfuncs.execution import execute
from mlfuncs.provenance import collect_versions, is_complete, quick_versions
from mlfuncs.reconciling import reconcile
from mlfuncs.recorder import recorder
from mlfuncs.registry import MetricPoint, Registry, RunContents, RunRow, open_registry
from mlfuncs.registry.runs import ACTIVE
from mlfuncs.run_output import captured
from mlfuncs.settings import Settings, read_settings
from mlfuncs.starting import Arguments, Place, Started, begin, check_arguments
from mlfuncs.values import as_handle

if TYPE_CHECKING:
    from mlfuncs.decorator import Function
    from mlfuncs.isolation import Supervision

Isolation = Literal["inline", "process"]
_POLL_S = 0.2


class Run:
    """One execution of a function; what it shows is read from the registry when asked for."""

    def __init__(self, row: RunRow, registry: Registry, settings: Settings) -> None:
        self._row, self._registry, self._settings = row, registry, settings
        self._contents: RunContents | None = None
        self._supervision: Supervision | None = None

    @property
    def id(self) -> str:
        """20 hex digits; runs sort by it in the order they were made."""
        return self._row.id

    @property
    def function(self) -> str:
        """The function's name."""
        return self._row.function

    @property
    def status(self) -> str:
        """ "pending", "running", "succeeded", "failed" or "cancelled"."""
        return self._fresh().status

    @property
    def params(self) -> dict[str, Any]:
        """The arguments and logged parameters; what is not plain JSON is described as text."""
        return dict(self._read().params)

    @property
    def outputs(self) -> dict[str, Any]:
        """What the function returned: one `Artifact` or plain value per field of a NamedTuple, else "output"."""
        return self._handles("output")

    @property
    def output(self) -> Any:
        """The one value that the function returned, loaded; a dict of them for a NamedTuple, None for none."""
        values = {name: getattr(value, "load", lambda v=value: v)() for name, value in self.outputs.items()}
        return values if len(values) > 1 else next(iter(values.values()), None)

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric."""
        return dict(self._read().metrics)

    @property
    def artifacts(self) -> dict[str, Any]:
        """What `log_artifact` kept, by name."""
        return self._handles("logged")

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments that were artifacts, by name."""
        return self._handles("input")

    @property
    def logs(self) -> str:
        """What the run printed so far; empty when it printed nothing, or was on another machine."""
        try:
            with open(self._row.details.get("log", ""), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    @property
    def duration_s(self) -> float | None:
        """Seconds from start to end, or until now; None when it has not started."""
        row = self._fresh()
        return None if row.started_at is None else (row.finished_at or time.time()) - row.started_at

    @property
    def cpu_s(self) -> float | None:
        """CPU seconds; see `mlfuncs.usage` for whose."""
        return self._fresh().cpu_s

    @property
    def peak_memory_mib(self) -> float | None:
        """The highest resident memory in MiB; see `mlfuncs.usage` for whose."""
        return self._fresh().peak_memory_mib

    @property
    def error(self) -> str | None:
        """Why it failed, as "Type: message"; None when it did not."""
        error = self._fresh().error
        return f"{error['type']}: {error['message']}".removesuffix(": ") if error else None

    @property
    def traceback(self) -> str:
        """The user's traceback of a failed run; empty when there is none."""
        return (self._fresh().error or {}).get("traceback", "")

    @property
    def versions(self) -> dict[str, Any]:
        """Digests of code, bundle (isolated runs), environment and data, git commit and whether files were changed."""
        recorder().settle(self.id)
        self._row = self._registry.runs.get(self.id)
        return dict(self._row.versions)

    @property
    def row(self) -> RunRow:
        """The registry's row: kind, isolation, attempt, parent, pipeline, step, times and owner."""
        return self._fresh()

    def metric_history(self, name: str) -> list[MetricPoint]:
        """Every value of a metric in the order logged (`.value`, `.step`, `.at`). Raises NotFound."""
        self._fresh()
        points = self._registry.runs.metric_history(self.id, name)
        if not points:
            raise NotFound("metric", name, self.metrics)
        return points

    def children(self) -> list[Run]:
        """The runs that this one started, oldest first."""
        return list(reversed(list_runs(parent=self.id, limit=10_000, settings=self._settings)))

    def wait(self, timeout_s: float | None = None) -> Run:
        """This run, once it has ended. Raises DeadlineExceeded when it has not after `timeout_s`."""
        if self._supervision is not None:
            self._supervision.join(timeout_s)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.status in ACTIVE:
            if deadline is not None and time.monotonic() >= deadline:
                raise DeadlineExceeded(f"run {self.id} of {self.function!r} has not ended after {timeout_s} s")
            time.sleep(_POLL_S)
        return self

    def cancel(self) -> Run:
        """This run, cancelled; one that has ended stays as it is. Raises Conflict for a run inside another process."""
        if self.status not in ACTIVE:
            return self
        if self._supervision is None:
            raise Conflict(
                f"run {self.id} of {self.function!r} belongs to process {(self._row.owner or {}).get('pid')}: "
                "interrupt it there (Ctrl-C, or the notebook's stop button)"
            )
        self._supervision.cancel()
        return self.wait()

    def __repr__(self) -> str:
        return f"<run {self.id} of {self.function!r}: {self._fresh().status}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def _repr_html_(self) -> str:
        row = self._fresh()
        facts = {
            "run": row.id,
            "started": format_time(row.started_at),
            "took": format_duration(self.duration_s),
            "peak memory": row.peak_memory_mib and f"{row.peak_memory_mib:.1f} MiB",
            "error": self.error,
        }
        parts = []
        named = {
            "parameters": self.params,
            "metrics": self.metrics,
            "outputs": self.outputs,
            "artifacts": self.artifacts,
        }
        for title, values in named.items():
            if values:
                parts.append(table_html([values], list(values), caption=title))
        folds = fold_html("traceback", self.traceback) + fold_html("log", self.logs[-20_000:])
        return card_html(row.function, row.status, facts, "".join(parts) + folds)

    def _handles(self, role: str) -> dict[str, Any]:
        documents = self._read().artifacts.get(role, {})
        return {name: as_handle(document, self._settings) for name, document in documents.items()}

    def _fresh(self) -> RunRow:
        if self._row.status in ACTIVE:
            self._row = _reconciled(self._registry, self._settings).runs.get(self.id)
        return self._row

    def _read(self) -> RunContents:
        ended = self._fresh().status not in ACTIVE
        if self._contents is not None:
            return self._contents
        contents = self._registry.runs.contents([self.id])[self.id]
        if ended:  # nothing of it changes any more
            self._contents = contents
        return contents


def run(
    function: Function[Any, Any] | Callable[..., Any],
    params: Mapping[str, Any] | None = None,
    *,
    isolation: Isolation = "inline",
    wait: bool = True,
    timeout_s: float | None = None,
) -> Run:
    """Execute `function` with `params` as a tracked run; `isolation` "process" gives it an interpreter of its own.

    An isolated run has the function's own environment, its spec's `retries`, and a time limit: `timeout_s`, else the
    spec's when one was set (the default of 60 s is meant for requests). With `wait` False it returns at once.
    Raises RunFailed when the function raises, InvalidInput for arguments that do not fit, SpecError for options that
    do not go together.
    """
    return run_function(function, (), params, isolation=isolation, wait=wait, timeout_s=timeout_s)


def run_function(
    function: Function[Any, Any] | Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    isolation: Isolation = "inline",
    wait: bool = True,
    timeout_s: float | None = None,
    place: Place | None = None,
) -> Run:
    """Like `run`, with positional arguments, and `place` for a run that is part of a pipeline or a sweep."""
    from dataclasses import replace

    from mlfuncs.decorator import function_of

    if isolation not in ("inline", "process"):
        raise SpecError(f"isolation is 'inline' or 'process', not {isolation!r}")
    if isolation == "inline" and (not wait or timeout_s is not None):
        raise SpecError("wait=False and timeout_s need a process of the run's own: add isolation='process'")
    wrapped = function_of(function)
    settings = read_settings()
    arguments = check_arguments(wrapped, args, kwargs or {}, settings)
    place = replace(place or Place(), isolation=isolation)
    if isolation == "process":
        from mlfuncs.isolation import start_isolated

        started, supervision = start_isolated(wrapped, arguments, place, settings, timeout_s)
        result = Run(started.row, started.registry, settings)
        result._supervision = supervision
        return _finished(supervision, result) if wait else result
    return _run_inline(wrapped, arguments, place, settings)


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
    runs = RunList(Run(row, registry, settings) for row in rows)
    for item in runs:
        if item._row.status not in ACTIVE:
            item._contents = contents[item.id]
    return runs


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
        started.record.finish(outcome.final)
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
    from dataclasses import replace

    return replace(row, **{key: value for key, value in final.items() if key != "outputs"})


def _reconciled(registry: Registry, settings: Settings) -> Registry:
    reconcile(registry, settings)
    return registry


__all__ = ["Run", "RunList", "compare_runs", "get_run", "list_runs", "run", "run_function"]
