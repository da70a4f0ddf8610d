"""A workload as a Nuclio function (nuclio.io/v1beta1 NuclioFunction, and the function.yaml of its dashboard), and the
NuclioAPIGateway that splits traffic between the functions of two revisions.

A typed function becomes a handler of a few lines that carries the signed bundle; a Nuclio handler runs as it is, by the
same lines. Nuclio builds the image: the locked pins and mlfuncs are its build commands.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlfuncs
from mlfuncs.errors import SpecError
from mlfuncs.serving.rollouts import serving_revision
from mlfuncs_runtime.images.base import CUDA, BaseWish
from mlfuncs_runtime.manifests.knative import to_percentages
from mlfuncs_runtime.manifests.workload import Workload, labels, resources

SOURCE_BYTES = 700_000  # base64 twice makes 1.25 MB of it, and etcd takes 1.5 MB
_IDLE_METRIC = "nuclio_processor_handled_events_total"
_IDLE_MINUTES = (1, 2, 5, 10, 30)  # Nuclio's default window presets: what its metrics adapter is set up for
WORKERS = 8  # guess: Nuclio's workers are processes, each takes one request at once
_HANDLER = """# Made by mlfuncs: a signed bundle and the lines that serve it. Change the function and deploy it again.
from mlfuncs_runtime.nuclio.export import open_exported

