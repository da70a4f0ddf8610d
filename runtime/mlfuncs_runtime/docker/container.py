"""A replica's container as the Docker Engine is asked for it; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs.spec import Resources
from mlfuncs_runtime.docker.entry import SECRETS_DIR, SOCKET

HOME_LABEL, OWNER_LABEL, REPLICA_LABEL = "dev.mlfuncs.home", "dev.mlfuncs.owner", "dev.mlfuncs.replica"
PIDS = 512  # guess: threads count; a numeric library makes one a core, a server tens
TMP_BYTES = 256 * 2**20  # guess: /tmp is memory and counts to the limit
_NANO = 1_000_000_000


@dataclass(frozen=True)
class ContainerPlan:
    """One replica: `folder` is the host directory that its socket appears in, `user` the uid:gid it runs as."""

    image: str
    replica: str
    folder: str
    user: str
    resources: Resources = field(default_factory=Resources)
    environ: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    network: str = "bridge"


def container_body(plan: ContainerPlan) -> dict[str, Any]:
    """The body of `POST /containers/create`."""
    uid, _, gid = plan.user.partition(":")
    return {
        "Image": plan.image,
        "Cmd": ["--replica"],
        "User": plan.user,
        "Env": [f"{name}={value}" for name, value in sorted(plan.environ.items())],
        "Labels": {**plan.labels, REPLICA_LABEL: plan.replica},
        "OpenStdin": True,
        "StdinOnce": True,  # the container's input ends with the process that attached: see container.py
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "Healthcheck": {"Test": ["NONE"]},  # the supervisor asks on the socket, which starts no process
        "HostConfig": {
            "AutoRemove": True,
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],  # and the engine's default seccomp profile, by not naming another
            "PidsLimit": PIDS,
            "NetworkMode": plan.network,
            "LogConfig": {"Type": "none"},  # what it prints is streamed to the endpoint's own log
            "Mounts": [{"Type": "bind", "Source": plan.folder, "Target": SOCKET.rpartition("/")[0]}],
            "Tmpfs": {
                "/tmp": f"rw,exec,nosuid,nodev,size={TMP_BYTES},mode=1777",
                SECRETS_DIR: f"rw,noexec,nosuid,nodev,size=1m,mode=0700,uid={uid},gid={gid or uid}",
            },
            **_limits(plan.resources),
        },
    }


def _limits(resources: Resources) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if resources.memory_bytes is not None:
        limits |= {"Memory": resources.memory_bytes, "MemorySwap": resources.memory_bytes}  # equal: no swap
    if resources.cpu is not None:
        limits["NanoCpus"] = math.ceil(resources.cpu * _NANO)
    if resources.gpu:
        if not resources.gpu_type.startswith("nvidia.com/"):
            raise SpecError(
                f"target 'docker' gives GPUs of NVIDIA alone, and resources.gpu_type is {resources.gpu_type!r}: use a "
                "target of a cluster that has them"
            )
        limits["DeviceRequests"] = [{"Driver": "nvidia", "Count": resources.gpu, "Capabilities": [["gpu"]]}]
    return limits
