"""A run's record from its start to its end: what the journal says, brought into the registry."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.errors import StorageError
from mlfuncs.registry import MetricPoint, Registry, RunArtifact
from mlfuncs.runs.journal import ARTIFACT, ATTEMPT, FINISH, METRIC, PARAMS, Entry, Journal, read_entries
from mlfuncs.settings import Settings


@dataclass
class Batch:
    """Journal entries by what they become; `final` is the last word about the last attempt, or None."""

    metrics: list[MetricPoint] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[tuple[str, str], RunArtifact] = field(default_factory=dict)
    final: dict[str, Any] | None = None

    def add(self, entries: Iterable[Entry]) -> None:
        """Sort more entries in."""
        for entry in entries:
            if entry.kind == METRIC:
                name, value, step, at = entry.fields
                self.metrics.append(MetricPoint(entry.number, name, value, step, at))
            elif entry.kind == PARAMS:
                self.params.update(entry.fields[0])
            elif entry.kind == ARTIFACT:
                self._add_artifact(*entry.fields)
            elif entry.kind == ATTEMPT:
                self.final = None
            elif entry.kind == FINISH:
                self.final = entry.fields[0]
                for name, document in (self.final.get("outputs") or {}).items():
                    self._add_artifact("output", name, document)

    def _add_artifact(self, role: str, name: str, document: dict[str, Any]) -> None:
        digest = document["artifact"]["digest"] if "artifact" in document else None
        self.artifacts[role, name] = RunArtifact(role, name, document, digest)

    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not (self.metrics or self.params or self.artifacts)


class Record:
    """Brings one run's journal into the registry, piece by piece while it runs and whole at its end."""

    def __init__(self, registry: Registry, run_id: str, journal: Journal) -> None:
        self.run_id = run_id
        self.journal = journal
        self._registry = registry
        self._offset = 0
        self._final: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self.is_finished = False  # whether the registry has the run's end

    def drain(self) -> None:
        """Write what was logged since the last time, and the run's end when it could not be written before."""
        with self._lock:
            if self._final is not None:
                self._end(self._final)
            elif not self.is_finished:
                for batch, offset in self._batches():
                    self._write(batch)
                    self._offset = offset

    def heartbeat(self) -> None:
        """Say that the run is alive."""
        self._registry.runs.heartbeat([self.run_id])

    def finish(self, final: dict[str, Any]) -> None:
        """End the run with `final` (columns, and `outputs` documents by name), all at once, and drop the journal.

        The journal is told first, so a database that is away now is told later: by `drain`, or, when this process has
        ended, by whoever reads the run. A full disk is tried again by `drain` too.
        """
        with contextlib.suppress(StorageError):  # the registry may be elsewhere, and is what counts
            self.journal.append(FINISH, final)
        with self._lock:
            self._final = final
            self._end(final)

    def _end(self, final: dict[str, Any]) -> None:
        last = Batch()
        after: int | None = None
        for batch, offset in self._batches():
            if after is not None:
                self._write(last)
                self._offset = after
            last, after = batch, offset
        if last.final is None:  # the journal's disk was full
            last.add([Entry(self._offset, FINISH, [final])])
        keep_final(self._registry, self.run_id, last, final)
        self._final, self.is_finished = None, True
        self.journal.close()
        self.journal.path.unlink(missing_ok=True)

    def _batches(self) -> Iterable[tuple[Batch, int]]:
        for entries, offset in read_entries(self.journal.path, self._offset):
            batch = Batch()
            batch.add(entries)
            yield batch, offset

    def _write(self, batch: Batch) -> None:
        if not batch.is_empty():
            artifacts = list(batch.artifacts.values())
            self._registry.runs.log(self.run_id, batch.metrics, batch.params, artifacts)
            _index(self._registry, artifacts)


def keep_final(
    registry: Registry, run_id: str, batch: Batch, final: dict[str, Any], *, only_active: bool = False
) -> None:
    """Write a run's end with what its journal still held."""
    columns = {key: value for key, value in final.items() if key != "outputs"}
    artifacts = list(batch.artifacts.values())
    if batch.params:
        registry.runs.log(run_id, params=batch.params)
    if registry.runs.finish(run_id, columns, batch.metrics, artifacts, only_active=only_active):
        _index(registry, artifacts)


def journal_path(settings: Settings, run_id: str) -> Path:
    """Where a run's journal is while it has not been brought into the registry whole."""
    return settings.home / "journals" / settings.project / f"{run_id}.jsonl"


def log_path(settings: Settings, run_id: str) -> Path:
    """Where a run's log is."""
    return settings.home / "logs" / "runs" / settings.project / f"{run_id}.log"


def _index(registry: Registry, artifacts: Iterable[RunArtifact]) -> None:
    for artifact in artifacts:
        if "artifact" in artifact.ref:
            registry.artifacts.record(artifact.ref["artifact"])
