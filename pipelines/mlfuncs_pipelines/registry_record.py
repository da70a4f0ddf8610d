"""A pipeline run in the registry: one row for the run, one for each step, written beside the run by a thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.journal import read_entries
from mlfuncs.liveness import this_process
from mlfuncs.records import Batch
from mlfuncs.registry import Registry, RunArtifact, RunRow, open_registry
from mlfuncs.settings import Settings
from mlfuncs_pipelines.engine import Observer
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord, step_run_id

_FLUSH_S = 30.0  # how long the end of a run waits for its rows
_STATES = {"upstream_failed": "cancelled", "skipped": "cancelled"}  # what did not run has no status of its own there
log = logging.getLogger(__name__)


class RegistryObserver(Observer):
    """Keeps the rows. A registry that is away loses nothing that the run's own journal does not have."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._work: queue.SimpleQueue[Callable[[Registry], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run_started(self, run: PipelineRun) -> None:
        self._thread = threading.Thread(target=self._write, name="mlfuncs-pipeline-rows", daemon=True)
        self._thread.start()
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
        params = dict(run.params)
        self._work.put(lambda registry: _keep(registry, row, params))

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if record.is_group:
            return
        row = self._row(run, record)
        artifacts = _artifacts(record)
        journal = Path(record.log).parent / "journal.jsonl" if record.log else None
        params = dict(record.inputs.parameters)
        self._work.put(lambda registry: _keep(registry, row, params, artifacts, journal))

    def run_ended(self, run: PipelineRun) -> None:
        outputs = [RunArtifact("output", name, {"value": value}) for name, value in run.outputs.items()]
        error = {"type": "StepFailed", "message": run.error, "traceback": ""} if run.error else None
        values = {"status": run.status, "finished_at": time.time(), "error": error}

        def finish(registry: Registry) -> None:
            registry.runs.finish(run.id, values, artifacts=outputs)

        self._work.put(finish)
        self._work.put(None)
        if self._thread is not None:
            self._thread.join(_FLUSH_S)

    def _row(self, run: PipelineRun, record: StepRecord) -> RunRow:
        ended = record.status != "running"
        failed = record.status == "failed"
        kind, _, message = record.reason.partition(": ")
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
            versions={key: part for key, part in record.cache_parts.items() if key in ("code", "environment")},
            details={"log": record.log, "cached": record.cached, "state": record.status, "note": record.cache_note},
            cpu_s=record.cpu_s or None,
            peak_memory_mib=record.max_rss_mib or None,
        )

    def _write(self) -> None:
        """The thread: one piece of work after the other, until the run is over."""
        registry: Registry | None = None
        while (work := self._work.get()) is not None:
            try:
                registry = registry or open_registry(self._settings)
                work(registry)
            except MlfuncsError as exc:
                log.warning("a pipeline step could not be recorded: %s", exc)


def _keep(
    registry: Registry,
    row: RunRow,
    params: dict[str, Any],
    artifacts: tuple[RunArtifact, ...] = (),
    journal: Path | None = None,
) -> None:
    """Make or update the row, and bring in what the step logged."""
    columns = {name: value for name, value in vars(row).items() if name not in ("id", "project", "created_at")}
    if not registry.runs.update(row.id, **columns):
        registry.runs.create(row, params)
    batch = Batch()
    if journal is not None and row.status != "running":
        for entries, _ in read_entries(journal):
            batch.add(entries)
    if artifacts or not batch.is_empty():
        registry.runs.log(row.id, batch.metrics, batch.params, [*artifacts, *batch.artifacts.values()])


def _artifacts(record: StepRecord) -> tuple[RunArtifact, ...]:
    """The step's inputs and outputs that are kfp artifacts, and its output parameters."""
    found = [
        RunArtifact(role, name, {"value": items[0] if len(items) == 1 else items})
        for role, values in (("input", record.inputs), ("output", record.outputs))
        for name, items in values.artifacts.items()
    ]
    found += [RunArtifact("output", name, {"value": value}) for name, value in record.outputs.parameters.items()]
    return tuple(found)
