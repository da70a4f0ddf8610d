"""Everything that must be there before the first step starts: environments, Docker, code. All faults at once."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import pickletools
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlfuncs.errors import MlfuncsError, NotFound
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec
from mlfuncs_pipelines.cache import digest_of
from mlfuncs_pipelines.container_images import docker_fault, image_fault
from mlfuncs_pipelines.importer import missing_imports
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.ir_shape import Problem
from mlfuncs_pipelines.lightweight import Lightweight, OurStep, recognise, recognise_step
from mlfuncs_pipelines.messages import Preload
from mlfuncs_pipelines.pod_settings import PodSettings, pod_settings
from mlfuncs_pipelines.validate import InvalidPipeline
from mlfuncs_pipelines.venvs import environment_digest, python_for

Kind = Literal["kfp", "step", "container", "importer"]
_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
# what every step of ours needs, imported once for all
_STEP_MODULES = (
    "mlfuncs_pipelines.step",
    "mlfuncs_pipelines.ports",
    "mlfuncs_pipelines.artifact_files",
    "mlfuncs.bundles.bundle",
    "mlfuncs.bundles.packing",
    "mlfuncs.runs.execution",
    "mlfuncs.interface.validation",
)
_DEFAULT_TIMEOUT_S = FunctionSpec(name="x").timeout_s  # meant for requests; a step has no limit unless one is set


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
    step: OurStep | None = None
    pod: PodSettings = field(default_factory=PodSettings)

    @functools.cached_property
    def versions(self) -> Mapping[str, str]:
        """The digests of the step's code and of its environment."""
        return {
            "code": digest_of(self.code_digest),
            "environment": digest_of([self.environment_digest, dict(self.env)]),
        }


def prepare(
    pipeline: Pipeline, settings: Settings, containers: str, params: Mapping[str, Any] | None = None
) -> dict[str, Plan]:
    """A plan for every executor that a component of `pipeline` uses, with its environment built.

    `containers` is "docker", or "process" to run the commands of containers on this machine without their images.
    Raises InvalidPipeline with everything that is missing, files to import from `params` or constants included.
    """
    labels = sorted({component.executor for component in pipeline.components.values() if component.executor})
    alike = {
        label: json.dumps(pipeline.executors[label], sort_keys=True) for label in labels
    }  # kfp writes one per task
    problems = missing_imports(pipeline, params or {})
    plans = {}
    with ThreadPoolExecutor(max_workers=4) as pool:
        first = {text: label for label, text in reversed(alike.items())}
        futures = {text: pool.submit(_plan, pipeline, label, settings, containers) for text, label in first.items()}
        for label, text in alike.items():
            try:
                plan = futures[text].result()
                pod = PodSettings()
                if plan.kind != "step":  # ours has its secrets in its spec
                    pod = pod_settings(pipeline.executor_platform(label), settings)
                plans[label] = replace(plan, label=label, pod=pod)
                problems += [
                    Problem(f"platforms.kubernetes.{label}", text, "then run it again") for text in pod.missing
                ]
            except MlfuncsError as exc:
                mend = "mend this, then run it again"
                problems.append(Problem(f"deploymentSpec.executors.{label}", str(exc), mend))
        if containers == "docker":
            problems += _missing_images([plan for plan in plans.values() if plan.kind == "container"], pool)
    if problems:
        raise InvalidPipeline(f"pipeline {pipeline.name}", problems)
    return plans


