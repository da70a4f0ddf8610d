"""A process that has loaded a revision and forks its workers: milliseconds instead of seconds.

    python -m mlfuncs_runtime.worker.zygote --config FILE.json --control PATH.sock

Orders are JSON lines on the control socket, one answer each:

    {"op": "ping"}                                           {"ok": true, "pid": ..}, or why it cannot fork
    {"op": "fork", "replica": id, "socket": path}            {"ok": true, "pid": ..}
       optional: "log_path", "requested_at" (time.monotonic() of the wish, for the cold start metric)
    {"op": "exits"}                                          {"exits": [{"pid": .., "status": ..}]} since last asked

fork() copies only the calling thread: a lock that another thread holds, or an OpenMP pool that has started, would hang
the child. So the zygote loads with one thread per numeric library and forks only while it has a single thread; when
user code has started others (importing polars does) it says which, and ends: its workers are spawned instead. Forked
workers live on when their zygote dies. The socket is bound by the child, so that SO_PEERCRED names it and not the
zygote.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import Conflict, InvalidInput, MlfuncsError
from mlfuncs.settings import Settings, read_settings
from mlfuncs_runtime.worker import process as worker
from mlfuncs_runtime.worker.config import WorkerConfig

if TYPE_CHECKING:
    from mlfuncs_runtime.worker.asgi import WorkerApp

log = logging.getLogger("mlfuncs.zygote")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
# pyarrow (and so pandas) starts jemalloc's background thread on import, unless told not to
_QUIET = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_ENDING = (signal.SIGTERM, signal.SIGINT)
_ORDER_LIMIT = 65_536  # bytes of one order


def main(argv: Sequence[str] | None = None) -> int:
    """Run a zygote, or, in a forked child, the worker it became; the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlfuncs_runtime.worker.zygote", description=__doc__)
    parser.add_argument("--config", required=True, help="path of a WorkerConfig as JSON")
    parser.add_argument("--control", required=True, help="path of the control socket")
    arguments = parser.parse_args(argv)
    config = WorkerConfig.read(arguments.config)
    settings = read_settings()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1") | _QUIET)
    try:
        app = _load(config, settings)
    except Exception as exc:  # noqa: BLE001 - the user's module may raise anything; reported below
        worker.report_load_failure(dataclasses.replace(config, socket=arguments.control), exc)
        return worker.EXIT_LOAD_FAILED
    child = Zygote(config, arguments.control).run()
    if child is None:
        return 0
    become_worker(child, settings)
    worker.serve(app, child)
    return 0


def _load(config: WorkerConfig, settings: Settings) -> WorkerApp:
    """The application, with everything that a worker imports loaded too, and the heap settled for sharing."""
    from mlfuncs_runtime.worker import heap, server, spans

    worker.prepare_process(dataclasses.replace(config, resources=type(config.resources)()), settings, shared=True)
    app = worker.load_app(config, settings)
    server.preload()
    if settings.otel_endpoint:
        spans.preload()
    heap.settle()
    return app


def other_threads() -> list[str]:
    """The names of this process's threads beside the calling one, as the kernel has them."""
    own = str(os.getpid())
    names = []
    for task in os.listdir("/proc/self/task"):
        if task != own:
            with contextlib.suppress(OSError):
                names.append(Path(f"/proc/self/task/{task}/comm").read_text(encoding="utf-8").strip())
    return sorted(names)


def why_not_to_fork() -> str:
    """What a child of this process could not live with, for people; empty when it may fork.

    numba's OpenMP layer ends a child that uses it when it has run before the fork, also without any thread (one core).
    """
    if threads := other_threads():
        return f"the function's code has started threads ({', '.join(threads)}) while it was loaded"
    if (numba := sys.modules.get("numba")) is not None:
        with contextlib.suppress(ValueError):  # no parallel kernel has run yet
            if (
                numba.threading_layer() == "omp"
            ):  # with one core it has no thread, and yet ends every child that uses it
                return "the function's code has run a parallel numba kernel while it was loaded"
    return ""


def become_worker(config: WorkerConfig, settings: Settings) -> None:
    """In the child: a session, a log, limits, threads and randomness of its own."""
    os.setsid()
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    _set_threads(max(1, math.ceil(config.resources.cpu or 1)))
    worker.prepare_process(config, settings)


