"""A workload as plain Kubernetes objects: one Deployment a revision, one Service an endpoint, and what guards them.

Each revision has a Deployment, a HorizontalPodAutoscaler and a Service of its own. The endpoint's main Service selects
the revision that serves; a split between revisions is a Gateway API HTTPRoute, whose weights are the traffic shares,
since a Service alone cannot weigh. Scaling from zero needs KEDA's HTTP add-on (`keda=True`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlfuncs.serving.rollouts import serving_revision
from mlfuncs_runtime.manifests.workload import (
    PORT,
    PRE_STOP_S,
    Workload,
    container,
    labels,
    metadata,
    placement,
    pod_security,
    volumes,
)

_HTTP_PORT = 80
_DEFAULT_TARGET = 100.0  # Knative's container-concurrency-target-default, used for KEDA too
_DEFAULT_RPS = 200.0  # Knative's requests-per-second-target-default
_CPU_UTILIZATION = 70  # percent of the requested CPU; the same share as Knative's target utilisation


@dataclass(frozen=True)
class KubernetesOptions:
    """What the cluster has: KEDA's HTTP add-on, and a Gateway (name) that HTTPRoutes attach to."""

    keda: bool = False
    host: str = ""  # host name that KEDA's interceptor or the gateway routes by; empty: "<name>.<namespace>"
    gateway: str = ""


def render_kubernetes(workload: Workload, options: KubernetesOptions = KubernetesOptions()) -> list[dict[str, Any]]:
    """All objects of the endpoint with this revision, in the order in which they are applied."""
    objects = [
        _service_account(workload),
        _network_policy(workload),
        _deployment(workload, options),
        _service(workload, workload.revision_name, workload.revision),
        _service(workload, workload.name, serving_revision(workload.traffic, workload.revision)),
        _http_scaled_object(workload, options) if options.keda else _autoscaler(workload),
    ]
    if workload.spec.scale.max > 1:
        objects.append(_disruption_budget(workload))
    if options.gateway:
        objects.append(_http_route(workload, options))
    return objects


def kubernetes_warnings(workload: Workload, options: KubernetesOptions = KubernetesOptions()) -> list[str]:
    """What the spec asks that these objects cannot do, each with the way out."""
    scale, found = workload.spec.scale, []
    if scale.min == 0 and not options.keda:
        found.append(
            "scale.min=0: a HorizontalPodAutoscaler keeps at least 1; install KEDA's HTTP add-on and render with keda"
        )
    if len(workload.traffic) > 1 and not options.gateway:
        found.append(
            "traffic over several revisions needs a Gateway; without one the revision with the largest share gets all"
        )
    if not options.keda and workload.spec.resources.cpu is None:
        found.append("resources.cpu is not set: the autoscaler measures CPU against the request, and 100m is assumed")
    if scale.buffer:
        found.append(f"scale.buffer={scale.buffer}: a cluster keeps no spare replicas; raise scale.min instead")
    return found


def _deployment(workload: Workload, options: KubernetesOptions) -> dict[str, Any]:
    main = container(workload)
    main["resources"].setdefault("requests", {}).setdefault("cpu", "100m")
    main["lifecycle"] = {"preStop": {"sleep": {"seconds": PRE_STOP_S}}}
    pod = {
        "serviceAccountName": workload.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": PRE_STOP_S + math.ceil(workload.drain_s) + 1,
        "securityContext": pod_security(),
        **placement(workload),
        "containers": [main],
        "volumes": volumes(workload),
    }
    spec: dict[str, Any] = {
        "selector": {"matchLabels": selector(workload)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {"metadata": {"labels": labels(workload)}, "spec": pod},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(workload, workload.revision_name),
        "spec": spec,  # without `replicas`: an autoscaler owns that field
    }


def selector(workload: Workload, revision: str | None = None) -> dict[str, str]:
    """The labels that find one revision's pods."""
    return {
        "app.kubernetes.io/name": workload.name,
        "app.kubernetes.io/part-of": workload.project,
        "mlfuncs.dev/revision": revision or workload.revision,
    }


def _service(workload: Workload, name: str, revision: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(workload, name, revision=name != workload.name),
        "spec": {
            "selector": selector(workload, revision),
            "ports": [{"name": "http", "port": _HTTP_PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def _autoscaler(workload: Workload) -> dict[str, Any]:
    scale = workload.spec.scale
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(workload, workload.revision_name),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": workload.revision_name},
            "minReplicas": max(1, scale.min),
            "maxReplicas": scale.max,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {
                        "name": "cpu",
                        "target": {"type": "Utilization", "averageUtilization": _CPU_UTILIZATION},
                    },
                }
            ],
            "behavior": {
                "scaleUp": {"stabilizationWindowSeconds": 0},
                "scaleDown": {"stabilizationWindowSeconds": math.ceil(max(scale.window_s, scale.scale_down_delay_s))},
            },
        },
    }


def _http_scaled_object(workload: Workload, options: KubernetesOptions) -> dict[str, Any]:
    scale = workload.spec.scale
    if scale.metric == "rps":
        metric = {
            "requestRate": {
                "targetValue": math.ceil(scale.target or _DEFAULT_RPS),
                "window": f"{math.ceil(scale.window_s)}s",
            }
        }
    else:
        metric = {"concurrency": {"targetValue": math.ceil(scale.target or scale.concurrency or _DEFAULT_TARGET)}}
    return {
        "apiVersion": "http.keda.sh/v1alpha1",
        "kind": "HTTPScaledObject",
        "metadata": metadata(workload, workload.revision_name),
        "spec": {
            "hosts": [_host(workload, options)],
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": workload.revision_name,
                "service": workload.revision_name,
                "port": _HTTP_PORT,
            },
            "replicas": {"min": scale.min, "max": scale.max},
            "scaledownPeriod": math.ceil(scale.window_s + scale.grace_s),
            "scalingMetric": metric,
        },
    }


def _disruption_budget(workload: Workload) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(workload, workload.revision_name),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector(workload)}},
    }


def _network_policy(workload: Workload) -> dict[str, Any]:
    """Requests come in on the one port; what the function calls is its own affair."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(workload, workload.name, revision=False),
        "spec": {
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": workload.name}},
            "policyTypes": ["Ingress"],
            "ingress": [{"ports": [{"port": PORT, "protocol": "TCP"}]}],
        },
    }


def _service_account(workload: Workload) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(workload, workload.name, revision=False),
        "automountServiceAccountToken": False,
    }


def _http_route(workload: Workload, options: KubernetesOptions) -> dict[str, Any]:
    traffic = dict(workload.traffic) or {workload.revision: 100}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": metadata(workload, workload.name, revision=False),
        "spec": {
            "parentRefs": [{"name": options.gateway}],
            "hostnames": [_host(workload, options)],
            "rules": [
                {
                    "backendRefs": [
                        {"name": f"{workload.name}-{revision}", "port": _HTTP_PORT, "weight": share}
                        for revision, share in sorted(traffic.items())
                    ]
                }
            ],
        },
    }


def _host(workload: Workload, options: KubernetesOptions) -> str:
    return options.host or f"{workload.name}.{workload.namespace}"
