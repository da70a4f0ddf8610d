"""A finished local run in the user's hands: outputs as Python values, steps, logs, and what a notebook shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import NotFound, RunFailed
from mlfuncs.settings import Settings, read_settings
from mlfuncs_pipelines.engine import Options
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord
from mlfuncs_pipelines.runner import check_same, resume_run, run_pipeline

if TYPE_CHECKING:
    from mlfuncs_pipelines.ir import Pipeline as IrPipeline
    from mlfuncs_pipelines.pipeline import Pipeline


class LocalRun:
    """One run of a pipeline on this machine."""

    def __init__(self, run: PipelineRun, pipeline: IrPipeline, settings: Settings) -> None:
        self.record = run
        self._pipeline, self._settings = pipeline, settings

    @property
    def id(self) -> str:
        """The run's id, by which it is resumed or debugged."""
        return self.record.id

    @property
    def status(self) -> str:
        """succeeded, failed or cancelled."""
        return self.record.status

    @property
    def outputs(self) -> dict[str, Any]:
        """The pipeline's outputs by name; an artifact is read back as the value it was."""
        return {name: self._value(value) for name, value in self.record.outputs.items()}

    @property
    def output(self) -> Any:
        """The one output, or None when the pipeline has none."""
        return next(iter(self.outputs.values()), None)

    @property
    def steps(self) -> Mapping[str, StepRecord]:
        """What became of each step and group, by id."""
        return self.record.steps

    def step(self, name: str) -> StepRecord:
        """The step with this id, or the only one of a task of this name. Raises NotFound."""
        if name in self.record.steps:
            return self.record.steps[name]
        found = [step for step in self.record.steps.values() if step.task == name]
        if len(found) == 1:
            return found[0]
        raise NotFound("step", name, self.record.steps)

    def value(self, step: str, output: str = "Output") -> Any:
        """One output of a step as the Python value it was."""
        record = self.step(step)
        if output in record.outputs.parameters:
            return record.outputs.parameters[output]
        if output not in record.outputs.artifacts:
            raise NotFound("output", output, [*record.outputs.parameters, *record.outputs.artifacts])
        artifacts = record.outputs.artifacts[output]
        return self._value(artifacts[0] if len(artifacts) == 1 else artifacts)

    def logs(self, step: str) -> str:
        """What a step printed."""
        try:
            with open(self.step(step).log, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def explain(self) -> dict[str, str]:
        """Step id to "hit" or why it would miss, if the pipeline ran again now."""
        from mlfuncs_pipelines.explain import explain

        return explain(self.record, self._settings)

    def compare(self, other: LocalRun) -> list[dict[str, object]]:
        """What differs between this run and `other`, as rows of step, what, first and second."""
        from mlfuncs_pipelines.drawing import compare

        return compare(self.record, other.record)

    def gantt(self) -> str:
        """The steps over time, as SVG."""
        from mlfuncs_pipelines.drawing import gantt_svg

        return gantt_svg(self.record)

    def _repr_html_(self) -> str:
        from mlfuncs_pipelines.drawing import run_html

        return run_html(self._pipeline, self.record)

    def __repr__(self) -> str:
        return f"<pipeline run {self.id} {self.status}>"

    def _value(self, value: Any) -> Any:
        from mlfuncs_pipelines.artifact_files import read_artifact

        if isinstance(value, list) and value and all(_is_artifact(item) for item in value):
            return [self._value(item) for item in value]
        return read_artifact(value, None, self._settings) if _is_artifact(value) else value


def run_here(pipeline: Pipeline, params: Mapping[str, Any], options: Options, resume: str = "") -> LocalRun:
    """Run a pipeline, or go on with the run `resume` with the present code. Raises RunFailed when it fails.

    Raises Conflict when `resume` is a run of another pipeline, was given other parameters than `params`, or runs.
    """
    from mlfuncs_pipelines.display import observers_here

    settings = read_settings()
    compiled = pipeline.ir
    observers = observers_here(compiled)
    if resume:
        check_same(resume, compiled, params, settings)
        run = resume_run(resume, settings, options, observers, compiled)
    else:
        run = run_pipeline(compiled, params, settings, options, observers)
    if run.status != "succeeded":
        raise RunFailed(failure_text(run), run.id)
    return LocalRun(run, compiled, settings)


def failure_text(run: PipelineRun) -> str:
    """Why the run failed: the step, its traceback and inputs, and how to go on."""
    failed = next((s for s in run.steps.values() if s.status == "failed" and not s.is_group), None)
    if failed is None:
        return f"pipeline run {run.id} failed: {run.error}"
    given = ", ".join(f"{name}={value!r}" for name, value in failed.inputs.parameters.items()) or "nothing"
    return (
        f"pipeline run {run.id} failed at step {failed.id}: {failed.reason}\n{failed.traceback}"
        f"inputs: {given}\nlog: {failed.log}\n"
        f"rerun the step under a debugger: mlfuncs pipeline debug {run.id} {failed.id}\n"
        f"go on from here: mlfuncs pipeline resume {run.id}, or, once the code is mended, "
        f"{run.pipeline}.run(resume={run.id!r})"
    )


def _is_artifact(value: Any) -> bool:
    return isinstance(value, dict) and {"uri", "type", "metadata"} <= set(value)