EXPORTED = {{
    "digest": "{digest}",
    "project": "{project}",
    "trusted": "{trusted}",
    "signature": "{signature}",
    "archive": "{archive}",
    "init_args": {init_args},
    "artifacts": {artifacts},
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
    init_args: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # constructor argument -> artifact's ref
    artifacts: Mapping[str, bytes] = field(default_factory=dict)  # digest -> content, of those arguments


def render_nuclio(workload: Workload, code: NuclioCode, name: str = "") -> dict[str, Any]:
    """The function (by default named as the endpoint): what function.yaml has, also the NuclioFunction's spec.

    Field names are those of Nuclio 1.14's `functionconfig.Spec`. Raises SpecError when the constructor's values are
    too large to travel in it.
    """
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
        "build": _build(workload, code.lock, source),
        "securityContext": {"runAsNonRoot": True, "runAsUser": 10001},
    }
    if scale.min == 0:
        spec["scaleToZero"] = {
            "scaleResources": [
                {"metricName": _IDLE_METRIC, "windowSize": idle_window(scale.window_s + scale.grace_s), "threshold": 0}
            ]
        }
    spec |= _placement(workload)
    return {
        "apiVersion": "nuclio.io/v1beta1",
        "kind": "NuclioFunction",
        "metadata": {
            "name": name or workload.name,
            "namespace": workload.namespace,
            "labels": {**labels(workload), "nuclio.io/project-name": workload.project},
        },
        "spec": spec,
    }


def render_api_gateway(workload: Workload, host: str) -> dict[str, Any]:
    """The endpoint's NuclioAPIGateway: one function for each revision with traffic, the smaller share as the canary.

    Raises SpecError for more than two revisions: Nuclio's gateway has a primary and one canary.
    """
    shares = {revision: share for revision, share in workload.traffic.items() if share} or {workload.revision: 100}
    if len(shares) > 2:
        raise SpecError(
            f"a Nuclio API gateway splits between two revisions, not {', '.join(sorted(shares))}: promote or delete one"
        )
    percentages = to_percentages(shares)
    primary = serving_revision(shares)
    upstreams: list[dict[str, Any]] = [_upstream(workload, primary)]
    for revision in sorted(set(shares) - {primary}):
        upstreams.append({**_upstream(workload, revision), "percentage": max(1, percentages[revision])})
    return {
        "apiVersion": "nuclio.io/v1beta1",
        "kind": "NuclioAPIGateway",
        "metadata": {
            "name": workload.name,
            "namespace": workload.namespace,
            "labels": {**labels(workload, revision=False), "nuclio.io/project-name": workload.project},
        },
        "spec": {
            "name": workload.name,
            "host": host,
            "path": "/",
            "description": f"mlfuncs endpoint {workload.name}",
            "authenticationMode": "none",
            "upstreams": upstreams,
        },
    }


def _upstream(workload: Workload, revision: str) -> dict[str, Any]:
    return {"kind": "nucliofunction", "nucliofunction": {"name": f"{workload.name}-{revision}"}}


def idle_window(seconds: float) -> str:
    """The shortest window that Nuclio's metrics are kept for and that is not shorter than this.

    >>> idle_window(90)
    '2m'
    """
    return next((f"{minutes}m" for minutes in _IDLE_MINUTES if minutes * 60 >= seconds), f"{_IDLE_MINUTES[-1]}m")


def _placement(workload: Workload) -> dict[str, Any]:
    pod = workload.spec.pod
    mounted = [
        {"volume": {"name": f"volume-{index}", **source}, "volumeMount": {"name": f"volume-{index}", "mountPath": path}}
        for index, (path, source) in enumerate(sorted(pod.volumes.items()))
    ]
    wanted: dict[str, Any] = {
        "nodeSelector": dict(pod.node_selector),
        "tolerations": [dict(toleration) for toleration in pod.tolerations],
        "volumes": mounted,
        "imagePullSecrets": pod.image_pull_secrets[0] if pod.image_pull_secrets else "",
        "priorityClassName": pod.priority_class,
    }
    return {key: value for key, value in wanted.items() if value}


def handler_source(workload: Workload, code: NuclioCode) -> str:
    """The Python that Nuclio runs. Raises SpecError when it would be too large for a Kubernetes object."""
    size = len(code.archive) + sum(map(len, code.artifacts.values()))
    if size > SOURCE_BYTES:
        raise SpecError(
            f"the bundle and the constructor's values of {workload.name!r} have {size} bytes, and a Nuclio function "
            f"holds {SOURCE_BYTES}: set MLFUNCS_ARTIFACTS_URL to a store that the cluster reaches too, or load them in "
            "the constructor"
        )
    artifacts = {digest: base64.b64encode(content).decode() for digest, content in sorted(code.artifacts.items())}
    return _HANDLER.format(
        digest=code.digest,
        project=workload.project,
        trusted=code.trusted,
        signature=code.signature,
        archive=base64.b64encode(code.archive).decode(),
        init_args=repr({name: dict(ref) for name, ref in sorted(code.init_args.items())}),
        artifacts=repr(artifacts),
    )


def build_commands(lock: Sequence[str], cuda: bool = False) -> list[str]:
    """What Nuclio's image build runs: one pip install of mlfuncs, with CUDA's libraries if wished, and the pins."""
    pins = " ".join(f"'{line.partition(' --hash=')[0]}'" for line in lock)
    own = f"'mlfuncs[{CUDA}]=={mlfuncs.__version__}'" if cuda else f"mlfuncs=={mlfuncs.__version__}"
    commands = [f"pip install --no-cache-dir {own} {pins}".strip()]
    return [*commands, "python -m mlfuncs_runtime.images.prepare --libraries"] if cuda else commands


def _build(workload: Workload, lock: Sequence[str], source: str) -> dict[str, Any]:
    wish = BaseWish.of([(workload.spec, lock)])
    build: dict[str, Any] = {"commands": build_commands(lock, wish.cuda and not wish.image)}
    if wish.image:
        build["baseImage"] = wish.image
    return {**build, "functionSourceCode": source}


def nuclio_warnings(workload: Workload) -> list[str]:
    """What the spec asks that Nuclio cannot do, each with the way out."""
    scale, found = workload.spec.scale, []
    if scale.metric != "concurrency" or scale.target is not None:
        found.append("scale.target: Nuclio scales by CPU; use the target 'knative' for requests")
    if workload.spec.batch is not None:
        found.append("batch: requests are served one by one in Nuclio; use another target for batches")
    if scale.min == 0:
        window = idle_window(scale.window_s + scale.grace_s)
        found.append(f"scale.min=0: Nuclio's autoscaler and DLX must be on; a function is idle after {window}")
    if len(workload.spec.pod.image_pull_secrets) > 1:
        found.append(f"pod.image_pull_secrets: Nuclio takes one, {workload.spec.pod.image_pull_secrets[0]!r}")
    if workload.spec.pod.runtime_class:
        found.append("pod.runtime_class: a Nuclio function has none; use another target")
    if scale.buffer:
        found.append(f"scale.buffer={scale.buffer}: Nuclio keeps no spare replicas; raise scale.min instead")
    return found


def _environment(workload: Workload) -> list[dict[str, Any]]:
    env: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(workload.spec.env.items())]
    for name in workload.spec.secrets:
        source = {"secretKeyRef": {"name": workload.secret_name, "key": name}}
        env.append({"name": name, "valueFrom": source})
    return env
