"""A workload as a Knative Service (serving.knative.dev/v1), scaled by Knative's own autoscaler.

Annotation names and the ranges they take are Knative v1.23's ("Configuring autoscaling" in its docs); `ml.Scale` uses
the same words, so that most fields carry over one to one. `knative_warnings` names what does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlfuncs.spec import Scale
from mlfuncs_runtime.manifests.workload import PORT, Workload, container, labels, metadata, placement, volumes

_PREFIX = "autoscaling.knative.dev/"
_MIN_WINDOW_S, _MAX_WINDOW_S = 6, 3600  # Knative refuses a window outside of this
_MAX_DELAY_S = 3600  # and a scale-down-delay above this
_DEFAULT_GRACE_S = 30.0  # scale-to-zero-grace-period in config-autoscaler
_MAX_TIMEOUT_S = 600  # max-revision-timeout-seconds in config-defaults
_MAX_CONCURRENCY = 1000  # container-concurrency-max-limit in config-defaults
_MIN_TARGET = 0.01
_RESERVED = ("K_CONFIGURATION", "K_REVISION", "K_SERVICE", "PORT")  # variables that Knative sets itself
_VOLUMES = {"configMap", "csi", "emptyDir", "ephemeral", "hostPath", "persistentVolumeClaim", "projected", "secret"}
_FEATURES = {  # pod field -> the flag of config-features that must be on
    "nodeSelector": "kubernetes.podspec-nodeselector",
    "tolerations": "kubernetes.podspec-tolerations",
    "priorityClassName": "kubernetes.podspec-priorityclassname",
    "runtimeClassName": "kubernetes.podspec-runtimeclassname",
    "persistentVolumeClaim": "kubernetes.podspec-persistent-volume-claim",
    "persistentVolumeClaim (writable)": "kubernetes.podspec-persistent-volume-write",
    "hostPath": "kubernetes.podspec-volumes-hostpath",
    "csi": "kubernetes.podspec-volumes-csi",
    "ephemeral": "kubernetes.podspec-volumes-ephemeral",
}


def render_knative(workload: Workload) -> list[dict[str, Any]]:
    """The Service, its traffic split by revision name; one revision with no traffic yet gets all of it."""
    annotations = scale_annotations(workload.spec.scale)
    template = {
        "metadata": {"name": workload.revision_name, "labels": labels(workload), "annotations": annotations},
        "spec": {
            "containerConcurrency": min(workload.spec.scale.concurrency, _MAX_CONCURRENCY),
            "timeoutSeconds": math.ceil(workload.spec.timeout_s),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **placement(workload),
            "containers": [_container(workload)],
            "volumes": volumes(workload),
        },
    }
    service = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": metadata(workload, workload.name, revision=False),
        "spec": {"template": template, "traffic": traffic_targets(workload)},
    }
    return [service]


def scale_annotations(scale: Scale) -> dict[str, str]:
    """The revision's autoscaling annotations."""
    wanted: dict[str, str] = {
        "class": "kpa.autoscaling.knative.dev",
        "metric": scale.metric,
        "min-scale": str(scale.min),
        "max-scale": str(scale.max),
        "initial-scale": str(scale.initial),
        "window": f"{_clamped_window(scale)}s",
    }
    if scale.target is not None:
        wanted["target"] = f"{max(scale.target, _MIN_TARGET):g}"
    if scale.scale_down_delay_s:
        wanted["scale-down-delay"] = f"{min(math.ceil(scale.scale_down_delay_s), _MAX_DELAY_S)}s"
    return {_PREFIX + key: value for key, value in sorted(wanted.items())}


def traffic_targets(workload: Workload) -> list[dict[str, Any]]:
    """The Service's traffic list: whole percentages that sum to 100, and tags that reach one revision alone."""
    traffic = dict(workload.traffic) or {workload.revision: 100}
    targets = [
        {"revisionName": f"{workload.name}-{revision}", "percent": percent, "latestRevision": False}
        for revision, percent in to_percentages(traffic).items()
    ]
    tagged = [
        {"revisionName": f"{workload.name}-{revision}", "percent": 0, "latestRevision": False, "tag": tag}
        for tag, revision in sorted(workload.tags.items())
    ]
    return targets + tagged


