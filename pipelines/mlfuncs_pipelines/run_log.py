"""The durable record of a local run: an append-only file of JSON lines, enough to resume after a kill -9."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.errors import NotFound
from mlfuncs.settings import Settings
from mlfuncs_pipelines.inputs import Values


@dataclass
class StepRecord:
    """What became of one step or group. Times are Unix seconds; memory is the peak resident set of its process."""

    id: str
    task: str
    status: str  # running, succeeded, failed, skipped, upstream_failed, cancelled
    is_group: bool = False
    attempt: int = 0
    started: float = 0.0
    duration_s: float = 0.0
    max_rss_mib: float = 0.0
    cpu_s: float = 0.0
    cached: bool = False
    resumed: bool = False
    reason: str = ""
    traceback: str = ""
    log: str = ""
    journal: str = ""  # file of what the step itself logs
    identity: str = ""  # digest of its code and inputs
    cache_note: str = ""  # why the cache was used or not
    cache_parts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # digests of code and environment
    resources: Mapping[str, Any] = field(default_factory=dict)
    inputs: Values = field(default_factory=Values)
    outputs: Values = field(default_factory=Values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; what is empty is left out."""
        body: dict[str, Any] = {"id": self.id, "task": self.task, "status": self.status}
        for name in (
            "attempt",
            "started",
            "max_rss_mib",
            "cpu_s",
            "cached",
            "resumed",
            "reason",
            "traceback",
            "log",
            "cache_note",
        ):
            if getattr(self, name):
                body[name] = getattr(self, name)
        if self.resources:
            body["resources"] = dict(self.resources)
        if not self.is_group:
            body["duration_s"] = round(self.duration_s, 6)
            body["inputs"] = plain(self.inputs)
            body["outputs"] = plain(self.outputs)
        return body


@dataclass
class PipelineRun:
    """One local run of a pipeline: `status` is running, succeeded, failed or cancelled."""

    id: str
    pipeline: str
    status: str
    params: Mapping[str, Any]
    folder: Path
    started: float
    digest: str = ""  # of the pipeline file
    duration_s: float = 0.0
    inputs: Mapping[str, Any] = field(default_factory=dict)  # `params` and the defaults of those not given
    outputs: Mapping[str, Any] = field(default_factory=dict)
    steps: dict[str, StepRecord] = field(default_factory=dict)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, as `mlfuncs pipeline run --json` prints them."""
        return {
            "run_id": self.id,
            "pipeline": self.pipeline,
            "status": self.status,
            "params": dict(self.params),
            "outputs": dict(self.outputs),
            "steps": [step.to_dict() for step in self.steps.values()],
            "error": self.error,
            "duration_s": round(self.duration_s, 6),
            "folder": str(self.folder),
        }


class RunLog:
    """The journal of one run. One write per line, so that a crash can only cut the last line short."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def append(self, event: str, **fields: Any) -> None:
        """Add one line."""
        line = json.dumps({"event": event, "time": time.time(), **fields})
        os.write(self._file, line.encode() + b"\n")

    def append_started(self, step: StepRecord, folder: str, request: str | None) -> None:
        """Add the line of a step's start, with the request to its process, which is JSON text already."""
        line = json.dumps(
            {"event": "started", "time": time.time(), "id": step.id, "attempt": step.attempt, "folder": folder}
        )
        if request is not None:
            line = f'{line[:-1]}, "request": {request}}}'
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        """Make what was written durable."""
        os.fsync(self._file)
        os.close(self._file)


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The events of the run in `folder`, a line that a crash cut short left out. Raises NotFound."""
    try:
        lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NotFound("pipeline run", folder.name, known_runs(folder.parent)) from None
    return list(_parsed(lines))


def finished_steps(folder: Path) -> dict[str, dict[str, Any]]:
    """The last good end of every step in the run's journal, by step id."""
    return {
        event["id"]: event
        for event in read_journal(folder)
        if event["event"] == "ended" and event["state"] == "succeeded" and "outputs" in event
    }


def runs_folder(settings: Settings) -> Path:
    """Where the runs of this home are kept, one folder each."""
    return settings.home / "pipelines" / "runs"


def known_runs(folder: Path) -> list[str]:
    """The ids of the runs in `folder`, newest first."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if (entry / "journal.jsonl").exists()]
    return [entry.name for entry in sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)]


def step_run_id(run_id: str, step: StepRecord) -> str:
    """The id of the step's row: 20 hex digits, the same when the run is resumed."""
    return hashlib.sha256(f"{run_id}/{step.id}/{step.attempt}".encode()).hexdigest()[:20]


def plain(values: Values) -> dict[str, Any]:
    """Parameters and artifacts as one JSON object; an artifact of one element stands alone."""
    artifacts = {name: items[0] if len(items) == 1 else items for name, items in values.artifacts.items()}
    return {**values.parameters, **artifacts}


def to_json(values: Values) -> dict[str, Any]:
    """The values as a JSON object that `from_json` reads back."""
    return {"parameters": dict(values.parameters), "artifacts": dict(values.artifacts)}


def from_json(body: Mapping[str, Any]) -> Values:
    """The values that `to_json` wrote."""
    return Values(body.get("parameters", {}), body.get("artifacts", {}))


def _parsed(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
