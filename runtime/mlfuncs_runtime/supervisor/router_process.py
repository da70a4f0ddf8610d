"""The router's process: started with a listener that the supervisor binds and keeps, watched, and told what to do."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from mlfuncs.errors import Conflict, MlfuncsError, SpecError, Unavailable
from mlfuncs.settings import Settings
from mlfuncs_runtime.control import ControlClient
from mlfuncs_runtime.routes import Route
from mlfuncs_runtime.supervisor import processes
from mlfuncs_runtime.supervisor.places import Places, read_json, write_json
from mlfuncs_runtime.supervisor.processes import ProcessHandle
from mlfuncs_runtime.supervisor.reconcile import Failures

log = logging.getLogger("mlfuncs.supervisor")

BACKLOG = 4096  # connections that wait in the kernel while a router restarts
_START_S = 30.0


class RouterProcess:
    """The one router of a home. Restarted when it dies; connections wait in the listener meanwhile."""

    def __init__(self, settings: Settings, places: Places) -> None:
        self._settings, self._places = settings, places
        self._client = ControlClient(places.router_socket)
        self._process: ProcessHandle | None = None
        self._listener: socket.socket | None = None
        self._stopping = False
        self._sent: list[dict[str, Any]] | None = None
        self.address = (settings.host, settings.port)

    @property
    def url(self) -> str:
        """Its base URL."""
        host, port = self.address
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Go on with the running router, else bind and start one. Raises Conflict when the port is taken."""
        known = read_json(self._places.router_json)
        if known:
            self.address = (known["host"], int(known["port"]))
            self._process = processes.reopen(known.get("process"))
            if self._process is not None and await self._answers(5.0):
                log.info("the router (%d) runs on at %s", self._process.pid, self.url)
                return
            if self._process is not None:
                processes.stop_sync([self._process], 2.0)
            if self._settings.port and self._settings.port != self.address[1]:
                self.address = (self._settings.host, self._settings.port)
        self._bind()
        await self._spawn()

    async def watch(self) -> None:
        """Restart the router whenever it dies; runs until cancelled."""
        failures = Failures()
        while True:
            assert self._process is not None
            started_s = time.monotonic()
            await self._process.wait()
            status = self._process.exit_status()
            self._process.close()
            if self._stopping:
                return
            now_s = time.monotonic()
            failures = failures.after(now_s, processes.describe_exit(status), now_s - started_s)
            log.warning("the router %s; it is started again", failures.reason)
            await asyncio.sleep(failures.delay_s)
            self._sent = None
            try:
                if self._listener is None:
                    self._bind()
                await self._spawn()
            except (MlfuncsError, OSError) as exc:  # e.g. the port was taken meanwhile: tried again, later each time
                log.error("%s", exc)
                self._process.send(signal.SIGKILL)  # one that runs and does not answer is none

    async def configure(self, routes: Sequence[Route]) -> None:
        """Give the router the whole table, when it is not the one it has."""
        table = [route.to_dict() for route in routes]
        if table != self._sent:
            await self._client.call({"op": "configure", "routes": table}, timeout_s=10.0)
            self._sent = table

    async def stats(self) -> dict[str, Any]:
        """What it measured since the last call."""
        return await self._client.call({"op": "stats"}, timeout_s=5.0)

    async def drained(self, replica: str, timeout_s: float) -> None:
        """Return when nothing is in flight at that replica."""
        client = ControlClient(self._places.router_socket)  # its own: the answer may take as long as a request
        try:
            await client.call({"op": "drain", "replica": replica}, timeout_s=timeout_s)
        finally:
            client.close()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End it; it answers what is in flight first."""
        self._stopping = True
        self._client.close()
        if self._process is not None:
            processes.stop_sync([self._process], timeout_s)
            self._process = None
        if self._listener is not None:
            self._listener.close()

    def _bind(self) -> None:
        host, port = self.address
        check_host(host, self._settings.token)
        self._listener = bind(host, port)
        self.address = (host, self._listener.getsockname()[1])

    async def _spawn(self) -> None:
        assert self._listener is not None
        descriptor = self._listener.fileno()
        self._places.router_socket.unlink(missing_ok=True)
        command = processes.module_command(
            sys.executable,
            "mlfuncs_runtime.router.process",
            *("--socket-fd", str(descriptor)),
            *("--control", str(self._places.router_socket)),
            *("--supervisor", str(self._places.supervisor_socket)),
            *("--state", str(self._places.routes_json)),
            *("--triggers", str(self._places.triggers_status)),
        )
        env = {**os.environ, **self._settings.to_environ()}
        log_path = self._places.logs / "router.log"
        self._process = processes.spawn(command, env, log_path, self._places.run, pass_fds=[descriptor])
        self._note()
        if not await self._answers(_START_S):
            raise Unavailable(f"the router did not start; see {log_path}")
        log.info("the router (%d) serves at %s", self._process.pid, self.url)

    def _note(self) -> None:
        assert self._process is not None
        host, port = self.address
        values = {"url": self.url, "host": host, "port": port, "pid": self._process.pid}
        write_json(self._places.router_json, {**values, "process": self._process.to_dict()})

    async def _answers(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process is not None and self._process.is_alive():
            if self._places.router_socket.exists():
                try:
                    await self._client.call({"op": "ping"}, timeout_s=5.0)
                    return True
                except Unavailable:
                    pass
            await asyncio.sleep(0.01)
        return False


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises Conflict when the port is taken, SpecError for an address that is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise Conflict(
                f"port {port} of {host} is taken by another program: set MLFUNCS_PORT to a free port, or to 0 for any"
            ) from exc
        if exc.errno == errno.EACCES:
            raise Conflict(f"port {port} needs more rights than this user has: set MLFUNCS_PORT above 1023") from exc
        raise SpecError(f"cannot listen on {host}:{port} ({exc.strerror or exc}): set MLFUNCS_HOST") from exc
    listener.setblocking(False)
    return listener


def check_host(host: str, token: str) -> None:
    """Raise SpecError when the address can be reached from other machines and no token is asked for."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and not token:
        raise SpecError(
            f"MLFUNCS_HOST is {host!r}, which other machines can reach: set MLFUNCS_TOKEN, which callers must send as "
            "a bearer token, or leave MLFUNCS_HOST at 127.0.0.1"
        )
