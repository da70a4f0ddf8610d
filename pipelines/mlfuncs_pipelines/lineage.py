"""OpenLineage events of a run, as JSON lines in its folder: what read what, and what it made.

The format is OpenLineage 1.0's RunEvent (https://openlineage.io/spec/2-0-2/OpenLineage.json).
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from mlfuncs import __version__
from mlfuncs.runs.journal import read_entries
from mlfuncs.runs.records import Batch
from mlfuncs_pipelines.engine import Observer
from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.registry_record import feature_versions
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord

_PRODUCER = f"urn:mlfuncs:{__version__}"
_SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
_FACETS = "https://openlineage.io/spec/facets"
_EVENTS = {"running": "START", "succeeded": "COMPLETE", "failed": "FAIL", "cancelled": "ABORT"}


class LineageObserver(Observer):
    """Appends to `openlineage.jsonl` beside the run's journal."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._parent: dict[str, Any] = {}
        self._file: TextIO | None = None

    def run_started(self, run: PipelineRun) -> None:
        self._file = (run.folder / "openlineage.jsonl").open("a", encoding="utf-8", buffering=1)
        self._parent = {
            "_producer": _PRODUCER,
            "_schemaURL": f"{_FACETS}/1-0-1/ParentRunFacet.json",
            "run": {"runId": _uuid(run.id)},
            "job": {"namespace": self._namespace, "name": run.pipeline},
        }
        self._write(self._event("START", run.pipeline, _uuid(run.id)))

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if record.is_group or record.status not in _EVENTS:
            return
        name = f"{run.pipeline}.{record.id}"
        event = self._event(_EVENTS[record.status], name, _uuid(f"{run.id}/{record.id}/{record.attempt}"))
        event["run"]["facets"] = {"parent": self._parent}
        tables = self._tables(record) if record.journal and record.status != "running" else []
        event["inputs"] = [*_datasets(record.inputs), *tables]
        event["outputs"] = _datasets(record.outputs)
        self._write(event)

    attempt_failed = step_changed

    def run_ended(self, run: PipelineRun) -> None:
        self._write(self._event(_EVENTS[run.status], run.pipeline, _uuid(run.id)))
        if self._file is not None:
            self._file.close()

    def _event(self, kind: str, name: str, run_id: str) -> dict[str, Any]:
        return {
            "eventType": kind,
            "eventTime": datetime.now(UTC).isoformat(),
            "run": {"runId": run_id},
            "job": {"namespace": self._namespace, "name": name},
            "inputs": [],
            "outputs": [],
            "producer": _PRODUCER,
            "schemaURL": _SCHEMA,
        }

    def _tables(self, record: StepRecord) -> list[dict[str, Any]]:
        """The feature tables that the step read, with their versions."""
        batch = Batch()
        for entries, _ in read_entries(Path(record.journal)):
            batch.add(entries)
        facet = {"_producer": _PRODUCER, "_schemaURL": f"{_FACETS}/1-0-1/DatasetVersionDatasetFacet.json"}
        return [
            {
                "namespace": self._namespace,
                "name": f"features/{view}",
                "facets": {"version": {**facet, "datasetVersion": str(version)}},
            }
            for view, version in feature_versions(batch.params).items()
        ]

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(event) + "\n")


def _datasets(values: Values) -> list[dict[str, Any]]:
    return [
        {"namespace": _namespace(artifact["uri"]), "name": artifact["uri"].split("://", 1)[-1]}
        for artifacts in values.artifacts.values()
        for artifact in artifacts
    ]


def _namespace(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}://{rest.split('/')[0]}" if separator and scheme != "file" else "file"


def _uuid(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, text))
