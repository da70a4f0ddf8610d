"""Image builds inside a cluster, as Jobs for BuildKit and Kaniko; pure.

The context is what `mlfuncs build --context URL` writes: the layers and a Dockerfile that adds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlfuncs.errors import SpecError
from mlfuncs_runtime.manifests.workload import MANAGER

_BUILDKIT = "moby/buildkit:v0.16.0-rootless"
_KANIKO = "gcr.io/kaniko-project/executor:v1.23.2"
_DEADLINE_S = 1800


@dataclass(frozen=True)
class BuildJob:
    """One build: `context` is a URL (s3://, gs://, https://), `push_secret` a docker-registry Secret's name."""

    name: str
    namespace: str
    context: str
    destination: str
    push_secret: str = ""


def build_warnings(build: BuildJob) -> list[str]:
    """What the Job needs of its cluster."""
    return [
        f"both builders need more than pod security 'restricted' or 'baseline' allows: a namespace of their own beside "
        f"{build.namespace!r} when that enforces one, as that of 'mlfuncs render platform' does"
    ]


def render_build_job(build: BuildJob, tool: Literal["buildkit", "kaniko"] = "buildkit") -> dict[str, Any]:
    """A Job that builds the context's Dockerfile and pushes it.

    BuildKit reads contexts over HTTP alone; Kaniko knows buckets, with the credentials of its pod. Raises SpecError for
    a URL that the builder cannot read.
    """
    if tool == "buildkit" and not build.context.startswith(("http://", "https://")):
        raise SpecError(
            f"BuildKit reads a context over http(s) alone, not {build.context!r}: render it for 'kaniko', or set "
            "MLFUNCS_ARTIFACTS_URL to an address of the store over https"
        )
    container = _buildkit(build) if tool == "buildkit" else _kaniko(build)
    volumes: list[dict[str, Any]] = [{"name": "work", "emptyDir": {}}]
    if build.push_secret:
        items = [{"key": ".dockerconfigjson", "path": "config.json"}]
        volumes.append({"name": "login", "secret": {"secretName": build.push_secret, "items": items}})
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [container],
        "volumes": volumes,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"build-{build.name}",
            "namespace": build.namespace,
            "labels": {"app.kubernetes.io/name": build.name, "app.kubernetes.io/managed-by": MANAGER},
        },
        "spec": {
            "backoffLimit": 1,
            "activeDeadlineSeconds": _DEADLINE_S,
            "ttlSecondsAfterFinished": 600,
            "template": {"spec": pod},
        },
    }


def _buildkit(build: BuildJob) -> dict[str, Any]:
    output = f"type=image,name={build.destination},push=true,rewrite-timestamp=true"
    mounts: list[dict[str, Any]] = [{"name": "work", "mountPath": "/home/user/.local/share/buildkit"}]
    if build.push_secret:
        mounts.append({"name": "login", "mountPath": "/home/user/.docker", "readOnly": True})
    return {
        "name": "build",
        "image": _BUILDKIT,
        "command": ["buildctl-daemonless.sh"],
        "args": [
            "build", "--frontend", "dockerfile.v0", "--opt", f"context={build.context}",
            "--opt", "build-arg:SOURCE_DATE_EPOCH=315532800", "--output", output,
        ],
        "env": [{"name": "BUILDKITD_FLAGS", "value": "--oci-worker-no-process-sandbox"}],
        # rootless BuildKit makes user namespaces, which the default profiles forbid: its own documented settings
        "securityContext": {
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "seccompProfile": {"type": "Unconfined"},
            "appArmorProfile": {"type": "Unconfined"},
        },
        "volumeMounts": mounts,
    }  # fmt: skip


def _kaniko(build: BuildJob) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [{"name": "work", "mountPath": "/workspace"}]
    if build.push_secret:
        mounts.append({"name": "login", "mountPath": "/kaniko/.docker", "readOnly": True})
    return {
        "name": "build",
        "image": _KANIKO,
        "args": [f"--context={build.context}", f"--destination={build.destination}", "--reproducible"],
        "volumeMounts": mounts,
    }
