"""What the commands `build` and `render` do: functions to images, and functions to manifests that can be read first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs.decorator import Function
from mlfuncs.errors import NotFound, SpecError
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.settings import Settings
from mlfuncs_runtime.images.builder import BuiltImage, ImageBuilder, Report
from mlfuncs_runtime.images.image import BaseImage, Image, check_reference
from mlfuncs_runtime.manifests.routing import KubernetesOptions
from mlfuncs_runtime.manifests.workload import Workload

TARGETS = ("knative", "kubernetes", "nuclio", "job", "docker", "buildkit", "kaniko")
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """Documents for one target, and what the spec asks that it cannot do."""

    documents: list[Manifest]
    warnings: list[str]
    text: str = ""  # for what is not YAML: a Dockerfile


def build_image(
    functions: Sequence[Function[Any, Any]],
    tag: str | None,
    push: bool,
    settings: Settings,
    report: Report,
    builder: ImageBuilder | None = None,
) -> BuiltImage:
    """The image of these functions, stored under `tag` (default: a name from the functions and the image's digest)."""
    from mlfuncs_runtime.images.function_image import ImageFunction, assemble, wished_base

    if builder is None:
        from mlfuncs_runtime.images.docker_builder import DockerBuilder

        builder = DockerBuilder(settings)
    wanted = check_reference(tag) if tag else ""
    made = [ImageFunction(f.spec.name, f.bundle.digest, RevisionConfig(f.spec)) for f in functions]
    image = assemble(made, builder.base(report, wished_base(made, settings)), settings)
    name = wanted or f"{repository(functions, settings)}:{image.id.removeprefix('sha256:')[:12]}"
    report(f"storing {name}")
    built = builder.store(image, [name])
    if not push:
        return built
    return BuiltImage(**{**built.to_dict(), "repo_digest": builder.push(name, report)})


def build_base(
    tag: str | None, push: bool, python_image: str, extras: Sequence[str], settings: Settings, report: Report
) -> BuiltImage:
    """The base image of this release over `python_image` (default: the official one), with these extras of ours."""
    from mlfuncs_runtime.images.base import find_source
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    name, source = check_reference(tag) if tag else "", find_source()
    source = dataclasses.replace(source, python_image=python_image or source.python_image, extras=tuple(sorted(extras)))
    source.check_extras()
    builder = DockerBuilder(settings)
    base = builder.make_base(source, report)
    if name:
        builder.tag(base.name, name)
    name = name or base.name
    return BuiltImage(name, base.id, base.size_bytes, base.size_bytes, builder.push(name, report) if push else "")


def repository(functions: Sequence[Function[Any, Any]], settings: Settings) -> str:
    """The repository that an image of these functions goes to when no tag is given."""
    prefix = settings.image_registry.rstrip("/") or "mlfuncs"
    return f"{prefix}/{settings.project}-{'-'.join(f.spec.name for f in functions)}"


def render(function: Function[Any, Any], target: str, settings: Settings, image: str = "") -> Rendered:
    """What `deploy` would apply for a first revision. Raises NotFound for an unknown target."""
    if target not in TARGETS:
        raise NotFound("target to render", target, TARGETS)
    name = image or f"{repository([function], settings)}:{function.version[:12]}"
    spec = function.spec
    workload = Workload(
        spec.name, settings.project, "rev-1", name, spec, settings.kubernetes_namespace, {"rev-1": 100},
        drain_s=min(spec.timeout_s, 3600.0),
    )  # fmt: skip
    if target == "knative":
        from mlfuncs_runtime.manifests.knative import knative_warnings, render_knative

        return Rendered(render_knative(workload), knative_warnings(workload))
    if target == "kubernetes":
        from mlfuncs_runtime.manifests.kubernetes import kubernetes_warnings, render_kubernetes

        options = KubernetesOptions.of(settings)
        return Rendered(render_kubernetes(workload, options), kubernetes_warnings(workload, options))
    if target == "nuclio":
        return _nuclio(function, workload, settings)
    if target == "job":
        return _run_job(function, name, settings)
    if target == "docker":
        return _docker(function, settings)
    return _job(function, target, name, settings)


def differences(documents: Sequence[Manifest], settings: Settings, cluster: Any = None) -> list[dict[str, Any]]:
    """How the cluster's objects would change, by a dry run of the apply: [{kind, name, change, diff}]."""
    from mlfuncs_runtime.kubernetes.cluster import Cluster, kind_of

    cluster = cluster or Cluster(settings.kubernetes_namespace)
    found = []
    for manifest in documents:
        kind, name = kind_of(manifest), manifest["metadata"]["name"]
        before = cluster.get(kind, name)
        after = cluster.apply(manifest, dry_run=True)
        lines = _diff(before or {}, after)
        change = "create" if before is None else "change" if lines else "none"
        found.append({"kind": kind, "name": name, "change": change, "diff": lines})
    return found


def render_platform(settings: Settings, compose: bool) -> list[Manifest]:
    """The platform's own objects for a namespace, or the compose file for one machine."""
    from mlfuncs_runtime.manifests import platform

    if not compose:
        return platform.render_platform(settings.kubernetes_namespace, KubernetesOptions.of(settings))
    return [platform.render_compose(settings.project)]


def _nuclio(function: Function[Any, Any], workload: Workload, settings: Settings) -> Rendered:
    from mlfuncs_runtime.manifests.nuclio import nuclio_warnings, render_api_gateway, render_nuclio
    from mlfuncs_runtime.nuclio.code import nuclio_code

    code = nuclio_code(function.bundle.digest, settings)
    if not settings.nuclio_gateway:
        return Rendered([render_nuclio(workload, code)], nuclio_warnings(workload))
    gateway = render_api_gateway(workload, f"{workload.name}.{settings.nuclio_gateway}")
    return Rendered([render_nuclio(workload, code, workload.revision_name), gateway], nuclio_warnings(workload))


def _run_job(function: Function[Any, Any], image: str, settings: Settings) -> Rendered:
    """The Job of a run; its order, with the run's id and arguments, is made when it is started."""
    from mlfuncs.runs.elsewhere import Job
    from mlfuncs.runs.isolation import time_limit
    from mlfuncs_runtime.manifests.jobs import RunJob, render_run_job

    spec, job = function.spec, Job("run-id", function.spec.name, settings.kubernetes_namespace)
    made = RunJob(
        job.name, spec.name, settings.project, job.run, job.namespace, image, spec, time_limit(spec, None), {}
    )
    return Rendered([render_run_job(made)], [])


def _docker(function: Function[Any, Any], settings: Settings) -> Rendered:
    """The Dockerfile of the image; the context that it stands in is written by `mlfuncs build --context`."""
    from mlfuncs_runtime.images.context import dockerfile

    return Rendered([], [], dockerfile(_plain_image([function], settings)))


def _plain_image(functions: Sequence[Function[Any, Any]], settings: Settings) -> Image:
    """The image over a base that is only named: no engine is asked."""
    from mlfuncs_runtime.images.function_image import ImageFunction, assemble, wished_base

    made = [ImageFunction(f.spec.name, f.bundle.digest, RevisionConfig(f.spec)) for f in functions]
    return assemble(made, BaseImage(wished_base(made, settings).name(settings), "", (), {}), settings)


def build_context(functions: Sequence[Function[Any, Any]], url: str, settings: Settings) -> int:
    """Write the build context of an image of these functions to `url`, without any engine; its size in bytes."""
    from mlfuncs_runtime.images.context import write_context

    return write_context(_plain_image(functions, settings), url)


def _job(function: Function[Any, Any], tool: str, name: str, settings: Settings) -> Rendered:
    from mlfuncs_runtime.manifests.builds import BuildJob, build_warnings, render_build_job

    if not settings.artifacts_url:
        raise SpecError(f"{tool} reads its context from the artifact URL: set MLFUNCS_ARTIFACTS_URL, e.g. s3://bucket")
    context = (
        f"{settings.artifacts_url.rstrip('/')}/contexts/{function.version}.tar.gz"  # build --context URL writes it
    )
    job = BuildJob(function.spec.name, settings.kubernetes_namespace, context, name)
    return Rendered([render_build_job(job, "kaniko" if tool == "kaniko" else "buildkit")], build_warnings(job))


def _diff(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    import difflib

    old, new = _plain(before).splitlines(), _plain(after).splitlines()
    lines = difflib.unified_diff(old, new, lineterm="", n=1)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def _plain(values: Mapping[str, Any]) -> str:
    """The object without what the cluster keeps for itself."""
    if not values:
        return ""
    metadata = {k: v for k, v in (values.get("metadata") or {}).items() if k in ("name", "labels", "annotations")}
    kept = {k: v for k, v in values.items() if k not in ("metadata", "status")}
    return json.dumps({**kept, "metadata": metadata}, indent=1, sort_keys=True)
