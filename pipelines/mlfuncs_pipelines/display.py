"""What a person sees of a pipeline run: lines in a terminal or log."""

from __future__ import annotations

import sys
from typing import IO

from mlfuncs_pipelines.engine import Observer
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord


class LineObserver(Observer):
    """One line per event, and every line that a step prints with the step's id before it."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._partial: dict[str, str] = {}

    def run_started(self, run: PipelineRun) -> None:
        self._print(f"run {run.id}")

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if record.is_group and record.status in ("running", "succeeded"):
            return
        self._flush(record)
        parts = [f"{record.id}: {record.status}"]
        if record.status == "running" and record.attempt:
            parts.append(f"attempt {record.attempt + 1}")
        if record.cached or record.resumed:
            parts.append("cached" if record.cached else "done before")
        elif record.status in ("succeeded", "failed") and not record.is_group:
            parts.append(f"{record.duration_s:.2f} s, {record.max_rss_mib:.0f} MiB")
        if record.reason:
            parts.append(record.reason)
        self._print(", ".join(parts))

    def step_logged(self, record: StepRecord, text: str) -> None:
        *lines, rest = (self._partial.pop(record.id, "") + text).split("\n")
        for line in lines:
            self._print(f"[{record.id}] {line}")
        if rest:
            self._partial[record.id] = rest

    def run_ended(self, run: PipelineRun) -> None:
        ending = f": {run.error}" if run.error else ""
        self._print(f"run {run.id}: {run.status} in {run.duration_s:.2f} s{ending}")
        if run.status != "succeeded":
            self._print(f"resume it with: mlfuncs pipeline resume {run.id}")

    def _flush(self, record: StepRecord) -> None:
        rest = self._partial.pop(record.id, "")
        if rest:
            self._print(f"[{record.id}] {rest}")

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def observers_here() -> list[Observer]:
    """What shows a run that Python code started: lines on standard output."""
    return [LineObserver(sys.stdout)]