def _set_threads(threads: int) -> None:
    """Give the numeric libraries, which were loaded with one thread, as many as the worker has cores."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if threads > 1:
        with contextlib.suppress(ImportError):
            from threadpoolctl import threadpool_limits

            threadpool_limits(threads)


class Zygote:
    """Answers orders on one control socket; `run` returns None at the end, or in a child the config to serve."""

    def __init__(self, config: WorkerConfig, control: str) -> None:
        from mlfuncs_runtime.worker.server import listen_unix

        self._config = config
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._listener = listen_unix(control)
        self._buffers: dict[socket.socket, bytes] = {}
        self._exits: list[dict[str, int]] = []
        self._ending = False
        self._refused = False

    def run(self) -> WorkerConfig | None:
        """Take orders until SIGTERM; in a forked child, return at once with that worker's config."""
        for number in _ENDING:
            signal.signal(number, self._end)
        wake, woken = socket.socketpair()
        for end in (wake, woken):
            end.setblocking(False)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(wake, selectors.EVENT_READ)
        log.info("zygote of %s %s is loaded", self._config.endpoint, self._config.revision)
        child = None
        while not self._ending and child is None:
            for key, _ in self._selector.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is self._listener:
                    self._accept()
                elif source is wake:
                    with contextlib.suppress(BlockingIOError):
                        wake.recv(64)
                else:
                    child = self._take_orders(source)
                    if child is not None:
                        break
        signal.set_wakeup_fd(-1)
        self._close(unlink=child is None)
        for end in (wake, woken):
            end.close()
        return child

    def _end(self, _number: int, _frame: Any) -> None:
        self._ending = True

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _take_orders(self, connection: socket.socket) -> WorkerConfig | None:
        """Answer the whole lines that have come on one connection; in a forked child, its config."""
        try:
            data = connection.recv(_ORDER_LIMIT)
        except OSError:
            data = b""
        *lines, rest = (self._buffers[connection] + data).split(b"\n")
        self._buffers[connection] = rest
        if not data or len(rest) > _ORDER_LIMIT:
            self._drop(connection)
        for line in lines:
            child: WorkerConfig | None = None
            try:
                order = _parse(line)
                answer, child = self._obey(order)
            except MlfuncsError as exc:
                answer = {"error": exc.title, "message": str(exc)}
            if child is not None:
                return child
            try:
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except OSError:
                self._drop(connection)
            if self._refused:
                self._ending = True
        return None

    def _obey(self, order: dict[str, Any]) -> tuple[dict[str, Any], WorkerConfig | None]:
        match order.get("op"):
            case "ping":
                self._check_forkable()
                return {"ok": True, "pid": os.getpid()}, None
            case "fork":
                return self._fork(order)
            case "exits":
                self._reap()
                exits, self._exits = self._exits, []
                return {"ok": True, "exits": exits}, None
            case other:
                raise InvalidInput(f"unknown op {other!r}; known: ping, fork, exits")

    def _check_forkable(self) -> None:
        if reason := why_not_to_fork():
            self._refused = True
            mend = "its workers are spawned, which takes longer. Do that on the first request instead"
            raise Conflict(f"cannot fork: {reason}; {mend}")

    def _fork(self, order: dict[str, Any]) -> tuple[dict[str, Any], WorkerConfig | None]:
        """Fork; the parent's answer, or the child's config. Raises Conflict when it cannot, InvalidInput."""
        try:
            config = dataclasses.replace(
                self._config,
                replica=str(order["replica"]),
                socket=str(order["socket"]),
                log_path=str(order.get("log_path") or self._config.log_path),
                requested_at=None if order.get("requested_at") is None else float(order["requested_at"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise InvalidInput(f"a fork order needs 'replica' and 'socket': {exc!r} is missing or wrong") from exc
        self._check_forkable()
        self._reap()
        try:
            pid = _fork_mortal()
        except OSError as exc:
            raise Conflict(f"cannot fork: {exc.strerror}; spawn instead") from exc
        if pid == 0:
            return {}, config
        return {"ok": True, "pid": pid}, None

    def _reap(self) -> None:
        """Collect the children that have ended; status as in subprocess (negative: the signal that killed it)."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._exits.append({"pid": pid, "status": os.waitstatus_to_exitcode(status)})

    def _drop(self, connection: socket.socket) -> None:
        if self._buffers.pop(connection, None) is not None:
            self._selector.unregister(connection)
            connection.close()

    def _close(self, unlink: bool) -> None:
        """Close everything of the zygote's own; its end, or a child's beginning."""
        self._selector.close()  # first, and without unregistering: a child's epoll set is the zygote's own
        for connection in self._buffers:
            connection.close()
        self._buffers.clear()
        self._listener.close()
        if unlink:
            with contextlib.suppress(OSError):
                os.unlink(self._control)


def _fork_mortal() -> int:
    """As os.fork(); a SIGTERM ends the child from its first moment, where the zygote's handler would swallow it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        pid = os.fork()
        if pid == 0:
            for number in _ENDING:
                signal.signal(number, signal.SIG_DFL)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        order = json.loads(line)
    except ValueError as exc:
        raise InvalidInput(f"an order must be one line of JSON: {exc}") from exc
    if not isinstance(order, dict):
        raise InvalidInput("an order must be a JSON object with an 'op'")
    return order


if __name__ == "__main__":
    sys.exit(main())
