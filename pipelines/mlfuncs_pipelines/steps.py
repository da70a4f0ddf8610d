"""One step on its way: the folder it writes to, the request its process reads, the outputs it leaves."""

from __future__ import annotations

import functools
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs_pipelines.cache import Key, artifact_digest, digest_of, stamps_of
from mlfuncs_pipelines.executor_io import executor_input
from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.instructions import Step
from mlfuncs_pipelines.ir import Component, Task
from mlfuncs_pipelines.messages import Request
from mlfuncs_pipelines.placeholders import Context, local_path, resolve_command, resolve_value, uses
from mlfuncs_pipelines.preflight import Plan

REQUEST_FILE = "request.json"  # in the step's folder, when the request is not in the run's journal
_MESSAGE_BYTES = 100_000  # a socket takes about 200 KB in one message


@dataclass(frozen=True)
class Prepared:
    """A step with its folder, its inputs as text placeholders left them, and kfp's executor input."""

    step: Step
    plan: Plan
    folder: Path
    inputs: Values
    executor_input: Mapping[str, Any]
    constants: Mapping[str, str]

    @functools.cached_property
    def log(self) -> Path:
        """Where the step's output goes."""
        return self.folder / "log.txt"

    @functools.cached_property
    def error_path(self) -> Path:
        """Where a Python step leaves its exception."""
        return self.folder / "error.json"


def prepare_step(step: Step, plan: Plan, steps_folder: Path, constants: Mapping[str, str]) -> Prepared:
    """Name the step's folder and finish its inputs; nothing is written yet."""
    suffix = f"~try{step.attempt}" if step.attempt else ""
    folder = steps_folder / (step.id + suffix)
    own = {
        **constants,
        "pipeline_task_name": step.task.display_name,
        "pipeline_task_uuid": uuid.uuid4().hex,
    }
    context = Context({"inputs": {"parameterValues": step.inputs.parameters}}, own)
    parameters = {
        name: resolve_value(value, context) if isinstance(value, str) and "{{$" in value else value
        for name, value in step.inputs.parameters.items()
    }
    inputs = Values(parameters, step.inputs.artifacts)
    return Prepared(step, plan, folder, inputs, executor_input(step.component, inputs, folder), own)


def make_folder(prepared: Prepared) -> None:
    """An empty folder for the step; what an interrupted attempt left there goes away."""
    try:
        os.mkdir(prepared.folder)
    except FileNotFoundError:
        os.makedirs(prepared.folder)
    except FileExistsError:
        shutil.rmtree(prepared.folder)
        os.mkdir(prepared.folder)


