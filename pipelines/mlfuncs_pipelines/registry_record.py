"""A pipeline run in the registry: one row for the run, one for each step, written beside the run by a thread."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.registry import RunArtifact, RunRow, RunState, open_registry
from mlfuncs.runs.journal import read_entries
from mlfuncs.runs.liveness import this_process
from mlfuncs.runs.records import Batch
from mlfuncs.settings import Settings
from mlfuncs_pipelines.cache import artifact_digest, digest_of
from mlfuncs_pipelines.engine import Observer
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord, step_run_id

_FLUSH_S = 30.0  # how long the end of a run waits for its rows
_PAUSE_S = 0.25  # between two writes
_STATES = {"upstream_failed": "cancelled", "skipped": "cancelled"}  # what did not run has no status of its own there
_FEATURES = "features."  # a parameter that a step logs: the version of the feature table of that name which it read
log = logging.getLogger(__name__)


@dataclass
class _Item:
    """A row on its way: the newest state of one run or step."""

    row: RunRow
    params: dict[str, Any]
    artifacts: tuple[RunArtifact, ...] = ()
    journal: Path | None = None


class RegistryObserver(Observer):
    """Keeps the rows. A registry that is away loses nothing that the run's own journal does not have.

    Rows are made and written a little later, so that a step which starts and ends in the meantime costs one write.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._waiting: dict[str, Callable[[], _Item]] = {}  # by the row's id
        self._changed = threading.Condition()
        self._over = False
        self._thread: threading.Thread | None = None

    def run_started(self, run: PipelineRun) -> None:
        row = RunRow(
            id=run.id,
            project=self._settings.project,
            function=run.pipeline,
            kind="pipeline",
            status="running",
            isolation="process",
            pipeline=run.pipeline,
            created_at=run.started,
            started_at=run.started,
            owner=this_process(),
            versions={"pipeline": run.digest},
            details={"folder": str(run.folder)},
        )
        self._put(run.id, lambda: _Item(row, dict(run.inputs)))
        self._thread = threading.Thread(target=self._write, name="mlfuncs-pipeline-rows", daemon=True)
        self._thread.start()

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if not record.is_group:
            self._put(step_run_id(run.id, record), functools.partial(self._item, run, record))

    attempt_failed = step_changed  # each attempt has a row

    def run_ended(self, run: PipelineRun) -> None:
        error = {"type": "StepFailed", "message": run.error, "traceback": ""} if run.error else None
        row = RunRow(
            id=run.id,
            project=self._settings.project,
            function=run.pipeline,
            kind="pipeline",
            status=run.status,
            isolation="process",
            pipeline=run.pipeline,
            created_at=run.started,
            started_at=run.started,
            finished_at=time.time(),
            owner=this_process(),
            error=error,
            versions={"pipeline": run.digest},
            details={"folder": str(run.folder)},
        )
        outputs = tuple(RunArtifact("output", name, _document(value)) for name, value in run.outputs.items())
        self._put(run.id, lambda: _Item(row, dict(run.inputs), outputs))
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_FLUSH_S)

    def _put(self, row_id: str, item: Callable[[], _Item]) -> None:
        """Have `item` written soon. The thread calls it, so that the engine starts the next step meanwhile."""
        with self._changed:
            self._waiting.pop(row_id, None)
            self._waiting[row_id] = item

    def _item(self, run: PipelineRun, record: StepRecord) -> _Item:
        """The step as it is now; when it changes while this looks, it is put once more."""
        row = self._row(run, record)
        journal = Path(record.journal) if record.journal else None
        return _Item(row, dict(record.inputs.parameters), _artifacts(record), journal)

    def _row(self, run: PipelineRun, record: StepRecord) -> RunRow:
        ended = record.status != "running"
        failed = record.status == "failed"
        kind, _, message = record.reason.partition(": ")
        if not kind.isidentifier():  # not "ValueError: ...", but a sentence
            kind, message = "StepFailed", record.reason
        return RunRow(
            id=step_run_id(run.id, record),
            project=self._settings.project,
            function=record.task,
            kind="step",
            status=_STATES.get(record.status, record.status),
            isolation="process",
            parent_id=run.id,
            pipeline=run.pipeline,
            step=record.id,
            attempt=record.attempt + 1,
            created_at=record.started or run.started,
            started_at=record.started or None,
            finished_at=(record.started or time.time()) + record.duration_s if ended else None,
            owner=this_process(),
            error={"type": kind, "message": message or record.reason, "traceback": record.traceback}
            if failed
            else None,
            versions=dict(record.versions),
            details={"log": record.log, "cached": record.cached, "state": record.status, "note": record.cache_note},
            cpu_s=record.cpu_s or None,
            peak_memory_mib=record.max_rss_mib or None,
        )

    def _write(self) -> None:
        """The thread: write what has come, then wait for more to come."""
        over = False
        while not over:
            with self._changed:
                over = self._over
                items, self._waiting = list(self._waiting.values()), {}
            try:
                if items:
                    open_registry(self._settings).runs.record([_state(item()) for item in items])
            except MlfuncsError as exc:
                log.warning("a pipeline run could not be recorded: %s", exc)
            with self._changed:
                self._changed.wait_for(lambda: self._over, None if over else _PAUSE_S)


def _state(item: _Item) -> RunState:
    """The row with what the step itself logged."""
    batch = Batch()
    if item.journal is not None and item.row.status != "running":
        for entries, _ in read_entries(item.journal):
            batch.add(entries)
    artifacts = [*item.artifacts, *batch.artifacts.values()]
    features = feature_versions(batch.params)
    versions = {**item.row.versions, **_data(item), **({"features": features} if features else {})}
    return RunState(replace(item.row, versions=versions), {**item.params, **batch.params}, batch.metrics, artifacts)


def feature_versions(params: Mapping[str, Any]) -> dict[str, Any]:
    """The feature tables that a run says it read, by view, each with its version."""
    return {name.removeprefix(_FEATURES): version for name, version in params.items() if name.startswith(_FEATURES)}


def _data(item: _Item) -> dict[str, Any]:
    """The digests of the artifacts that a step read, once it is over."""
    if item.row.kind != "step" or item.row.status == "running":
        return {}
    given = {one.name: one.ref["step"] for one in item.artifacts if one.role == "input"}
    data = {
        name: digest_of([artifact_digest(one) for one in (found if isinstance(found, list) else [found])])
        for name, found in given.items()
    }
    return {"data": data} if data else {}


def _artifacts(record: StepRecord) -> tuple[RunArtifact, ...]:
    """The step's inputs and outputs that are kfp artifacts, and its output parameters."""
    found = [
        RunArtifact(role, name, {"step": items[0] if len(items) == 1 else items})
        for role, values in (("input", record.inputs), ("output", record.outputs))
        for name, items in values.artifacts.items()
    ]
    found += [RunArtifact("output", name, {"value": value}) for name, value in record.outputs.parameters.items()]
    return tuple(found)


def _document(value: Any) -> dict[str, Any]:
    """An output of the pipeline: a plain value, or one or several artifacts of its steps."""
    items = value if isinstance(value, list) else [value]
    is_artifact = bool(items) and all(
        isinstance(one, dict) and {"uri", "type", "metadata"} <= set(one) for one in items
    )
    return {"step": value} if is_artifact else {"value": value}
