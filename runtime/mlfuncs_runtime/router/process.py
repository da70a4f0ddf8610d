"""The router's process: `python -m mlfuncs_runtime.router.process --socket-fd N --control PATH [--state FILE]`.

It serves a listener that it inherits (so that a restart loses no connection) or binds, and takes orders as JSON lines
on a Unix socket. Callers must send MLFUNCS_TOKEN as a bearer token when it is set.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import hashlib
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from mlfuncs.errors import MlfuncsError, SpecError
from mlfuncs.settings import read_settings
from mlfuncs_runtime import control
from mlfuncs_runtime.router.client import Client
from mlfuncs_runtime.router.control import RouterOrders, Waker
from mlfuncs_runtime.router.core import Core, RouterOptions
from mlfuncs_runtime.router.spans import open_router_spans

BACKLOG = 4096
_GC_ALLOCATIONS = 100_000
_LOOK_S = 0.5  # how often overdue connections are looked for
_OWN_FILES = 128  # descriptors that are not for clients and their workers; a guess
_SWITCH_S = 0.0005  # a request waits no longer than this for the thread that encodes spans; Python's default is 5 ms
_LAME_DUCK_S = 0.2  # after SIGTERM an idle connection may still bring a request that is on its way; a guess
log = logging.getLogger("mlfuncs.router")


class Router:
    """One listener, its connections, and the control socket."""

    def __init__(
        self,
        listener: socket.socket,
        options: RouterOptions | None = None,
        *,
        supervisor: Path | None = None,
        state: Path | None = None,
    ) -> None:
        self._listener = listener
        self._waker = Waker(supervisor)
        self.core = Core(options or RouterOptions(), self._waker.wake)
        self._waker.core = self.core
        self.orders = RouterOrders(self.core, state)
        self._server: asyncio.Server | None = None
        self._control: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, control_path: Path | None = None) -> None:
        """Accept connections and orders."""
        self.orders.restore()
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        if self.core.spans is not None:
            sys.setswitchinterval(_SWITCH_S)
            self.core.spans.export.start()
        if control_path is not None:
            self._control = await control.serve(control_path, self.orders.answer)
        self._server = await loop.create_server(lambda: Client(self.core), sock=self._listener, backlog=BACKLOG)
        self._tasks = [loop.create_task(self._look_after_clients()), loop.create_task(self._waker.run())]

    async def drain(self) -> None:
        """Accept no more, finish what is in flight, and close; gives up after the drain timeout."""
        core = self.core
        if self._server is not None:
            self._server.close()
        core.drain()
        deadline_s = time.monotonic() + core.options.drain_timeout_s
        lame_until_s = time.monotonic() + _LAME_DUCK_S
        while core.clients and time.monotonic() < deadline_s:
            if time.monotonic() >= lame_until_s:
                for client in list(core.clients):
                    client.close_if_idle()
            await asyncio.sleep(0.02)
        self.stop()

    def stop(self) -> None:
        """Close everything now."""
        for task in self._tasks:
            task.cancel()
        for server in (self._server, self._control):
            if server is not None:
                server.close()
        for client in list(self.core.clients):
            client.transport.abort()
        self.core.close()
        if self.core.spans is not None:
            self.core.spans.export.stop()

    async def _look_after_clients(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now_s = time.monotonic()
            for client in [client for client in self.core.clients if client.due_s <= now_s]:
                client.overdue()


def open_listener(arguments: argparse.Namespace) -> socket.socket:
    """The inherited listener, else one bound to host and port. Raises SpecError when it cannot be used."""
    if arguments.socket_fd is not None:
        try:
            return socket.socket(fileno=arguments.socket_fd)
        except OSError as exc:
            raise SpecError(f"--socket-fd {arguments.socket_fd} is not a socket ({exc.strerror})") from exc
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((arguments.host, arguments.port))
        listener.listen(BACKLOG)
    except OSError as exc:
        raise SpecError(f"cannot listen on {arguments.host}:{arguments.port} ({exc.strerror}); choose another") from exc
    return listener


def check_reach(listener: socket.socket, tokens: Sequence[str]) -> None:
    """Raise SpecError when other machines reach the listener and no token is asked for."""
    if listener.family == socket.AF_UNIX or tokens:
        return
    host = listener.getsockname()[0]
    if not ipaddress.ip_address(host).is_loopback:
        raise SpecError(
            f"the router listens on {host!r}, which other machines can reach: set MLFUNCS_TOKEN, which callers must "
            "send as a bearer token, or listen on 127.0.0.1"
        )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m mlfuncs_runtime.router.process", description="The local HTTP router."
    )
    parser.add_argument("--socket-fd", "--fd", type=int, help="an inherited listening socket")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--control", type=Path, help="path of the Unix socket that takes orders")
    parser.add_argument("--supervisor", type=Path, help="path of the supervisor's socket")
    parser.add_argument("--state", type=Path, help="file that keeps the table between two routers")
    parser.add_argument("--triggers", type=Path, help="file in which the trigger process says how it goes")
    parser.add_argument("--token-sha256", action="append", default=[], help="digest of a token that callers may send")
    parser.add_argument("--max-clients", type=int, default=RouterOptions.max_clients, help="connections at once")
    parser.add_argument("--access-log", choices=["", "text", "json"], default="")
    return parser.parse_args(arguments)


async def serve(listener: socket.socket, options: RouterOptions, arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    router = Router(listener, options, supervisor=arguments.supervisor, state=arguments.state)
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    await router.start(arguments.control)
    log.info("serving on %s", listener.getsockname())
    await ending.wait()
    await router.drain()


def most_clients(wanted: int) -> int:
    """How many connections may be held: `wanted`, or what this process's file descriptors allow (two for each)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, (soft - _OWN_FILES) // 2))


def main(command_line: Sequence[str] | None = None) -> int:
    """Run a router process; the exit status."""
    arguments = parse_arguments(command_line)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    token = os.environ.get("MLFUNCS_TOKEN", "")
    digests = [*arguments.token_sha256, *([hashlib.sha256(token.encode()).hexdigest()] if token else [])]
    try:
        listener = open_listener(arguments)
        check_reach(listener, digests)
        spans = open_router_spans(read_settings(), log)
    except MlfuncsError as exc:
        print(f"mlfuncs router: {exc}", file=sys.stderr)
        return 1
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS)  # requests hold no cycles; looking for some took 2 us of each (measured)
    options = RouterOptions(
        token_sha256=tuple(digests),
        access_log=arguments.access_log,
        max_clients=most_clients(arguments.max_clients),
        triggers=arguments.triggers,
        spans=spans,
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(listener, options, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
