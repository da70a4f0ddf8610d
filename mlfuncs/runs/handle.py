"""One run as people see it: read from the registry when asked, shown in a notebook."""

from __future__ import annotations

import contextlib
import html
import time
from typing import TYPE_CHECKING, Any

from mlfuncs.display import card_html, fold_html, format_bytes, format_duration, format_time, format_value, table_html
from mlfuncs.errors import Conflict, DeadlineExceeded, MlfuncsError, NotFound
from mlfuncs.registry import MetricPoint, Registry, RunContents, RunRow
from mlfuncs.registry.runs import ACTIVE
from mlfuncs.runs.outputs import Outputs
from mlfuncs.runs.reconciling import reconcile
from mlfuncs.runs.recorder import recorder
from mlfuncs.runs.values import Artifact, StepArtifact, as_handle, open_store
from mlfuncs.settings import Settings

if TYPE_CHECKING:
    from mlfuncs.runs.isolation import Supervision

_POLL_S = 0.2
_COLUMNS = (
    "id", "project", "function", "kind", "status", "isolation", "attempt", "parent_id", "pipeline", "step",
    "started_at", "finished_at", "cpu_s", "peak_memory_mib", "error",
)  # fmt: skip


class Run:
    """One execution of a function; what it shows is read from the registry when asked for."""

    def __init__(
        self, row: RunRow, registry: Registry, settings: Settings, supervision: Supervision | None = None
    ) -> None:
        self._row, self._registry, self._settings = row, registry, settings
        self._supervision = supervision
        self._contents: RunContents | None = None

    @classmethod
    def of(cls, row: RunRow, contents: RunContents, registry: Registry, settings: Settings) -> Run:
        """A run whose contents were read already, with those of many others."""
        run = cls(row, registry, settings)
        if row.status not in ACTIVE:  # else they still change
            run._contents = contents
        return run

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
    def outputs(self) -> Outputs:
        """What the function returned, by name, as `Artifact` or plain value; see `mlfuncs.runs.outputs` for the names.

        A logged artifact is found by its name too when no output has it: `run.outputs["model"]`.
        """
        return Outputs(self._handles("output"), self._handles("logged"))

    @property
    def output(self) -> Any:
        """What the function returned, loaded; a dict when it has named outputs, None when it returned nothing."""
        values = {name: getattr(value, "load", lambda v=value: v)() for name, value in self.outputs.items()}
        return values.get("output") if list(values) in (["output"], []) else values

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
        """What the run printed so far; empty when it printed nothing.

        The log of a run on another machine is readable once it has ended, when the artifact store is a shared one.
        """
        details = self._fresh().details
        try:
            with open(details.get("log", ""), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            kept = details.get("log_digest")
            return open_store(self._settings).read_bytes(kept).decode(errors="replace") if kept else ""

    @property
    def duration_s(self) -> float | None:
        """Seconds from start to end, or until now; None when it has not started."""
        row = self._fresh()
        return None if row.started_at is None else (row.finished_at or time.time()) - row.started_at

    @property
    def cpu_s(self) -> float | None:
        """CPU seconds; see `mlfuncs.runs.usage` for whose."""
        return self._fresh().cpu_s

    @property
    def peak_memory_mib(self) -> float | None:
        """The highest resident memory in MiB; see `mlfuncs.runs.usage` for whose."""
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
        reconcile(self._registry, self._settings)
        rows = self._registry.runs.list(limit=10_000, parent_id=self.id)
        return [Run(row, self._registry, self._settings) for row in reversed(rows)]

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
        if self._supervision is None and "job" in self._row.details:
            from mlfuncs.runs.elsewhere import cancel_elsewhere

            cancel_elsewhere(self._registry, self._settings, self._row)
            return self.wait()
        if self._supervision is None:
            raise Conflict(
                f"run {self.id} of {self.function!r} belongs to process {(self._row.owner or {}).get('pid')}: "
                "interrupt it there (Ctrl-C, or the notebook's stop button)"
            )
        self._supervision.cancel()
        return self.wait()

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON-ready values, for `--json` and the HTTP API; artifacts by digest and kind."""
        row, contents = self._fresh(), self._read()
        return {
            **{
                key: getattr(row, key)
                for key in ("id", "project", "function", "kind", "status", "isolation", "attempt")
            },
            **{key: getattr(row, key) for key in ("parent_id", "pipeline", "step", "started_at", "finished_at")},
            "duration_s": self.duration_s,
            "cpu_s": row.cpu_s,
            "peak_memory_mib": row.peak_memory_mib,
            "error": row.error,
            "versions": self.versions,
            "params": contents.params,
            "metrics": contents.metrics,
            "outputs": contents.artifacts.get("output", {}),
            "artifacts": contents.artifacts.get("logged", {}),
        }

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
        for title, values in {"parameters": self.params, "metrics": self.metrics}.items():
            if values:
                parts.append(table_html([values], list(values), caption=title))
        for title, values in {"outputs": self.outputs, "artifacts": self.artifacts}.items():
            if values:
                rows = [{"name": name, **_shown(value)} for name, value in values.items()]
                columns = [column for column in _SHOWN if any(row.get(column) for row in rows)]
                parts.append(table_html(rows, ["name", *columns], caption=title))
        parts += [_picture(name, value) for name, value in {**self.outputs, **self.artifacts}.items()]
        folds = fold_html("traceback", self.traceback) + fold_html("log", self.logs[-20_000:])
        return card_html(row.function, row.status, facts, "".join(parts) + folds)

    def _handles(self, role: str) -> dict[str, Any]:
        documents = self._read().artifacts.get(role, {})
        return {name: as_handle(document, self._settings) for name, document in documents.items()}

    def _fresh(self) -> RunRow:
        if self._row.status in ACTIVE:
            reconcile(self._registry, self._settings)
            self._row = self._registry.runs.get(self.id)
        return self._row

    def _read(self) -> RunContents:
        ended = self._fresh().status not in ACTIVE
        if self._contents is not None:
            return self._contents
        contents = self._registry.runs.contents([self.id])[self.id]
        if ended:  # nothing of it changes any more
            self._contents = contents
        return contents


_SHOWN = ("value", "kind", "type", "size", "digest")


def _shown(value: Any) -> dict[str, Any]:
    """An output as cells of a table: what it is for an artifact, itself for a plain value."""
    if isinstance(value, Artifact):
        name = value.ref.type_name.rpartition(".")[2]
        return {
            "kind": value.kind,
            "type": name,
            "size": format_bytes(value.ref.size_bytes),
            "digest": value.digest[:12],
        }
    return {"kind": value.kind} if isinstance(value, StepArtifact) else {"value": format_value(value)}


def _picture(name: str, value: Any) -> str:
    """A figure or a classifier's metrics as a titled block; nothing for other values, or when it cannot be read."""
    is_artifact = isinstance(value, Artifact | StepArtifact)
    if not is_artifact or value.kind not in ("figure", "classification_metrics"):
        return ""
    with contextlib.suppress(MlfuncsError):
        return f'<div style="margin:6px 0">{html.escape(name)}<br>{value._repr_html_()}</div>'
    return ""