def make_request(
    prepared: Prepared, containers: str, run_folder: Path, track: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What tells the step's process what to do."""
    request: dict[str, Any] = {
        "log": str(prepared.log),
        "error_path": str(prepared.error_path),
        "cwd": os.getcwd(),
        "python": prepared.plan.preload.python if prepared.plan.preload else "",
        "path": prepared.plan.preload.path if prepared.plan.preload else (),
        "env": resolve_value(dict(prepared.plan.env), _context(prepared)),
    }
    lightweight = prepared.plan.lightweight
    if lightweight is not None:
        request |= {
            "kind": "kfp",
            "source": lightweight.source,
            "function": lightweight.function,
            "module_path": str(prepared.folder / "ephemeral_component.py"),
            "executor_input": prepared.executor_input,
        }
    elif prepared.plan.step is not None:
        request |= {
            "kind": "step",
            "bundle": prepared.plan.step.bundle,
            "point": prepared.plan.step.point,
            "json_inputs": prepared.plan.step.json_inputs,
            "executor_input": prepared.executor_input,
            "track": track,
        }
    else:
        request |= {"kind": "command", "argv": _argv(prepared, containers, run_folder)}
        for output in prepared.executor_input["outputs"]["artifacts"].values():
            Path(output["artifacts"][0]["uri"]).parent.mkdir(parents=True, exist_ok=True)
    return request


def place_request(prepared: Prepared, request: dict[str, Any], environ: Mapping[str, str]) -> Request:
    """The request itself, or the file that it is put into because it is too long for a message."""
    text = json.dumps(request)
    if len(text) < _MESSAGE_BYTES:
        return Request(text, None, prepared.plan.pod.env, environ)
    path = prepared.folder / REQUEST_FILE
    path.write_text(text, encoding="utf-8")
    return Request(None, path, prepared.plan.pod.env, environ)


def container_name(prepared: Prepared) -> str:
    """The name of the step's Docker container."""
    return f"mlfuncs-{prepared.constants['pipeline_task_uuid']}"


def cache_key(prepared: Prepared) -> Key | None:
    """What the step's result depends on; None when the step must always run."""
    step = prepared.step
    has_status = any("taskFinalStatus" in source for source in step.task.parameters.values())
    wanted = step.task.cache and prepared.plan.kind != "importer" and not has_status
    if not wanted or _uses_workspace(prepared, step.task):
        return None
    parts = {**prepared.plan.versions, "interface": digest_of(_interface(step.component))}
    if step.task.cache_key:
        parts["cache key"] = step.task.cache_key
    for name, value in prepared.inputs.parameters.items():
        parts[f"input {name}"] = digest_of(value)
    for name, artifacts in prepared.inputs.artifacts.items():
        parts[f"input {name}"] = digest_of([artifact_digest(artifact) for artifact in artifacts])
    return Key(parts)


def identity(prepared: Prepared) -> str:
    """A digest of the step's code and inputs, for a resumed run: artifacts count by place and time of change.

    Placeholders of the step itself stand for their values, which differ each time.
    """
    step, plan = prepared.step, prepared.plan
    code = [plan.versions, dict(plan.spec) if plan.kind == "importer" else None, _interface(step.component)]
    given = [dict(step.inputs.parameters), dict(step.inputs.artifacts), stamps_of(step.inputs)]
    return digest_of([code, given])


def _uses_workspace(prepared: Prepared, task: Task) -> bool:
    """Whether the step sees the run's shared folder, whose contents no key can hold."""
    if uses(dict(task.parameters), "workspace_path") or uses(dict(prepared.plan.spec), "workspace_path"):
        return True
    workspace = prepared.constants.get("workspace_path")
    return workspace is not None and workspace in json.dumps(dict(prepared.inputs.parameters))


def _interface(component: Component) -> list[Any]:
    outputs = {name: declared.type for name, declared in component.output_parameters.items()}
    artifacts = {name: declared.schema_title for name, declared in component.output_artifacts.items()}
    return [outputs, artifacts]


def _context(prepared: Prepared) -> Context:
    inputs = prepared.step.component.input_artifacts
    lists = frozenset(name for name, declared in inputs.items() if declared.is_list)
    return Context(prepared.executor_input, prepared.constants, lists)


def _argv(prepared: Prepared, containers: str, run_folder: Path) -> list[str]:
    spec = prepared.plan.spec
    command = resolve_command(list(spec.get("command", [])), _context(prepared))
    arguments = resolve_command(list(spec.get("args", [])), _context(prepared))
    if containers == "process":
        return [*command, *arguments] or ["true"]
    mounts = {str(run_folder.parent): "", **_outside(prepared, run_folder.parent)}
    mounts |= dict.fromkeys(prepared.plan.pod.mounts, "")
    words = ["docker", "run", "--rm", "--init", "--name", container_name(prepared)]
    for path, mode in mounts.items():
        words += ["--volume", f"{path}:{path}{mode}"]
    for name, value in resolve_value(dict(prepared.plan.env), _context(prepared)).items():
        words += ["--env", f"{name}={value}"]
    for name in prepared.plan.pod.env:
        words += ["--env", name]  # its value is in the environment of the command
    if command:
        words += ["--entrypoint", command[0]]
    return [*words, spec["image"], *command[1:], *arguments]


def _outside(prepared: Prepared, inside: Path) -> dict[str, str]:
    """Local input artifacts that are not among the runs' own files: mounted read-only."""
    paths = [local_path(one["uri"]) for artifacts in prepared.inputs.artifacts.values() for one in artifacts]
    return {path: ":ro" for path in paths if os.path.exists(path) and not Path(path).is_relative_to(inside)}
