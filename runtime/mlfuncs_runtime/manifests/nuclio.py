"""A workload as a Nuclio function (nuclio.io/v1beta1 NuclioFunction, and the function.yaml of its dashboard).

A typed function becomes a handler of a few lines that carries the signed bundle; a Nuclio handler runs as it is, by the
same lines. Nuclio builds the image: the locked pins and mlfuncs are its build commands.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlfuncs
from mlfuncs_runtime.manifests.workload import Workload, labels, resources

WORKERS = 8  # guess: Nuclio's workers are processes, each takes one request at once
_HANDLER = """# Made by mlfuncs: a signed bundle and the lines that serve it. Change the function and deploy it again.
from mlfuncs_runtime.nuclio.export import open_exported

EXPORTED = {{
    "digest": "{digest}",
    "project": "{project}",
    "trusted": "{trusted}",
    "signature": "{signature}",
    "archive": "{archive}",
}}


def init_context(context):
    setattr(context.user_data, "mlfuncs", open_exported(EXPORTED, context))


def handler(context, event):
    return context.user_data.mlfuncs(context, event)
"""


@dataclass(frozen=True)
class NuclioCode:
    """A bundle as Nuclio gets it: its archive and signature, the keys to trust, and the pins to install."""

    digest: str
    archive: bytes
    signature: str
    trusted: str
    lock: Sequence[str]
    python: str = "3.11"


def render_nuclio(workload: Workload, code: NuclioCode) -> dict[str, Any]:
    """The function: what function.yaml has, which is also the NuclioFunction's spec."""
    source = base64.b64encode(handler_source(workload, code).encode()).decode()
    scale = workload.spec.scale
    spec: dict[str, Any] = {
        "runtime": f"python:{code.python}",
        "handler": "handler:handler",
        "env": _environment(workload),
        "resources": resources(workload.spec),
        "minReplicas": scale.min,
        "maxReplicas": scale.max,
        "targetCPU": 70,
        "eventTimeout": f"{math.ceil(workload.spec.timeout_s)}s",
        "triggers": {
            "http": {
                "kind": "http",
                "name": "http",
                "numWorkers": scale.concurrency or WORKERS,
                "workerAvailabilityTimeoutMilliseconds": math.ceil(workload.spec.timeout_s * 1000),
                "attributes": {"serviceType": "ClusterIP"},
            }
        },
        "build": {"commands": build_commands(code.lock), "functionSourceCode": source},
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001},
    }
    if scale.min == 0:
        window = f"{math.ceil(scale.window_s + scale.grace_s)}s"
        spec["scaleToZero"] = {
            "scaleResources": [
                {"metricName": "nuclio_processor_handled_events_total", "windowSize": window, "threshold": 0}
            ]
        }
    placed = {"nodeSelector": dict(workload.spec.pod.node_selector)}
    placed["tolerations"] = [dict(toleration) for toleration in workload.spec.pod.tolerations]  # type: ignore[assignment]
    spec |= {key: value for key, value in placed.items() if value}
    return {
        "apiVersion": "nuclio.io/v1beta1",
        "kind": "NuclioFunction",
        "metadata": {
            "name": workload.name,
            "namespace": workload.namespace,
            "labels": {**labels(workload), "nuclio.io/project-name": workload.project},
        },
        "spec": spec,
    }


def handler_source(workload: Workload, code: NuclioCode) -> str:
    """The Python that Nuclio runs."""
    return _HANDLER.format(
        digest=code.digest,
        project=workload.project,
        trusted=code.trusted,
        signature=code.signature,
        archive=base64.b64encode(code.archive).decode(),
    )


def build_commands(lock: Sequence[str]) -> list[str]:
    """What Nuclio's image build runs: one pip install of mlfuncs and the pins."""
    pins = " ".join(f"'{line.partition(' --hash=')[0]}'" for line in lock)
    return [f"pip install --no-cache-dir mlfuncs=={mlfuncs.__version__} {pins}".strip()]


def nuclio_warnings(workload: Workload) -> list[str]:
    """What the spec asks that Nuclio cannot do, each with the way out."""
    scale, found = workload.spec.scale, []
    if scale.metric != "concurrency" or scale.target is not None:
        found.append("scale.target: Nuclio scales by CPU; use the target 'knative' for requests")
    if workload.spec.batch is not None:
        found.append("batch: requests are served one by one in Nuclio; use another target for batches")
    if len(workload.traffic) > 1:
        found.append("traffic over several revisions: a Nuclio function has one; the largest share gets all")
    return found


def _environment(workload: Workload) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(workload.spec.env.items())]
    for name in workload.spec.secrets:
        source = {"secretKeyRef": {"name": workload.secret_name, "key": name}}
        env.append({"name": name, "valueFrom": source})
    return env
