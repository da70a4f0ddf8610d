"""A run as a Kubernetes Job (batch/v1) and the ConfigMap with its order; pure.

The Job is made suspended, so that the ConfigMap can name it as its owner before a pod wants to mount it; both go
together. Attempts are the Job's: it counts them wherever the process that asked for the run is by then.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs.spec import FunctionSpec
from mlfuncs_runtime.manifests.workload import (
    MANAGER,
    SECRETS_DIR,
    Workload,
    label_values,
    mounts,
    placement,
    pod_security,
    resources,
    security,
    volumes,
)

ORDER_DIR = "/run/mlfuncs/order"
KEPT_S = 24 * 3600  # guess: how long the end of a run may wait for somebody to read it
START_S = 600  # guess: how long a pod may take to find a node and get its image, beside its time limit
ORDER_BYTES = 1_000_000  # a ConfigMap holds 1 MiB
_GRACE_S = 15
_HOPELESS = 78  # exit code after which no attempt can help; see mlfuncs_runtime.kubernetes.job_pod


@dataclass(frozen=True)
class RunJob:
    """One run: `order` is what its pod reads, `files` travel with it, `environ` are settings of its interpreter."""

    name: str
    function: str
    project: str
    run: str
    namespace: str
    image: str
    spec: FunctionSpec
    timeout_s: float | None
    order: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)


def render_run_job(job: RunJob, suspended: bool = False) -> dict[str, Any]:
    """The Job. `retries` are its backoffLimit; node drains and preemptions do not count as attempts."""
    spec: dict[str, Any] = {
        "suspend": suspended,
        "backoffLimit": job.spec.retries,
        "ttlSecondsAfterFinished": KEPT_S,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "function", "operator": "In", "values": [_HOPELESS]},
                },
            ]
        },
        "template": {"metadata": {"labels": run_labels(job)}, "spec": _pod(job)},
    }
    if job.timeout_s is not None:  # of all attempts; the pod itself keeps to the time limit of one
        spec["activeDeadlineSeconds"] = (job.spec.retries + 1) * (math.ceil(job.timeout_s) + START_S)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job), "spec": spec}


def render_order(job: RunJob, owner_uid: str) -> dict[str, Any]:
    """The ConfigMap that the Job's pods read; it goes when the Job goes. Raises SpecError when it is too large."""
    order = json.dumps(dict(job.order), separators=(",", ":"))
    size = len(order.encode()) + sum(map(len, job.files.values()))
    if size > ORDER_BYTES:
        raise SpecError(
            f"the bundle and the arguments of run {job.run} have {size} bytes, and a Job's order holds {ORDER_BYTES}: "
            "set MLFUNCS_ARTIFACTS_URL to a store that the cluster reaches too, e.g. s3://bucket/path"
        )
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job.name, "uid": owner_uid}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**_metadata(job), "ownerReferences": [owner]},
        "data": {"order.json": order},
        "binaryData": {name: base64.b64encode(content).decode() for name, content in sorted(job.files.items())},
    }


def run_labels(job: RunJob) -> dict[str, str]:
    """The labels of a run's objects; none that an endpoint of the function's name selects by."""
    return {
        **label_values(job.spec),
        "app.kubernetes.io/name": "mlfuncs-run",
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/part-of": job.project,
        "app.kubernetes.io/managed-by": MANAGER,
        "mlfuncs.dev/function": job.function,
        "mlfuncs.dev/run": job.run,
    }


def _metadata(job: RunJob) -> dict[str, Any]:
    return {"name": job.name, "namespace": job.namespace, "labels": run_labels(job)}


def _pod(job: RunJob) -> dict[str, Any]:
    workload = Workload(job.function, job.project, "", job.image, job.spec, job.namespace)
    mounted = volumes(workload)
    return {
        "restartPolicy": "Never",  # a new pod for each attempt: the log of every one is kept
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": pod_security(),
        **placement(workload),
        "containers": [_container(job, workload)],
        "volumes": [*mounted, {"name": "order", "configMap": {"name": job.name}}],
    }


def _container(job: RunJob, workload: Workload) -> dict[str, Any]:
    own = dict(job.environ)
    if job.spec.secrets:
        own["MLFUNCS_SECRETS_DIR"] = SECRETS_DIR
    environ = {**job.spec.env, **own}
    return {
        "name": "function",
        "image": job.image,
        "args": ["--run", ORDER_DIR],
        "env": [{"name": name, "value": value} for name, value in sorted(environ.items())],
        "resources": resources(job.spec),
        "securityContext": security(),
        "volumeMounts": [*mounts(workload), {"name": "order", "mountPath": ORDER_DIR, "readOnly": True}],
    }
