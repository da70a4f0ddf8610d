"""Serving one application on one listener with uvicorn, and ending without cutting a request short."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Generator
from typing import Any

import uvicorn
import uvloop

from mlfuncs.errors import StorageError
from mlfuncs_runtime.worker.asgi import WorkerApp
from mlfuncs_runtime.worker.calls import ThreadCalls
from mlfuncs_runtime.worker.forks import forbid_forks
from mlfuncs_runtime.worker.guard import Guard

BACKLOG = 1024
KEEP_ALIVE_S = 86_400  # the router keeps and closes the connections; a close from here could meet a request under way
LAME_DUCK_S = 0.1  # guess: a request that was on its way when SIGTERM came has arrived by then
EXIT_STUCK = 70  # EX_SOFTWARE of sysexits.h: a handler did not come back from a call
_SUN_PATH = 107  # bytes of a Unix socket's path, unix(7)


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket at `path`, owner-only; a socket file that is there is replaced. Raises StorageError.

    It listens before it gets its name, so whoever sees the file can connect.
    """
    unborn = f"{path}.new"
    if len(os.fsencode(unborn)) > _SUN_PATH:
        raise StorageError(f"socket path {path!r} is over {_SUN_PATH - 4} bytes; set MLFUNCS_HOME to a shorter folder")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unborn)
        listener.bind(unborn)
        os.chmod(unborn, 0o600)
        listener.listen(BACKLOG)
        os.rename(unborn, path)
    except OSError as exc:
        listener.close()
        raise StorageError(f"cannot listen on {path!r}: {exc.strerror}") from exc
    return listener


def preload() -> None:
    """Import what serving needs, in a process that will fork; starts nothing."""
    import httptools
    import uvicorn.lifespan.off as lifespan
    import uvicorn.protocols.http.httptools_impl as protocol

    assert httptools and lifespan and protocol


class _Server(uvicorn.Server):
    """uvicorn's server without its signals and its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def main_loop(self) -> None:
        while not self.should_exit:
            await self.on_tick(0)  # the Date header
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._ending.wait()

    def end(self) -> None:
        self.should_exit = True
        self._ending.set()


class Service:
    """One application on one listening socket, from start to drained. Call `run` on the process's main thread."""

    def __init__(self, app: WorkerApp, listener: socket.socket, drain_s: float = 30.0) -> None:
        self.app, self.listener, self.drain_s = app, listener, drain_s
        self.on_ready: Any = lambda: None
        self._loop = uvloop.new_event_loop()
        self._server: _Server | None = None
        self._joining: set[asyncio.Task[Any]] = set()
        self._config = uvicorn.Config(
            app,
            http="httptools",
            ws="wsproto" if app.handler.user_app is not None else "none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then finish what is in flight within `drain_s` and return."""
        forbid_forks()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.app.on_stuck = self._on_stuck
        guard = Guard(self.app, self.listener.dup(), self._loop, self._adopt)
        guard.start()
        calls = self.app.invocation.calls
        if isinstance(calls, ThreadCalls):
            calls.host(self._serve(), self._loop)
        else:
            self._loop.run_until_complete(self._serve())
        guard.stop()
        self._loop.close()

    async def _serve(self) -> None:
        await self.app.start()
        self._server = _Server(self._config)
        self.app.ready = True
        self.on_ready()
        await self._server.serve(sockets=[self.listener])
        # a handler that outlives the drain keeps its thread: nothing can end it but the process's own end
        last = threading.Timer(1.0, os._exit, [0])
        last.daemon = True
        last.start()

    def _adopt(self, connection: socket.socket) -> None:
        """Serve a connection that the guard accepted while the loop stood still."""
        if self._server is None or self._server.should_exit:
            connection.close()
            return
        connection.setblocking(False)
        joining = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
        self._joining.add(joining)
        joining.add_done_callback(self._joining.discard)

    def _protocol(self) -> asyncio.Protocol:
        assert self._server is not None
        make: Any = self._config.http_protocol_class
        state = self._server.server_state
        made: asyncio.Protocol = make(config=self._config, server_state=state, app_state={}, _loop=self._loop)
        return made

    def _on_signal(self, _number: int, _frame: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self.app.draining:
            return
        self.app.begin_drain()
        self._loop.call_later(LAME_DUCK_S, self._end)

    def _end(self) -> None:
        if self._server is not None:
            self._server.end()
        else:  # still starting: nothing is in flight
            os._exit(0)

    def _on_stuck(self) -> None:
        self._loop.call_later(0.1, os._exit, EXIT_STUCK)  # the answers to what waited go out first
