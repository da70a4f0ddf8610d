"""A workload as plain Kubernetes objects: one Deployment a revision, one Service an endpoint, and what guards them.

Each revision has a Deployment, a HorizontalPodAutoscaler and a Service of its own. The endpoint's main Service selects
the revision that serves. Splits and scaling from zero need more than that: see `mlfuncs_runtime.manifests.routing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlfuncs.serving.rollouts import serving_revision
from mlfuncs_runtime.manifests.routing import (
    HTTP_PORT,
    KubernetesOptions,
    http_route,
    interceptor_route,
    interceptor_service,
    scaled_object,
)
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

_CPU_UTILIZATION = 70  # percent of the requested CPU; the same share as Knative's target utilisation


def render_kubernetes(workload: Workload, options: KubernetesOptions = KubernetesOptions()) -> list[dict[str, Any]]:
    """All objects of the endpoint with this revision, in the order in which they are applied."""
    objects = [
        _service_account(workload),
        _network_policy(workload),
        _deployment(workload),
        _service(workload, workload.revision_name, workload.revision),
    ]
    if options.keda:
        objects += [interceptor_service(workload, options), interceptor_route(workload, options)]
        objects.append(scaled_object(workload, options))
    else:
        serving = serving_revision(workload.traffic, workload.revision)
        objects += [_service(workload, workload.name, serving), _autoscaler(workload)]
    if workload.spec.scale.max > 1:
        objects.append(_disruption_budget(workload))
    if options.gateway:
        objects.append(http_route(workload, options))
    return objects


def kubernetes_warnings(workload: Workload, options: KubernetesOptions = KubernetesOptions()) -> list[str]:
    """What the spec asks that these objects cannot do, each with the way out."""
    scale, found = workload.spec.scale, []
    if scale.min == 0 and not options.keda:
        found.append(
            "scale.min=0: a HorizontalPodAutoscaler keeps at least 1; install KEDA with its HTTP add-on and set "
            "MLFUNCS_KUBERNETES_KEDA to its namespace"
        )
    if split := split_warning(workload.traffic, workload.revision, options):
        found.append(split)
    if options.keda and options.gateway:
        found.append(
            f"the Gateway sends requests to KEDA's interceptor, which namespace {options.keda!r} must allow: apply the "
            "ReferenceGrant of 'mlfuncs render platform' there"
        )
    if not options.keda and workload.spec.resources.cpu is None:
        found.append("resources.cpu is not set: the autoscaler measures CPU against the request, and 100m is assumed")
    if workload.spec.env.get("PORT", str(PORT)) != str(PORT):
        found.append(f"env PORT is where the container listens and stays {PORT}: give the variable another name")
    if scale.buffer:
        found.append(f"scale.buffer={scale.buffer}: a cluster keeps no spare replicas; raise scale.min instead")
    return found


def split_warning(traffic: Mapping[str, int], revision: str, options: KubernetesOptions) -> str:
    """What becomes of a traffic split without a Gateway; "" when all of it is honoured."""
    if len(traffic) < 2 or options.gateway:
        return ""
    return (
        f"traffic over {len(traffic)} revisions: a Service cannot weigh, so {serving_revision(traffic, revision)} gets "
        "all of it; set MLFUNCS_KUBERNETES_GATEWAY to a Gateway, or use the target 'knative'"
    )


def _deployment(workload: Workload) -> dict[str, Any]:
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
            "ports": [{"name": "http", "port": HTTP_PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def _autoscaler(workload: Workload) -> dict[str, Any]:
    scale = workload.spec.scale
    settle_s = min(math.ceil(max(scale.window_s, scale.scale_down_delay_s)), 3600)  # the API takes an hour at most
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
                "scaleDown": {"stabilizationWindowSeconds": settle_s},
            },
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
