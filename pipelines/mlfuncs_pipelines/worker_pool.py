"""Warm processes kept between the runs of one process, and lent to one run at a time."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlfuncs.errors import Unavailable
from mlfuncs_pipelines.messages import Environment, Preload
from mlfuncs_pipelines.workers import SPARES, Worker

_ZYGOTE = Path(__file__).with_name("zygote.py")


@dataclass
class _Base:
    """A zygote that runs no step: others are forked from it once it has the `modules`."""

    worker: Worker
    modules: set[str] = field(default_factory=set)


class WorkerPool:
    """Zygotes by what they preload, about `limit` of them."""

    def __init__(self, limit: int = 24) -> None:
        self._workers: dict[Preload, Worker] = {}
        self._bases: dict[Preload, _Base] = {}
        self._limit = limit
        self._lock = threading.Lock()
        _pools.add(self)

    def get(self, preload: Preload) -> Worker:
        """A zygote for `preload`, perhaps still loading: the one there is, or a new one.

        Where forking is not safe the answer is a fresh process each time, good for one step.
        """
        with self._lock:
            worker = self._workers.pop(preload, None)
            if worker is not None and worker.single:
                self._workers[preload] = worker  # remembered as what cannot be forked
                return _spawn(preload, single=True)
            if worker is not None and not worker.is_alive:
                if worker.is_idle:  # else its run has still to hear of the end of its steps
                    worker.close()
                worker = None
            if worker is None:
                self._evict()
                worker = self._start(preload) if preload.step else _spawn(preload)
            self._workers[preload] = worker  # last in order: most recently used
            return worker

    def close(self) -> None:
        """End all zygotes."""
        with self._lock:
            self._drop_all(wait=True)

    def disown(self) -> None:
        """In a fork of this process: leave the zygotes to the process that started them."""
        self._lock = threading.Lock()  # another thread may have held the old one
        self._drop_all(wait=False)

    def _drop_all(self, wait: bool) -> None:
        for worker in (*self._workers.values(), *(base.worker for base in self._bases.values())):
            worker.close(wait)
        self._workers.clear()
        self._bases.clear()

    def _start(self, preload: Preload) -> Worker:
        """A new zygote for a step of ours, forked from one that has the libraries, which are then loaded once."""
        try:
            return _fork(self._base(preload), preload)
        except Unavailable:  # that one died in this moment
            return _fork(self._base(preload), preload)

    def _base(self, preload: Preload) -> _Base:
        key = Preload(preload.python, path=preload.path, env=preload.env)
        base = self._bases.get(key)
        if base is None or not base.worker.is_alive:
            if base is not None:
                base.worker.close()
            base = self._bases[key] = _Base(_spawn(key, spares=0))
        return base

    def _evict(self) -> None:
        idle = [key for key, worker in self._workers.items() if worker.is_idle and key.step]
        for key in idle[: max(0, len(self._workers) - self._limit)]:
            self._workers.pop(key).close()


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_idle: list[WorkerPool] = []  # a run has a pool to itself, because it alone may read what its workers say
_lock = threading.Lock()


@contextlib.contextmanager
def worker_pool() -> Iterator[WorkerPool]:
    """Warm processes for one run: those that an earlier run of this process left, unless another has them now.

    A run that was interrupted leaves none: what its workers were about to say is not known.
    """
    with _lock:
        pool = _idle.pop() if _idle else WorkerPool()
    try:
        yield pool
    except BaseException:
        pool.close()
        raise
    with _lock:
        _idle.append(pool)


def close_workers() -> None:
    """End all warm processes that no run uses."""
    with _lock:
        while _idle:
            _idle.pop().close()


def _after_fork() -> None:
    """A fork of this process, as multiprocessing makes them, must not talk to the workers of its parent."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()
    for pool in list(_pools):
        pool.disown()


atexit.register(close_workers)
os.register_at_fork(after_in_child=_after_fork)


def _spawn(preload: Preload, single: bool = False, spares: int = SPARES) -> Worker:
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
    known = Environment(own=dict(preload.env))
    return _prepare(Worker(ours, known, process, single, spares), preload)


def _fork(base: _Base, preload: Preload) -> Worker:
    """A zygote forked from `base`, which gets the libraries first."""
    missing = [name for name in preload.modules if name not in base.modules]
    if missing:
        base.modules.update(missing)
        base.worker.send({"op": "preload", "modules": missing})
    base.worker.receive()  # its answers are of no interest, but must not pile up
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            socket.send_fds(base.worker.socket, [json.dumps({"op": "zygote"}).encode()], [theirs.fileno()])
        except OSError as exc:
            ours.close()
            raise Unavailable(f"a pipeline worker process is gone: {exc}") from exc
    known = Environment(own=dict(preload.env), since=base.worker.environment.began)
    return _prepare(Worker(ours, known), preload)


def _prepare(worker: Worker, preload: Preload) -> Worker:
    """Tell a new zygote what to load; its answer comes later."""
    step = json.loads(preload.step) if preload.step else None
    worker.send({"op": "preload", "modules": preload.modules, "path": preload.path, "step": step})
    worker.socket.setblocking(False)
    return worker