def _missing_images(plans: Sequence[Plan], pool: ThreadPoolExecutor) -> list[Problem]:
    """What keeps the containers of `plans` from running in Docker; images that are not here are pulled."""
    reason = docker_fault() if plans else ""
    if reason:
        mend = "start Docker, or run with --containers process to execute the command here without the image"
        return [
            Problem(
                f"deploymentSpec.executors.{plan.label}",
                f"the step runs in the container {plan.spec.get('image', '')!r} and there is no Docker here ({reason})",
                mend,
            )
            for plan in plans
        ]
    labels = {plan.spec.get("image", ""): plan.label for plan in reversed(plans)}  # by image, the first that has it
    faults = {image: pool.submit(image_fault, image) for image in labels}
    return [
        Problem(
            f"deploymentSpec.executors.{labels[image]}.container.image",
            f"the image {image!r} is not here and cannot be pulled: {fault.result()}",
            "mend its name, or log in to its registry with docker login",
        )
        for image, fault in faults.items()
        if fault.result()
    ]


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
    ours = recognise_step(container)
    if ours is not None:
        return _plan_step(label, container, ours, env, settings)
    command = [container.get("command", []), container.get("args", [])]
    return Plan(label, "container", container, code_digest=[command, container.get("image")], env=env)


def _plan_step(
    label: str, container: Mapping[str, Any], ours: OurStep, env: Mapping[str, str], settings: Settings
) -> Plan:
    """A plan for a decorated function: its bundle opened and verified, its interpreter ready."""
    from mlfuncs.bundles.bundle import open_bundle
    from mlfuncs.secrets import resolve_secrets
    from mlfuncs_pipelines.step import unpack_inline

    try:
        bundle = open_bundle(ours.bundle, settings)
    except NotFound:
        if not ours.inline:
            raise
        unpack_inline(ours.bundle, ours.inline, settings)
        bundle = open_bundle(ours.bundle, settings)
    spec = bundle.manifest.function_spec
    resolve_secrets(spec.secrets, settings)
    environment = tuple(sorted(settings.to_environ().items()))
    return Plan(
        label,
        "step",
        container,
        preload=Preload(
            str(bundle.python()),
            modules=(*_STEP_MODULES, *libraries(bundle.read("code.pkl"), bundle.manifest.lock)),
            path=_own_path(),
            step=json.dumps({"bundle": ours.bundle, "point": ours.point}),
            env=environment,
        ),
        code_digest=ours.bundle,
        environment_digest=bundle.manifest.environment_digest,
        # where the pod finds its things is not where this machine has them
        env={name: value for name, value in env.items() if not name.startswith("MLFUNCS_")},
        timeout_s=step_timeout_s(spec),
        step=ours,
    )


def step_timeout_s(spec: FunctionSpec) -> float | None:
    """How long a step may run, in seconds; None when no limit was set."""
    return None if spec.timeout_s == _DEFAULT_TIMEOUT_S else spec.timeout_s


def libraries(code: bytes, lock: Sequence[str]) -> tuple[str, ...]:
    """The modules of locked distributions that pickled code refers to: worth importing once for all steps."""
    wanted = {line.split("==")[0].lower().replace("_", "-") for line in lock}
    if not wanted:
        return ()
    names = {argument for _, argument, _ in pickletools.genops(code) if isinstance(argument, str)}
    owners = _distributions()
    found = {
        name
        for name in names
        if _MODULE_NAME.fullmatch(name) and wanted & {owner.lower() for owner in owners.get(name.split(".")[0], ())}
    }
    return tuple(sorted(name for name in found if _is_module(name)))


@functools.cache
def _distributions() -> Mapping[str, Sequence[str]]:
    return importlib.metadata.packages_distributions()


def _is_module(name: str) -> bool:
    """Whether there is such a module, found without importing it."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top)
    for part in parts:
        folders = spec.submodule_search_locations if spec else None
        spec = importlib.machinery.PathFinder.find_spec(part, list(folders)) if folders else None
    return spec is not None


def _own_path() -> tuple[str, ...]:
    """Where this mlfuncs is imported from, for a child that may not have it installed."""
    import mlfuncs

    return (str(Path(mlfuncs.__file__).parents[1]), str(Path(__file__).parents[1]))


def kfp_preload(python: Path) -> Preload:
    """The warm process for kfp's lightweight components under `python`."""
    return Preload(str(python), modules=("kfp.dsl.executor",), env=(("_KFP_RUNTIME", "true"),))
