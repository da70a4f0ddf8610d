"""Bounds on one worker's memory and CPU: a cgroup v2 of its own where one may be made, else rlimits and affinity.

RLIMIT_DATA is used, not RLIMIT_AS: mapped model files and libraries' reserved address space are not memory in use.
It counts private writable mappings, so a thread's stack counts with its full reserved size.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import zlib
from collections.abc import Sequence
from pathlib import Path

from mlfuncs.spec import Resources

CGROUP_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000  # the kernel's own default of cpu.max
log = logging.getLogger("mlfuncs.worker")


def apply_limits(resources: Resources, name: str) -> str:
    """Bind this process to `resources`; says how: "cgroup", "rlimit", or "" when nothing is limited."""
    if resources.memory_bytes is None and resources.cpu is None:
        return ""
    parent = cgroup_parent()
    if parent is not None and join_cgroup(parent, cgroup_name(name, os.getpid()), resources):
        return "cgroup"
    _apply_rlimits(resources, name)
    return "rlimit"


def cgroup_parent() -> Path | None:
    """Where this process and those it starts may make cgroups, or None."""
    return own_cgroup_parent(CGROUP_ROOT, Path("/proc/self/cgroup").read_text(encoding="ascii"))


def cgroup_name(name: str, pid: int) -> str:
    """The cgroup of the worker `name` in its parent."""
    return f"mlfuncs-{name}-{pid}"


def own_cgroup_parent(root: Path, proc_cgroup: str) -> Path | None:
    """The cgroup v2 folder in which this process may make a sibling of its own, or None.

    `proc_cgroup` is the text of /proc/self/cgroup. Controllers can only be enabled in a cgroup without processes
    (cgroups(7), "no internal processes"), so it is the parent that must pass memory and cpu on.
    """
    path = next((line[3:] for line in proc_cgroup.splitlines() if line.startswith("0::")), "")
    if path in ("", "/"):
        return None
    parent = (root / path.lstrip("/")).parent
    try:
        controllers = (parent / "cgroup.subtree_control").read_text(encoding="ascii").split()
    except OSError:
        return None
    writable = os.access(parent, os.W_OK) and os.access(parent / "cgroup.procs", os.W_OK)
    return parent if writable and {"memory", "cpu"} <= set(controllers) else None


def join_cgroup(parent: Path, name: str, resources: Resources) -> bool:
    """Make the cgroup `name` with the limits and move this process into it; False when the kernel refuses."""
    group = parent / name
    try:
        group.mkdir()
        if resources.memory_bytes is not None:
            (group / "memory.max").write_text(str(resources.memory_bytes))
        if resources.cpu is not None:
            (group / "cpu.max").write_text(f"{math.ceil(resources.cpu * _PERIOD_US)} {_PERIOD_US}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as exc:
        log.warning("no cgroup for this worker (%s); using rlimits", exc)
        return False
    return True


def close_cgroup(group: Path) -> bool:
    """Remove the cgroup of a worker that has ended; whether the kernel had killed it for memory (cgroups(7))."""
    try:
        events = (group / "memory.events").read_text(encoding="ascii").split()
    except OSError:
        events = []  # there is no such group, or it has no bound on memory
    with contextlib.suppress(OSError):
        group.rmdir()
    return int(dict(zip(events[::2], events[1::2], strict=True)).get("oom_kill", 0)) > 0


def _apply_rlimits(resources: Resources, name: str) -> None:
    if resources.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (resources.memory_bytes, resources.memory_bytes))
    if resources.cpu is not None:
        cores = pick_cores(sorted(os.sched_getaffinity(0)), resources.cpu, name)
        os.sched_setaffinity(0, cores)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(variable, str(len(cores)))


def pick_cores(available: Sequence[int], cpu: float, name: str) -> list[int]:
    """The cores a worker keeps to: `cpu` rounded up of those `available`, starting at one that depends on its name.

    >>> pick_cores([0, 1, 2, 3], 2, "rev-1-a")
    [0, 3]
    """
    count = min(len(available), math.ceil(cpu))
    start = zlib.crc32(name.encode()) % len(available)
    return sorted(available[(start + offset) % len(available)] for offset in range(count))
