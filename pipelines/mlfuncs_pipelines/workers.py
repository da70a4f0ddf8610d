"""The engine's side of the warm processes in which steps run (see `zygote`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.errors import Unavailable

_ZYGOTE = Path(__file__).with_name("zygote.py")


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
    """How a step's process ended; `error` is set when the step's code could not be loaded.

    `output` is the executor output of a step of ours, unless that is long and in its file; `digests` has the SHA-256
    of large files that it wrote.
    """

    step_id: str
    code: int
    signal: int = 0
    max_rss_kib: int = 0
    cpu_s: float = 0.0
    error: str = ""
    output: Mapping[str, Any] | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a step's process is to do, or the file that says so.

    `environ` is this process's environment at the start of the run; `secret_env` is written down nowhere.
    """

    body: Mapping[str, Any] | None
    path: Path | None = None
    secret_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass
class Worker:
    """One zygote: `socket` is readable when something happened to a step of it.

    Steps given while it is still loading wait for it. A `single` one runs one step in itself; steps that it cannot
    take are left in `overflow` for whoever asked.
    """

    socket: socket.socket
    process: subprocess.Popen[bytes] | None = None  # None: forked from another zygote
    single: bool = False
    ready: bool = False
    pending: dict[str, Request] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    overflow: dict[str, Request] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # this process's when the zygote began
    own_env: frozenset[str] = frozenset()  # variables that the zygote has been given values of its own for

    def run(self, step_id: str, request: Request) -> None:
        """Start a step; its end comes as an Exit from `receive`."""
        if not self.ready:
            self.pending[step_id] = request
        elif self.single:
            self.overflow[step_id] = request
        else:
            self._run(step_id, request)

    def kill(self, step_id: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to the step's process group."""
        if step_id in self.pending or self.single:
            self.pending.clear()
            if self.process is not None:
                self.process.send_signal(number)
            return
        with contextlib.suppress(Unavailable):
            self.send({"op": "kill", "id": step_id, "signal": int(number)})

    def receive(self) -> list[Exit]:
        """What ended since the last time. A zygote that died ends all of its steps with signal 9."""
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            return self._lost()
        message = json.loads(data)
        if message["event"] == "exited":
            self.running.discard(message["id"])
            measured = message["max_rss_kib"], message["cpu_s"]
            results = {name: message[name] for name in ("output", "digests") if name in message}
            return [Exit(message["id"], message["code"], message["signal"], *measured, **results)]
        return self._loaded(message)

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell the zygote something. Raises Unavailable when it is gone."""
        try:
            self.socket.send(json.dumps(message).encode())
        except OSError as exc:
            raise Unavailable(f"a pipeline worker process is gone: {exc}") from exc

    def close(self) -> None:
        """Let the zygote go; it ends its children and itself."""
        self.socket.close()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)

    @property
    def is_closed(self) -> bool:
        """Whether the zygote was let go."""
        return self.socket.fileno() < 0

    @property
    def is_idle(self) -> bool:
        """Whether no step runs or waits here."""
        return not (self.running or self.pending or self.overflow)

    def _run(self, step_id: str, request: Request) -> None:
        self.running.add(step_id)
        body = {"path": str(request.path)} if request.path else {"request": request.body}
        environ = {**self._changes(request.environ), **request.secret_env}
        self.send({"op": "run", "id": step_id, "inline": self.single, "environ": environ, **body})

    def _changes(self, now: Mapping[str, str]) -> dict[str, str | None]:
        """What became of this process's environment since the zygote began; None for a variable that is gone."""
        if now == self.environ:
            return {}
        changed = {name: value for name, value in now.items() if self.environ.get(name) != value}
        gone = dict.fromkeys(self.environ.keys() - now.keys())
        return {name: value for name, value in {**changed, **gone}.items() if name not in self.own_env}

    def _loaded(self, message: Mapping[str, Any]) -> list[Exit]:
        """The zygote is ready, or says why it never will be: start what waited, or hand it back."""
        waiting, self.pending = self.pending, {}
        if message["event"] == "declined":
            self.single = True
            self.overflow.update(waiting)
            return []
        if message["error"]:
            return [Exit(step_id, 1, error=message["error"]) for step_id in waiting]
        self.ready = True
        self.single = self.single or not message["forkable"]
        for position, (step_id, request) in enumerate(waiting.items()):
            if self.single and position:
                self.overflow[step_id] = request
            else:
                self._run(step_id, request)
        return []

    def _lost(self) -> list[Exit]:
        code = -9
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(timeout=5)
        ended = [Exit(step_id, -1, abs(code) or 9) for step_id in sorted({*self.running, *self.pending})]
        self.running.clear()
        self.pending.clear()
        return ended


class WorkerPool:
    """Zygotes by what they preload, kept between runs of one process, about `limit` of them."""

    def __init__(self, limit: int = 24) -> None:
        self._workers: dict[Preload, Worker] = {}
        self._limit = limit
        self._lock = threading.Lock()

    def get(self, preload: Preload) -> Worker:
        """A zygote for `preload`, perhaps still loading: the one there is, or a new one.

        Where forking is not safe the answer is a fresh process each time, good for one step.
        """
        with self._lock:
            worker = self._workers.pop(preload, None)
            if worker is not None and worker.single:
                self._workers[preload] = worker  # remembered as what cannot be forked
                return _spawn(preload, single=True)
            if worker is not None and not _is_alive(worker):
                if worker.is_idle:  # else its run has still to hear of the end of its steps
                    worker.close()
                worker = None
            if worker is None:
                self._evict()
                worker = self._start(preload)
            self._workers[preload] = worker  # last in order: most recently used
            return worker

    def close(self) -> None:
        """End all zygotes."""
        with self._lock:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()

    def _start(self, preload: Preload) -> Worker:
        """A new zygote; for a step of ours forked from one that has the libraries, which are then loaded once."""
        if not preload.step:
            return _spawn(preload)
        key = Preload(preload.python, path=preload.path, env=preload.env)
        base = self._workers.get(key)
        if base is None or not _is_alive(base):
            base = self._workers[key] = _spawn(key)
        missing = [name for name in preload.modules if name not in base.modules]
        if missing:
            base.modules.update(missing)
            base.send({"op": "preload", "modules": missing})
        base.receive()  # its answers are of no interest, but must not pile up
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(base.socket, [json.dumps({"op": "fork"}).encode()], [theirs.fileno()])
        return _prepare(Worker(ours, environ=base.environ), preload)

    def _evict(self) -> None:
        idle = [key for key, worker in self._workers.items() if worker.is_idle and key.step]
        for key in idle[: max(0, len(self._workers) - self._limit)]:
            self._workers.pop(key).close()


def _spawn(preload: Preload, single: bool = False) -> Worker:
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
    return _prepare(Worker(ours, process, single, environ=dict(os.environ)), preload)


def _prepare(worker: Worker, preload: Preload) -> Worker:
    """Tell a new zygote what to load; its answer comes later."""
    step = json.loads(preload.step) if preload.step else None
    worker.send({"op": "preload", "modules": preload.modules, "path": preload.path, "step": step})
    worker.modules.update(preload.modules)
    worker.own_env = frozenset(name for name, _ in preload.env)
    worker.socket.setblocking(False)
    return worker


def _is_alive(worker: Worker) -> bool:
    """Whether the zygote still holds its end; the answer may be late while steps of it are being waited for."""
    try:
        return bool(worker.socket.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
