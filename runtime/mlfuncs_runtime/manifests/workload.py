"""One revision of an endpoint as a cluster sees it, and the parts that every kind of manifest shares.

The pod meets Kubernetes' "restricted" pod security standard: a numeric non-root user, a read-only root file system, no
capability, no privilege escalation, the runtime's default seccomp profile, and no service account token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs.spec import FunctionSpec

PORT = 8080  # where the container listens
USER = 10001  # numeric, so that Kubernetes can prove it is not root
SECRETS_DIR = "/run/secrets/mlfuncs"
READY_PATH = "/-/ready"
LIVE_PATH = "/-/healthz"
START_S = 600  # how long loading may take: a Deployment's own progressDeadlineSeconds, and Knative's progress-deadline
_START_PERIOD_S = 2
PRE_STOP_S = 5  # guess: how long a cluster takes to stop sending requests to a pod that is going away
MANAGER = "mlfuncs"


_LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(rf"({_LABEL_NAME.pattern})?")
_PREFIX = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class Workload:
    """What to run: an image under a spec, as one revision of one endpoint.

    `traffic` and `tags` are the endpoint's, by revision name; `drain_s` is how long requests may take after SIGTERM.
    """

    name: str
    project: str
    revision: str  # e.g. "rev-3"
    image: str
    spec: FunctionSpec
    namespace: str = "default"
    traffic: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    drain_s: float = 30.0

    @property
    def revision_name(self) -> str:
        """The name of the revision's own objects, e.g. "churn-rev-3"."""
        return f"{self.name}-{self.revision}"

    @property
    def secret_name(self) -> str:
        """The Kubernetes Secret that holds the function's secrets, one key each; it is referred to, never written."""
        return f"{self.name}-secrets"


def labels(workload: Workload, revision: bool = True) -> dict[str, str]:
    """The labels of the workload's objects: the recommended `app.kubernetes.io` ones, ours and the user's."""
    own = {
        "app.kubernetes.io/name": workload.name,
        "app.kubernetes.io/part-of": workload.project,
        "app.kubernetes.io/managed-by": MANAGER,
    }
    if revision:
        own["mlfuncs.dev/revision"] = workload.revision
    return {**label_values(workload.spec), **own}


def label_values(spec: FunctionSpec) -> dict[str, str]:
    """The user's labels that Kubernetes takes as such; others, of free text, become annotations.

    Raises SpecError for a key that is neither's.
    """
    for key in spec.labels:
        prefix, _, name = key.rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (prefix and not _PREFIX.fullmatch(prefix)):
            raise SpecError(
                f"label {key!r} is none for Kubernetes: use up to 63 of A-Z, a-z, 0-9, '-', '_' and '.', beginning and "
                "ending with a letter or digit"
            )
    return {key: value for key, value in spec.labels.items() if _LABEL_VALUE.fullmatch(value)}


def metadata(workload: Workload, name: str, revision: bool = True) -> dict[str, Any]:
    """Name, namespace and labels of one object. Raises SpecError for a name that Services cannot have."""
    if not workload.name[0].isalpha():
        raise SpecError(
            f"endpoint {workload.name!r}: a Kubernetes Service's name begins with a letter: give it another name"
        )
    made = {"name": name, "namespace": workload.namespace, "labels": labels(workload, revision)}
    other = {key: value for key, value in workload.spec.labels.items() if not _LABEL_VALUE.fullmatch(value)}
    return {**made, "annotations": other} if other else made


