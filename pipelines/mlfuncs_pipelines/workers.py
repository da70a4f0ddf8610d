"""The engine's side of the warm processes in which steps run (see `zygote`)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.errors import DeadlineExceeded, Unavailable

_ZYGOTE = Path(__file__).with_name("zygote.py")
_READY_TIMEOUT_S = 300.0  # a preload imports the user's libraries, which may be slow on a cold disk


@dataclass(frozen=True)
class Preload:
    """What a zygote imports before its first fork. `step` names a bundle of ours (see `step.load`)."""

    python: str
    modules: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    step: str = ""  # JSON object; text, so that the whole is hashable
    env: tuple[tuple[str, str], ...] = ()


@dataclass
class Exit:
    """How a step's process ended."""

    step_id: str
    code: int
    signal: int
    max_rss_kib: int
    cpu_s: float


@dataclass
class Worker:
    """One zygote: `socket` is readable when a step of it ended."""

    socket: socket.socket
    process: subprocess.Popen[bytes] | None = None  # None: forked from another zygote
    forkable: bool = True
    error: str = ""
    running: set[str] = field(default_factory=set)

    def run(self, step_id: str, request: Path) -> None:
        """Start the step whose request is in a file; its end comes as an Exit from `receive`."""
        self.running.add(step_id)
        self._send({"op": "run", "id": step_id, "request": str(request), "inline": not self.forkable})

    def kill(self, step_id: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to the step's process group."""
        with contextlib.suppress(Unavailable):
            self._send({"op": "kill", "id": step_id, "signal": int(number)})

    def receive(self) -> list[Exit]:
        """The steps that ended. A zygote that died ends all of its steps with signal 9."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            ended = [Exit(step_id, self._exit_code(), 0, 0, 0.0) for step_id in sorted(self.running)]
            self.running.clear()
            return ended
        message = json.loads(data)
        if message["event"] != "exited":
            return []
        self.running.discard(message["id"])
        return [Exit(message["id"], message["code"], message["signal"], message["max_rss_kib"], message["cpu_s"])]

    def close(self) -> None:
        """Let the zygote go; it ends its children and itself."""
        self.socket.close()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)

    def _exit_code(self) -> int:
        if self.process is None:
            return -9
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=5)
        return -9

    def _send(self, message: Mapping[str, Any]) -> None:
        try:
            self.socket.send(json.dumps(message).encode())
        except OSError as exc:
            raise Unavailable(f"a pipeline worker process is gone: {exc}") from exc


class WorkerPool:
    """Zygotes by what they preload, kept between runs of one process, at most `limit` of them."""

    def __init__(self, limit: int = 24) -> None:
        self._workers: dict[Preload, Worker] = {}
        self._limit = limit
        self._lock = threading.Lock()

    def get(self, preload: Preload) -> Worker:
        """The zygote for `preload`, started (or forked from a plainer one) when there is none yet."""
        with self._lock:
            worker = self._workers.pop(preload, None)
            if worker is not None and not _is_alive(worker):
                worker.close()
                worker = None
            if worker is None:
                self._evict()
                worker = self._start(preload)
            self._workers[preload] = worker  # last in order: most recently used
            return worker

    def spare(self, preload: Preload) -> Worker:
        """A fresh process for exactly one step, for what cannot be forked safely."""
        worker = _spawn(preload)
        worker.forkable = False
        return worker

    def close(self) -> None:
        """End all zygotes."""
        with self._lock:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()

    def _start(self, preload: Preload) -> Worker:
        if not preload.step:
            return _spawn(preload)
        base_preload = Preload(preload.python, modules=("mlfuncs_pipelines.step",), path=preload.path, env=preload.env)
        base = self._workers.get(base_preload)
        if base is None or not _is_alive(base):
            base = self._workers[base_preload] = _spawn(base_preload)
        if not base.forkable:
            return _spawn(preload)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(base.socket, [json.dumps({"op": "fork"}).encode()], [theirs.fileno()])
        return _prepare(Worker(ours), preload)

    def _evict(self) -> None:
        idle = [key for key, worker in self._workers.items() if not worker.running]
        for key in idle[: max(0, len(self._workers) - self._limit)]:
            self._workers.pop(key).close()


def _spawn(preload: Preload) -> Worker:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(preload.env)}
    with theirs:
        process = subprocess.Popen(
            [preload.python, "-P", str(_ZYGOTE), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the engine alone, which then ends the steps in order
        )
    return _prepare(Worker(ours, process), preload)


def _prepare(worker: Worker, preload: Preload) -> Worker:
    step = json.loads(preload.step) if preload.step else None
    worker._send({"op": "preload", "modules": preload.modules, "path": preload.path, "step": step})
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        ready, _, _ = select.select([worker.socket], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            worker.close()
            raise DeadlineExceeded(f"a pipeline worker was not ready after {_READY_TIMEOUT_S:.0f} s")
        data = worker.socket.recv(1 << 20)
        if not data:
            raise Unavailable("a pipeline worker ended while it was starting")
        message = json.loads(data)
        if message["event"] == "ready":
            worker.forkable, worker.error = message["forkable"], message["error"]
            worker.socket.setblocking(False)
            return worker


def _is_alive(worker: Worker) -> bool:
    """Whether the zygote still holds its end; called only while none of its steps is being waited for elsewhere."""
    if worker.running:
        return True
    try:
        return bool(worker.socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
