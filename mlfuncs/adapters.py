"""The one table of names that resolve to code in other packages, imported on first use.

The core imports neither the runtime, the pipelines nor the feature store: it names them here as strings.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from mlfuncs.errors import MissingExtra, NotFound

# name -> ("package.module:attribute", the extra that brings what it needs)
ADAPTERS: dict[str, tuple[str, str]] = {
    "target:process": ("mlfuncs_runtime.process_target:ProcessTarget", ""),
    "target:docker": ("mlfuncs_runtime.docker.target:DockerTarget", "docker"),
    "target:knative": ("mlfuncs_runtime.kubernetes.knative:KnativeTarget", "kubernetes"),
    "target:kubernetes": ("mlfuncs_runtime.kubernetes.target:KubernetesTarget", "kubernetes"),
    "target:nuclio": ("mlfuncs_runtime.nuclio.target:NuclioTarget", "nuclio"),
    "runs:docker": ("mlfuncs_runtime.docker.job:job_command", "docker"),
    "runs:kubernetes": ("mlfuncs_runtime.kubernetes.runs:KubernetesRuns", "kubernetes"),
    "images:build": ("mlfuncs_runtime.rendering:build_image", "docker"),
    "images:base": ("mlfuncs_runtime.rendering:build_base", "docker"),
    "images:context": ("mlfuncs_runtime.rendering:build_context", ""),
    "manifests:render": ("mlfuncs_runtime.rendering:render", ""),
    "manifests:platform": ("mlfuncs_runtime.rendering:render_platform", ""),
    "manifests:differences": ("mlfuncs_runtime.rendering:differences", "kubernetes"),
    "pipelines:component": ("mlfuncs_pipelines.components:to_component", "pipelines"),
    "pipelines:artifact": ("mlfuncs_pipelines.artifact_files:read_artifact", "pipelines"),
    "pipelines:tracing": ("mlfuncs_pipelines.components:is_tracing", "pipelines"),
    "sweep:process": ("mlfuncs.runs.sweep_lanes:run_in_processes", ""),
    "sweep:dask": ("mlfuncs.runs.sweep_dask:run_on_dask", "dask"),
    "sweep:pipeline": ("mlfuncs_pipelines.sweeps:run_here", "pipelines"),
    "sweep:kubeflow": ("mlfuncs_pipelines.sweeps:run_on_kubeflow", "pipelines"),
    "cli:pipeline": ("mlfuncs_pipelines.cli:pipeline", "pipelines"),
    "cli:features": ("mlfuncs_featurestore.cli:features", "featurestore"),
    "features:reader": ("mlfuncs_featurestore.serving:FeatureReader", "featurestore"),
    "features:redis": ("mlfuncs_featurestore.redis_embedded:ensure_embedded", "featurestore"),
    "features:lend": ("mlfuncs_featurestore.lending:lend", "featurestore"),
    "features:stop": ("mlfuncs_featurestore.redis_embedded:stop_embedded", "featurestore"),
}

# how messages call what a group of adapters does
_GROUPS = {
    "target": "the target {!r}",
    "runs": "the target {!r} of runs",
    "images": "building images",
    "manifests": "rendering manifests",
    "pipelines": "a pipeline",
    "sweep": "the target {!r} of sweeps",
    "cli": "'mlfuncs {}'",
    "features": "the feature store",
}
_CALLED = {"docker": "docker"}  # extra -> the module that its adapters import no sooner than they are called

# public name of the facade -> "package.module:attribute" and its extra
FACADE: dict[str, tuple[str, str]] = {
    "pipeline": ("mlfuncs_pipelines.pipeline:pipeline", "pipelines"),
    "Pipeline": ("mlfuncs_pipelines.pipeline:Pipeline", "pipelines"),
    "Entity": ("mlfuncs_featurestore:Entity", "featurestore"),
    "FeatureView": ("mlfuncs_featurestore:FeatureView", "featurestore"),
    "FeatureService": ("mlfuncs_featurestore:FeatureService", "featurestore"),
    "Aggregation": ("mlfuncs_featurestore:Aggregation", "featurestore"),
    "Expectation": ("mlfuncs_featurestore:Expectation", "featurestore"),
    "FeatureStore": ("mlfuncs_featurestore:FeatureStore", "featurestore"),
    "feature_view": ("mlfuncs_featurestore:feature_view", "featurestore"),
    "on_demand": ("mlfuncs_featurestore:on_demand", "featurestore"),
}


def load(name: str) -> Any:
    """The object that the table names. Raises NotFound for an unknown name, MissingExtra when its extra is absent."""
    if name not in ADAPTERS:
        raise NotFound("adapter", name, ADAPTERS)
    group, _, one = name.partition(":")
    return resolve(*ADAPTERS[name], what=_GROUPS.get(group, group).format(one))


def resolve(path: str, extra: str, what: str) -> Any:
    """The attribute at "package.module:attribute"; a missing third-party module becomes MissingExtra."""
    module_name, _, attribute = path.partition(":")
    if extra in _CALLED and importlib.util.find_spec(_CALLED[extra]) is None:
        raise MissingExtra(f"{what} ({_CALLED[extra]})", extra)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        ours = (exc.name or "").split(".")[0].startswith("mlfuncs")
        if extra and not ours:
            raise MissingExtra(f"{what} ({exc.name})", extra) from exc
        raise
    return getattr(module, attribute)
