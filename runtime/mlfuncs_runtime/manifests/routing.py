"""What leads requests to revisions on plain Kubernetes: KEDA's HTTP add-on, and HTTPRoutes of the Gateway API; pure.

KEDA's interceptor holds requests while a revision has no pod. It knows revisions by host name: every revision has one
of its own, and the one that serves has the endpoint's names too. A Gateway weighs: its route's weights are the traffic
shares, and with KEDA it sends each share to the interceptor under the revision's own name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs.serving.rollouts import serving_revision
from mlfuncs.settings import Settings
from mlfuncs_runtime.manifests.workload import Workload, metadata

HTTP_PORT = 80
INTERCEPTOR, INTERCEPTOR_PORT = "keda-add-ons-http-interceptor-proxy", 8080  # names of the add-on's Helm chart
_SCALER = "keda-add-ons-http-external-scaler"
_SCALER_PORT = 9090
_DEFAULT_TARGET = 100.0  # Knative's container-concurrency-target-default, used for KEDA too
_DEFAULT_RPS = 200.0  # Knative's requests-per-second-target-default


@dataclass(frozen=True)
class KubernetesOptions:
    """What the cluster has: KEDA with its HTTP add-on in the namespace `keda`, and a Gateway that routes attach to."""

    keda: str = ""
    gateway: str = ""  # "name", or "namespace/name" of one elsewhere
    domain: str = ""  # endpoints are <name>.<domain> there; empty: <name>.<namespace>

    @classmethod
    def of(cls, settings: Settings) -> KubernetesOptions:
        """The options of the settings. Raises SpecError for a gateway that is not [namespace/]name[@domain]."""
        gateway, _, domain = settings.kubernetes_gateway.partition("@")
        if settings.kubernetes_gateway and (not all(gateway.split("/")) or gateway.count("/") > 1):
            raise SpecError(
                f"MLFUNCS_KUBERNETES_GATEWAY is [namespace/]name[@domain], e.g. infra/public@ml.example.com, not "
                f"{settings.kubernetes_gateway!r}"
            )
        return cls(settings.kubernetes_keda, gateway, domain)

    def host(self, workload: Workload) -> str:
        """The endpoint's name at the gateway."""
        return f"{workload.name}.{self.domain or workload.namespace}"


def revision_host(workload: Workload, revision: str) -> str:
    """The name by which KEDA's interceptor knows one revision."""
    return f"{workload.name}-{revision}.{workload.namespace}"


def interceptor_service(workload: Workload, options: KubernetesOptions) -> dict[str, Any]:
    """The endpoint's Service with KEDA: an alias of the interceptor, which callers reach on its own port."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(workload, workload.name, revision=False),
        "spec": {"type": "ExternalName", "externalName": f"{INTERCEPTOR}.{options.keda}.svc.cluster.local"},
    }


def interceptor_route(workload: Workload, options: KubernetesOptions) -> dict[str, Any]:
    """KEDA's InterceptorRoute (http.keda.sh/v1beta1) of one revision."""
    scale = workload.spec.scale
    hosts = [revision_host(workload, workload.revision)]
    if serving_revision(workload.traffic, workload.revision) == workload.revision:
        name, inside = workload.name, f"{workload.name}.{workload.namespace}"
        hosts += [name, inside, f"{inside}.svc", f"{inside}.svc.cluster.local"]
        hosts += [options.host(workload)] if options.domain else []
    if scale.metric == "rps":
        rate = {"targetValue": math.ceil(scale.target or _DEFAULT_RPS), "window": f"{math.ceil(scale.window_s)}s"}
        metric: dict[str, Any] = {"requestRate": rate}
    else:
        metric = {"concurrency": {"targetValue": math.ceil(scale.target or scale.concurrency or _DEFAULT_TARGET)}}
    return {
        "apiVersion": "http.keda.sh/v1beta1",
        "kind": "InterceptorRoute",
        "metadata": metadata(workload, workload.revision_name),
        "spec": {
            "target": {"service": workload.revision_name, "port": HTTP_PORT},
            "rules": [{"hosts": hosts}],
            "scalingMetric": metric,
            "timeouts": {"responseHeader": f"{math.ceil(workload.spec.timeout_s)}s"},  # a cold start does not count
        },
    }


def scaled_object(workload: Workload, options: KubernetesOptions) -> dict[str, Any]:
    """KEDA's ScaledObject (keda.sh/v1alpha1) of one revision, from `scale.min`, 0 included, to `scale.max`."""
    scale = workload.spec.scale
    settle_s = math.ceil(max(scale.window_s, scale.scale_down_delay_s))
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata(workload, workload.revision_name),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": workload.revision_name},
            "minReplicaCount": scale.min,
            "maxReplicaCount": scale.max,
            "cooldownPeriod": math.ceil(scale.window_s + scale.grace_s),
            "advanced": {
                "horizontalPodAutoscalerConfig": {
                    "behavior": {"scaleDown": {"stabilizationWindowSeconds": min(settle_s, 3600)}}
                }
            },
            "triggers": [
                {
                    "type": "external-push",
                    "metadata": {
                        "scalerAddress": f"{_SCALER}.{options.keda}:{_SCALER_PORT}",
                        "interceptorRoute": workload.revision_name,
                    },
                }
            ],
        },
    }


def http_route(workload: Workload, options: KubernetesOptions) -> dict[str, Any]:
    """The endpoint's HTTPRoute (gateway.networking.k8s.io/v1): weights are the traffic shares."""
    namespace, _, gateway = options.gateway.rpartition("/")
    parent = {"name": gateway, **({"namespace": namespace} if namespace else {})}
    traffic = dict(workload.traffic) or {workload.revision: 100}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": metadata(workload, workload.name, revision=False),
        "spec": {
            "parentRefs": [parent],
            "hostnames": [options.host(workload)],
            "rules": [
                {
                    "backendRefs": [
                        _backend(workload, revision, share, options) for revision, share in sorted(traffic.items())
                    ]
                }
            ],
        },
    }


def reference_grant(namespace: str, keda: str) -> dict[str, Any]:
    """What lets HTTPRoutes of `namespace` name KEDA's interceptor as a backend; it stands in KEDA's namespace."""
    return {
        "apiVersion": "gateway.networking.k8s.io/v1beta1",
        "kind": "ReferenceGrant",
        "metadata": {"name": f"mlfuncs-{namespace}", "namespace": keda},
        "spec": {
            "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": namespace}],
            "to": [{"group": "", "kind": "Service", "name": INTERCEPTOR}],
        },
    }


def _backend(workload: Workload, revision: str, share: int, options: KubernetesOptions) -> dict[str, Any]:
    if not options.keda:
        return {"name": f"{workload.name}-{revision}", "port": HTTP_PORT, "weight": share}
    rewrite = {"type": "URLRewrite", "urlRewrite": {"hostname": revision_host(workload, revision)}}
    where = {"name": INTERCEPTOR, "namespace": options.keda, "port": INTERCEPTOR_PORT}
    return {**where, "weight": share, "filters": [rewrite]}
