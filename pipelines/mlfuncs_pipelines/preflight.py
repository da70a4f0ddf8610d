"""Everything that must be there before the first step starts: environments, Docker, code. All faults at once."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlfuncs.errors import MlfuncsError
from mlfuncs.settings import Settings
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.ir_shape import Problem
from mlfuncs_pipelines.lightweight import Lightweight, recognise
from mlfuncs_pipelines.validate import InvalidPipeline
from mlfuncs_pipelines.venvs import environment_digest, python_for
from mlfuncs_pipelines.workers import Preload

Kind = Literal["kfp", "container", "importer"]
_DOCKER_TIMEOUT_S = 10


@dataclass(frozen=True)
class Plan:
    """How one executor of the pipeline runs here."""

    label: str
    kind: Kind
    spec: Mapping[str, Any]  # the executor's container or importer
    lightweight: Lightweight | None = None
    preload: Preload | None = None
    code_digest: Any = None  # JSON that decides the step's code and environment
    environment_digest: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    warnings: tuple[str, ...] = ()


def prepare(pipeline: Pipeline, settings: Settings, containers: str) -> dict[str, Plan]:
    """A plan for every executor that a component of `pipeline` uses, with its environment built.

    `containers` is "docker", or "process" to run the commands of containers on this machine without their images.
    Raises InvalidPipeline with everything that is missing.
    """
    labels = sorted({component.executor for component in pipeline.components.values() if component.executor})
    problems: list[Problem] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = {label: pool.submit(_plan, pipeline, label, settings, containers) for label in labels}
        plans = {}
        for label, future in futures.items():
            try:
                plans[label] = future.result()
                if plans[label].kind == "container" and containers == "docker":
                    require_docker(plans[label].spec.get("image", ""))
            except MlfuncsError as exc:
                mend = "mend this, then run it again"
                problems.append(Problem(f"deploymentSpec.executors.{label}", str(exc), mend))
    if problems:
        raise InvalidPipeline(f"pipeline {pipeline.name}", problems)
    return plans


def _plan(pipeline: Pipeline, label: str, settings: Settings, containers: str) -> Plan:
    executor = pipeline.executors[label]
    if "importer" in executor:
        return Plan(label, "importer", executor["importer"])
    container = executor["container"]
    env = {item["name"]: item.get("value", "") for item in container.get("env", [])}
    component = recognise(executor)
    if component is not None:
        python = python_for(component, settings)
        return Plan(
            label,
            "kfp",
            container,
            lightweight=component,
            preload=kfp_preload(python),
            code_digest=[component.source, component.function, component.image],
            environment_digest=environment_digest(component),
            env=env,
        )
    command = [container.get("command", []), container.get("args", [])]
    return Plan(label, "container", container, code_digest=[command, container.get("image")], env=env)


def kfp_preload(python: Path) -> Preload:
    """The warm process for kfp's lightweight components under `python`."""
    return Preload(str(python), modules=("kfp.dsl.executor",), env=(("_KFP_RUNTIME", "true"),))


def require_docker(image: str) -> None:
    """Return when a Docker Engine answers. Raises MlfuncsError that says what to do otherwise."""
    reason = _docker_fault()
    if reason:
        raise MlfuncsError(
            f"the step runs in the container {image!r} and there is no Docker here ({reason}): start Docker, or run "
            "with --containers process to execute the command on this machine without the image"
        )


@functools.cache
def _docker_fault() -> str:
    """Why Docker cannot be used; "" when it can."""
    program = shutil.which("docker")
    if program is None:
        return "no docker program on PATH"
    try:
        done = subprocess.run(
            [program, "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            text=True,
            timeout=_DOCKER_TIMEOUT_S,
        )
    except (subprocess.TimeoutExpired, OSError) as exc:
        return str(exc)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["the engine does not answer"])[0]