def to_percentages(shares: dict[str, int]) -> dict[str, int]:
    """Relative shares as whole percentages that sum to 100, by the largest remainder (Hamilton's method).

    >>> to_percentages({"rev-1": 1, "rev-2": 2})
    {'rev-1': 33, 'rev-2': 67}
    """
    total = sum(shares.values())
    exact = {name: share * 100 / total for name, share in sorted(shares.items())}
    percentages = {name: math.floor(value) for name, value in exact.items()}
    missing = 100 - sum(percentages.values())
    by_remainder = sorted(exact, key=lambda name: (percentages[name] - exact[name], name))
    for name in by_remainder[:missing]:
        percentages[name] += 1
    return percentages


def knative_warnings(workload: Workload) -> list[str]:
    """What the spec asks that a Knative Service cannot say, each with where it is set instead."""
    scale, found = workload.spec.scale, []
    if _clamped_window(scale) != scale.window_s:
        found.append(
            f"scale.window_s={scale.window_s:g}: Knative takes whole seconds from {_MIN_WINDOW_S} to {_MAX_WINDOW_S}"
        )
    if scale.grace_s != _DEFAULT_GRACE_S:
        found.append(
            f"scale.grace_s={scale.grace_s:g}: Knative has it for the whole cluster alone; set "
            "scale-to-zero-grace-period in ConfigMap knative-serving/config-autoscaler"
        )
    if scale.initial == 0:
        found.append(
            "scale.initial=0 needs allow-zero-initial-scale: 'true' in ConfigMap knative-serving/config-autoscaler"
        )
    if scale.buffer:
        found.append(f"scale.buffer={scale.buffer}: Knative keeps no spare replicas; raise scale.min instead")
    if workload.spec.timeout_s > _MAX_TIMEOUT_S:
        found.append(
            f"timeout_s={workload.spec.timeout_s:g} is above {_MAX_TIMEOUT_S} s; raise max-revision-timeout-seconds in "
            "ConfigMap knative-serving/config-defaults"
        )
    if scale.concurrency > _MAX_CONCURRENCY:
        found.append(
            f"scale.concurrency={scale.concurrency}: Knative takes {_MAX_CONCURRENCY} at most, which it gets; for "
            "more, raise container-concurrency-max-limit in ConfigMap knative-serving/config-defaults"
        )
    if scale.target is not None and scale.target < _MIN_TARGET:
        found.append(f"scale.target={scale.target:g}: Knative takes {_MIN_TARGET} and more, which it gets")
    for name in sorted(set(workload.spec.env) & set(_RESERVED)):
        found.append(f"env {name} is Knative's own and is left out: give the variable another name")
    return found + _pod_warnings(workload)


def _pod_warnings(workload: Workload) -> list[str]:
    """What Knative forbids in a pod unless it is told otherwise, or always."""
    volumes = workload.spec.pod.volumes.values()
    kinds = {kind for volume in volumes for kind in volume}
    found = [f"pod.volumes: Knative has no {kind}; use another target" for kind in sorted(kinds - _VOLUMES)]
    used = {*placement(workload), *kinds}
    if any("persistentVolumeClaim" in volume and not _is_read_only(volume) for volume in volumes):
        used.add("persistentVolumeClaim (writable)")
    for field in sorted(used & set(_FEATURES)):
        found.append(f"{field} needs {_FEATURES[field]}: enabled in ConfigMap knative-serving/config-features")
    return found


def _is_read_only(volume: Mapping[str, Any]) -> bool:
    return bool(volume["persistentVolumeClaim"].get("readOnly"))


def _container(workload: Workload) -> dict[str, Any]:
    """The container without what Knative sets itself: the name of the port, the ports of the probes."""
    made = container(workload)
    made["ports"] = [{"containerPort": PORT}]
    made["env"] = [item for item in made["env"] if item["name"] not in _RESERVED]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        made[probe]["httpGet"].pop("port")
    return made


def _clamped_window(scale: Scale) -> int:
    return min(max(math.ceil(scale.window_s), _MIN_WINDOW_S), _MAX_WINDOW_S)
