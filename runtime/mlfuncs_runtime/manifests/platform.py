"""What a cluster or a machine needs besides functions: one namespace's rights, and a compose file; pure.

There is nothing of ours to run in a cluster: whoever deploys applies the objects, with the Role below and no right
outside of the namespace.
"""

from __future__ import annotations

from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs_runtime.manifests.routing import KubernetesOptions, reference_grant
from mlfuncs_runtime.manifests.workload import MANAGER

_WRITE = ["create", "delete", "get", "list", "patch", "update", "watch"]
_READ = ["get", "list", "watch"]
_RULES: tuple[tuple[str, list[str], list[str]], ...] = (
    ("", ["services", "serviceaccounts", "configmaps"], _WRITE),
    ("", ["pods", "pods/log", "events"], _READ),
    ("apps", ["deployments"], _WRITE),
    ("autoscaling", ["horizontalpodautoscalers"], _WRITE),
    ("policy", ["poddisruptionbudgets"], _WRITE),
    ("networking.k8s.io", ["networkpolicies"], _WRITE),
    ("batch", ["jobs"], _WRITE),
    ("serving.knative.dev", ["services"], _WRITE),
    ("serving.knative.dev", ["revisions"], _READ),
    ("http.keda.sh", ["interceptorroutes"], _WRITE),
    ("keda.sh", ["scaledobjects"], _WRITE),
    ("gateway.networking.k8s.io", ["httproutes"], _WRITE),
)
_DEPLOYER = "mlfuncs-deployer"
# a function's own port (8080), and those of Knative's queue-proxy: requests in HTTP/1, HTTP/2 and TLS, metrics
_PORTS = (8080, 8012, 8013, 8112, 9090, 9091)
_REDIS_PASSWORD = "${REDIS_PASSWORD:?set REDIS_PASSWORD}"


def render_platform(namespace: str, options: KubernetesOptions = KubernetesOptions()) -> list[dict[str, Any]]:
    """The namespace under the restricted pod security standard, and a deployer that may do what targets need there.

    The Role reads no Secret: functions refer to secrets, and nobody who deploys them sees a value. Nothing reaches a
    pod but requests to functions, on whichever target. With KEDA behind a Gateway, KEDA's namespace gets the grant
    that routes need.

    Raises SpecError for the namespace "default", which others' pods are in.
    """
    if namespace == "default":
        raise SpecError(
            "the platform's objects restrict every pod of their namespace, so it has one of its own: set "
            "MLFUNCS_KUBERNETES_NAMESPACE, e.g. to 'mlfuncs'"
        )
    granted = [reference_grant(namespace, options.keda)] if options.keda and options.gateway else []
    labels = {"app.kubernetes.io/managed-by": MANAGER}
    enforced = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    own = {"name": _DEPLOYER, "namespace": namespace, "labels": labels}
    rules = [{"apiGroups": [group], "resources": kinds, "verbs": verbs} for group, kinds, verbs in _RULES]
    subject = {"kind": "ServiceAccount", "name": _DEPLOYER, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": _DEPLOYER}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": {**labels, **enforced}}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": own, "automountServiceAccountToken": False},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": own, "rules": rules},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": own,
            "subjects": [subject],
            "roleRef": role,
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "mlfuncs-default-deny", "namespace": namespace, "labels": labels},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "mlfuncs-functions", "namespace": namespace, "labels": labels},
            "spec": {
                "podSelector": {"matchLabels": labels},
                "policyTypes": ["Ingress"],
                "ingress": [{"ports": [{"port": port, "protocol": "TCP"} for port in _PORTS]}],
            },
        },
        *granted,
    ]


def render_compose(project: str) -> dict[str, Any]:
    """A compose file for the platform on one machine: supervisor with router, Redis and PostgreSQL.

    The router is published on loopback alone; it takes other addresses only with a token, which is asked for here.
    """
    confined = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    return {
        "name": project,
        "services": {
            "platform": {
                "image": "${PLATFORM_IMAGE:-mlfuncs/platform}",
                "build": {"context": ".", "args": {"EXTRAS": "platform"}},  # in a checkout of mlfuncs
                "entrypoint": ["/opt/mlfuncs/bin/python", "-P", "-m", "mlfuncs_runtime.supervisor.process"],
                "environment": {
                    "MLFUNCS_PROJECT": project,
                    "MLFUNCS_HOME": "/home/mlfuncs",
                    "MLFUNCS_HOST": "0.0.0.0",
                    "MLFUNCS_PORT": "8080",
                    "MLFUNCS_TOKEN": "${MLFUNCS_TOKEN:?set MLFUNCS_TOKEN to what callers must send}",
                    "MLFUNCS_REDIS_URL": "redis://:${REDIS_PASSWORD}@redis:6379/0",
                    "MLFUNCS_REGISTRY_URL": "postgresql+psycopg://mlfuncs:${POSTGRES_PASSWORD}@postgres:5432/mlfuncs",
                },
                "ports": ["127.0.0.1:8080:8080"],
                "volumes": ["home:/home/mlfuncs"],
                "tmpfs": ["/tmp"],
                "healthcheck": {
                    "test": ["CMD", "/opt/mlfuncs/bin/python", "-P", "-m", "mlfuncs_runtime.docker.entry", "--check"]
                },
                "depends_on": {name: {"condition": "service_healthy"} for name in ("redis", "postgres")},
                "restart": "unless-stopped",
                **confined,
            },
            "redis": {
                "image": "${REDIS_IMAGE:-redis:7-alpine}",
                "command": ["redis-server", "--appendonly", "yes", "--requirepass", _REDIS_PASSWORD],
                "environment": {"REDISCLI_AUTH": "${REDIS_PASSWORD}"},  # for the health check
                "volumes": ["redis:/data"],
                "healthcheck": {"test": ["CMD", "redis-cli", "ping"], "interval": "5s"},
                "restart": "unless-stopped",
            },
            "postgres": {
                "image": "${POSTGRES_IMAGE:-postgres:16-alpine}",
                "environment": {
                    "POSTGRES_USER": "mlfuncs",
                    "POSTGRES_DB": "mlfuncs",
                    "POSTGRES_PASSWORD": "${POSTGRES_PASSWORD:?set POSTGRES_PASSWORD}",
                },
                "volumes": ["postgres:/var/lib/postgresql/data"],
                "healthcheck": {"test": ["CMD", "pg_isready", "-U", "mlfuncs"], "interval": "5s"},
                "restart": "unless-stopped",
            },
        },
        "volumes": {"home": {}, "redis": {}, "postgres": {}},
    }
