"""Run a pipeline on this machine: the entry that the SDK, the CLI and the tests share."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlfuncs.errors import Conflict, NotFound, SpecError
from mlfuncs.settings import Settings, ensure_home
from mlfuncs_pipelines.engine import Engine, Observer, Options
from mlfuncs_pipelines.inputs import complete_run
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.lineage import LineageObserver
from mlfuncs_pipelines.placeholders import uses
from mlfuncs_pipelines.preflight import Plan, prepare
from mlfuncs_pipelines.registry_record import RegistryObserver
from mlfuncs_pipelines.run_lock import sole_engine
from mlfuncs_pipelines.run_log import PipelineRun, read_journal, runs_folder
from mlfuncs_pipelines.worker_pool import close_workers, worker_pool

__all__ = ["check_same", "close_workers", "resume_run", "run_pipeline"]


def run_pipeline(
    pipeline: Pipeline,
    params: Mapping[str, Any],
    settings: Settings,
    options: Options | None = None,
    observers: Sequence[Observer] = (),
) -> PipelineRun:
    """Run `pipeline` with `params` and return the finished run, failed or not.

    Raises InvalidInput for parameters that do not fit and InvalidPipeline with all that is missing, before any step.
    """
    ensure_home(settings)
    run_id = f"{pipeline.name or 'pipeline'}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    folder = runs_folder(settings) / run_id
    started = time.time()
    run = PipelineRun(run_id, pipeline.name, "running", dict(params), folder, started, pipeline.digest)
    return _execute(pipeline, run, settings, options or Options(), observers)


def resume_run(
    run_id: str,
    settings: Settings,
    options: Options | None = None,
    observers: Sequence[Observer] = (),
    present: Pipeline | None = None,
) -> PipelineRun:
    """Go on with a run that failed or was killed: steps that ended well are not run again.

    It has the code that it began with, or `present`, the pipeline as it is now: then steps whose code or inputs have
    changed run as well. Raises NotFound for an unknown run and Conflict for one that still runs.
    """
    stored, params = _begun(run_id, settings)
    pipeline = present or stored
    folder = runs_folder(settings) / run_id
    run = PipelineRun(run_id, pipeline.name, "running", params, folder, time.time(), pipeline.digest)
    options = replace(options or Options(), resume=True, changed=pipeline.digest != stored.digest)
    return _execute(pipeline, run, settings, options, observers)


def check_same(run_id: str, pipeline: Pipeline, params: Mapping[str, Any], settings: Settings) -> None:
    """Raise Conflict when the run is one of another pipeline, or was given other values than `params` has."""
    earlier, taken = _begun(run_id, settings)
    if earlier.name != pipeline.name:
        raise Conflict(
            f"run {run_id} is one of pipeline {earlier.name}, not of {pipeline.name}; resume it with that pipeline"
        )
    before = complete_run(taken, earlier).parameters
    now = complete_run({**taken, **params}, pipeline).parameters
    differing = [name for name in params if json.dumps(before.get(name)) != json.dumps(now[name])]
    if differing:
        values = ", ".join(f"{name}={before.get(name)!r}, not {now[name]!r}" for name in differing)
        raise Conflict(f"run {run_id} was given {values}; leave them out to go on with it, or start a new run")


def _begun(run_id: str, settings: Settings) -> tuple[Pipeline, Mapping[str, Any]]:
    """The pipeline of a run that began, and the parameters that it was given. Raises NotFound."""
    folder = runs_folder(settings) / run_id
    first = next((event for event in read_journal(folder) if event["event"] == "run"), None)
    try:
        documents = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        documents = None
    if first is None or documents is None:
        raise NotFound("resumable pipeline run", run_id, hint="it ended before its first step; start it anew")
    return Pipeline.of(documents["spec"], documents["platform"]), first["params"]


def _execute(
    pipeline: Pipeline, run: PipelineRun, settings: Settings, options: Options, observers: Sequence[Observer]
) -> PipelineRun:
    run.inputs = complete_run(run.params, pipeline).parameters  # a wrong value is told before any work
    _check_ignored(options.ignore, pipeline)
    plans = prepare(pipeline, settings, options.containers, run.params)
    run.folder.mkdir(parents=True, exist_ok=True)
    with sole_engine(run.folder):
        return _execute_alone(pipeline, run, plans, settings, options, observers)


def _check_ignored(ignored: Collection[str], pipeline: Pipeline) -> None:
    inputs = {
        name
        for component in pipeline.components.values()
        for name in (*component.input_parameters, *component.input_artifacts)
    }
    unknown = sorted(set(ignored) - inputs)
    if unknown:
        known = ", ".join(sorted(inputs)) or "none"
        raise SpecError(f"ignore: no step of pipeline {pipeline.name} has an input {unknown[0]!r}; inputs: {known}")


def _execute_alone(
    pipeline: Pipeline,
    run: PipelineRun,
    plans: Mapping[str, Plan],
    settings: Settings,
    options: Options,
    observers: Sequence[Observer],
) -> PipelineRun:
    body = {"spec": pipeline.spec, "platform": pipeline.platform}
    (run.folder / "pipeline.json").write_text(json.dumps(body), encoding="utf-8")
    constants = _constants(pipeline, run.id, run.folder)
    kept = [RegistryObserver(settings), LineageObserver(settings.project), *observers]
    with worker_pool() as pool:
        return Engine(pipeline, run, plans, constants, settings, pool, options, kept).execute()


def _constants(pipeline: Pipeline, run_id: str, folder: Path) -> dict[str, str]:
    """The values of kfp's run-wide placeholders."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    constants = {
        "pipeline_job_name": run_id,
        "pipeline_job_resource_name": run_id,
        "pipeline_job_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, run_id)),  # the same when the run is resumed
        "pipeline_root": str(folder),
        "pipeline_job_create_time_utc": now,
        "pipeline_job_schedule_time_utc": now,
    }
    kubernetes = pipeline.platform.get("platforms", {}).get("kubernetes", {})
    if "workspace" in kubernetes.get("pipelineConfig", {}) or uses(dict(pipeline.spec), "workspace_path"):
        workspace = folder / "workspace"
        workspace.mkdir(parents=True, exist_ok=True)
        constants["workspace_path"] = str(workspace)
    return constants
