"""Processes by pidfd: a handle names one process for ever, where a process id may come to name another.

Handles of processes that an earlier supervisor started are opened by id and start time, so that an id that was given
to another program meanwhile is recognised.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SAFE_PATH = "-P"  # the working directory is not on the module path of what we start


@dataclass
class ProcessHandle:
    """One process; `started` is field 22 of /proc/<pid>/stat, in clock ticks since boot."""

    pid: int
    started: int
    _fd: int
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def send(self, number: int) -> bool:
        """Send a signal to exactly this process; False when it is gone."""
        try:
            signal.pidfd_send_signal(self._fd, number)
        except (ProcessLookupError, OSError):
            return False
        return True

    def is_alive(self) -> bool:
        """Whether the process still runs; a zombie does not."""
        return self._fd >= 0 and not _ends(self._fd, 0.0)

    def wait_sync(self, timeout_s: float) -> bool:
        """Block until the process is gone; False when it still runs after `timeout_s`."""
        gone = self._fd < 0 or _ends(self._fd, timeout_s)
        if gone:
            self.exit_status()
        return gone

    async def wait(self) -> None:
        """Return when the process is gone."""
        if not self.is_alive():
            return
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        loop.add_reader(self._fd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self._fd)

    def exit_status(self) -> int | None:
        """The exit status as in subprocess, reaping a child; None when it runs or was someone else's child."""
        return self._child.poll() if self._child else None

    def close(self) -> None:
        """Give the handle back; the process goes on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def to_dict(self) -> dict[str, int]:
        """What `reopen` needs to find the same process again."""
        return {"pid": self.pid, "started": self.started}


def _ends(handle: int, timeout_s: float) -> bool:
    """Whether the process of a pidfd is gone within the time; by poll(2), as select(2) takes no handle over 1023."""
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    return bool(watch.poll(timeout_s * 1000))


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is none, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def open_process(pid: int, started: int | None = None) -> ProcessHandle | None:
    """A handle of the running process, or None when it is gone or started at another time than `started`."""
    try:
        handle = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return None
    ticks = start_ticks(pid)  # read after the open: from here on the id cannot be given away unnoticed
    if ticks is None or (started is not None and ticks != started):
        os.close(handle)
        return None
    return ProcessHandle(pid, ticks, handle)


def reopen(values: Mapping[str, Any] | None) -> ProcessHandle | None:
    """The process that `to_dict` described, or None when it is gone."""
    if not values or not values.get("pid"):
        return None
    return open_process(int(values["pid"]), int(values["started"]))


def spawn(
    argv: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path, pass_fds: Sequence[int] = ()
) -> ProcessHandle:
    """Start a process in a session of its own, its output appended to `log`. Raises OSError when it cannot start."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(log, "ab") as output:
        child = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    handle = os.pidfd_open(child.pid)  # cannot fail: the child is not reaped before we ask
    return ProcessHandle(child.pid, start_ticks(child.pid) or 0, handle, child)


def module_command(python: str | os.PathLike[str], module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of ours under `python`."""
    return [str(python), _SAFE_PATH, "-m", module, *arguments]


def end_session(leader: int, home: Path) -> list[int]:
    """Kill what a worker that has ended left behind: the programs of its session that carry this home; their ids.

    The kernel gives the leader's id to nobody else while its session has members; the home tells a session that got
    the id later. What made a session of its own (setsid) wanted to outlive the worker, and does.
    """
    mark, ended = b"MLFUNCS_HOME=" + os.fsencode(home), []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == leader:
            continue
        with contextlib.suppress(OSError):
            if os.getsid(int(name)) != leader:
                continue
            handle = open_process(int(name))
            if handle is None:
                continue
            if os.getsid(handle.pid) == leader and mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                handle.send(signal.SIGKILL)
                ended.append(handle.pid)
            handle.close()
    return ended


def stop_sync(handles: Sequence[ProcessHandle], timeout_s: float, home: Path | None = None) -> None:
    """SIGTERM to all (continued first, when parked), then SIGKILL to those that stay longer than `timeout_s`.

    With `home`, also to what they left behind in their sessions.
    """
    for handle in handles:
        handle.send(signal.SIGCONT)
        handle.send(signal.SIGTERM)
    for handle in handles:
        if not handle.wait_sync(timeout_s):
            handle.send(signal.SIGKILL)
            handle.wait_sync(5.0)
        handle.close()
        if home is not None:
            end_session(handle.pid, home)


def describe_exit(status: int | None) -> str:
    """How a process ended, for people.

    >>> describe_exit(-9), describe_exit(1)
    ('was killed by SIGKILL', 'ended with status 1')
    """
    if status is None:
        return "is gone"
    if status < 0:
        name = str(-status)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
        return f"was killed by {name}"
    return f"ended with status {status}"
