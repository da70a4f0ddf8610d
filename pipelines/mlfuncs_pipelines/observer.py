"""What a run tells while it goes on."""

from __future__ import annotations

from mlfuncs_pipelines.run_log import PipelineRun, StepRecord


class Observer:
    """What is told about a run while it goes on. Every method may be left as it is."""

    def run_started(self, run: PipelineRun) -> None:
        """The run begins."""

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        """A step or group started or ended."""

    def attempt_failed(self, run: PipelineRun, record: StepRecord) -> None:
        """An attempt of a step failed, and the step will be tried again."""

    def step_logged(self, record: StepRecord, text: str) -> None:
        """A step printed `text`, which may end within a line."""

    def run_ended(self, run: PipelineRun) -> None:
        """The run is over."""