def container(workload: Workload) -> dict[str, Any]:
    """The one container of the pod."""
    made: dict[str, Any] = {
        "name": "function",
        "image": workload.image,
        "ports": [{"containerPort": PORT, "name": "http1"}],
        "env": environment(workload),
        "resources": resources(workload.spec),
        "securityContext": security(),
        "volumeMounts": mounts(workload),
    }
    ready = {"path": READY_PATH, "port": PORT}
    live = {"path": LIVE_PATH, "port": PORT}
    # nothing listens before the function is loaded: until then liveness must not be asked
    starts = {"httpGet": dict(live), "periodSeconds": _START_PERIOD_S, "failureThreshold": START_S // _START_PERIOD_S}
    made["startupProbe"] = starts
    made["readinessProbe"] = {"httpGet": ready, "periodSeconds": 2, "failureThreshold": 3}
    made["livenessProbe"] = {"httpGet": live, "periodSeconds": 10, "failureThreshold": 3, "timeoutSeconds": 5}
    return made


def security() -> dict[str, Any]:
    """A container's part of the restricted standard."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def pod_security() -> dict[str, Any]:
    """A pod's part of it; volumes belong to the group of the image's user."""
    return {"runAsNonRoot": True, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}


def environment(workload: Workload) -> list[dict[str, str]]:
    """The container's variables, sorted by name: the user's, and what tells the worker who it is."""
    own = {
        "MLFUNCS_ENDPOINT": workload.name,
        "MLFUNCS_PROJECT": workload.project,
        "MLFUNCS_REVISION": workload.revision,
        "MLFUNCS_LOG_FORMAT": "json",
    }
    if workload.spec.secrets:
        own["MLFUNCS_SECRETS_DIR"] = SECRETS_DIR
    if "PORT" in workload.spec.env:  # where the container listens, which the probes and Services know
        own["PORT"] = str(PORT)
    return [{"name": name, "value": value} for name, value in sorted({**workload.spec.env, **own}.items())]


def resources(spec: FunctionSpec) -> dict[str, Any]:
    """Requests and limits: CPU is requested but not capped (a cap throttles, it protects nobody); memory is both."""
    asked: dict[str, str] = {}
    limits: dict[str, str] = {}
    if spec.resources.cpu is not None:
        asked["cpu"] = f"{math.ceil(spec.resources.cpu * 1000)}m"
    if spec.resources.memory is not None:
        asked["memory"] = limits["memory"] = spec.resources.memory
    if spec.resources.gpu:
        limits[spec.resources.gpu_type] = asked[spec.resources.gpu_type] = str(spec.resources.gpu)
    return {key: value for key, value in (("requests", asked), ("limits", limits)) if value}


def volumes(workload: Workload) -> list[dict[str, Any]]:
    """The pod's volumes: a writable /tmp, the secrets, and the user's own."""
    return [{"name": name, **source} for name, _, _, source in _volumes(workload)]


def mounts(workload: Workload) -> list[dict[str, Any]]:
    """Where the container sees those volumes."""
    return [{"name": name, "mountPath": path, **extra} for name, path, extra, _ in _volumes(workload)]


def placement(workload: Workload) -> dict[str, Any]:
    """The pod fields that say where it may run; only those that were asked for."""
    pod = workload.spec.pod
    wanted = {
        "nodeSelector": dict(pod.node_selector),
        "tolerations": [dict(toleration) for toleration in pod.tolerations],
        "imagePullSecrets": [{"name": name} for name in pod.image_pull_secrets],
        "priorityClassName": pod.priority_class,
        "runtimeClassName": pod.runtime_class,
    }
    return {key: value for key, value in wanted.items() if value}


def _volumes(workload: Workload) -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(name, mount path, mount options, source) of each volume."""
    made: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [("tmp", "/tmp", {}, {"emptyDir": {}})]
    if workload.spec.secrets:
        items = [{"key": name, "path": name} for name in workload.spec.secrets]
        source = {"secret": {"secretName": workload.secret_name, "items": items, "defaultMode": 0o444}}
        made.append(("secrets", SECRETS_DIR, {"readOnly": True}, source))
    for index, (path, kind) in enumerate(sorted(workload.spec.pod.volumes.items())):
        made.append((f"volume-{index}", path, {}, dict(kind)))
    return made
