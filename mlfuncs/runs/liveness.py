"""Which process executes a run, and whether it still does.

A process of this machine is looked up by pid and start time, so a reused pid is not mistaken for it, and by boot id, so
a reboot ends it. A process elsewhere (another host, another container) is believed while its heartbeat is fresh.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEARTBEAT_S = 10.0
LEASE_S = 60.0  # guess: six missed heartbeats; a long pause of a busy machine must not fail its runs


def this_process() -> dict[str, Any]:
    """This process as a run's owner: machine, host, pid and start time, ready for JSON."""
    return _owner(os.getpid())


def is_alive(owner: Mapping[str, Any] | None, heartbeat_age_s: float | None) -> bool:
    """Whether the owner still runs; `heartbeat_age_s` decides when it is not of this machine."""
    if owner and owner.get("machine") == machine():
        return _start_time(int(owner["pid"])) == owner.get("pid_start")
    return heartbeat_age_s is not None and heartbeat_age_s <= LEASE_S


@functools.cache
def machine() -> str:
    """What two processes share exactly when they see the same pids: host name, boot and pid namespace."""
    return f"{socket.gethostname()}/{_boot_id()}/{_pid_namespace()}"


@functools.lru_cache(maxsize=4)
def _owner(pid: int) -> dict[str, Any]:
    return {"machine": machine(), "host": socket.gethostname(), "pid": pid, "pid_start": _start_time(pid)}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import psutil

        return str(int(psutil.boot_time()))


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> float | None:
    """When the process started, in whatever unit the system has; None when there is no such process or it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (ProcessLookupError, PermissionError):
        return None
    else:
        return None if fields[0] in "ZX" else float(fields[19])  # proc(5): field 3 is the state, 22 the start time
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
