"""The supervisor's side of triggers: tells the trigger process what to run, starts it when there is something to run.

It is started only when an endpoint has triggers, started again with back-off when it dies, and goes on while the
supervisor is away; the next supervisor finds it by process id and start time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlfuncs.settings import Settings
from mlfuncs_runtime.routes import Route
from mlfuncs_runtime.supervisor import processes
from mlfuncs_runtime.supervisor.places import Places, read_json, write_json
from mlfuncs_runtime.supervisor.plan import EndpointPlan
from mlfuncs_runtime.supervisor.processes import ProcessHandle
from mlfuncs_runtime.supervisor.reconcile import Failures
from mlfuncs_runtime.triggers.table import Entry, entries_of

log = logging.getLogger("mlfuncs.supervisor")

TOKEN = "MLFUNCS_TRIGGER_TOKEN"  # what the trigger process shows to endpoints that have tokens


def table_path(places: Places) -> Path:
    """What should run, for the trigger process."""
    return places.run / "triggers.json"


def process_path(places: Places) -> Path:
    """Which process it is and the token it shows, for the next supervisor."""
    return places.run / "trigger-process.json"


class Triggers:
    """Keeps one home's trigger process."""

    def __init__(self, settings: Settings, places: Places) -> None:
        self._settings, self._places = settings, places
        known = read_json(process_path(places)) or {}
        self._token = str(known.get("token") or secrets.token_urlsafe(32))
        self._process: ProcessHandle | None = processes.reopen(known.get("process"))
        self._failures = Failures()
        self._started_s = time.monotonic()
        self._start_at_s = 0.0
        self._told: dict[str, Any] | None = None
        self._entries: tuple[Entry, ...] = ()

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._process.pid if self._process else None

    def keep(self, plans: Iterable[EndpointPlan], url: str) -> None:
        """Bring the process to what the plans wish; `url` is the router's."""
        self._entries = entries_of(plans)
        table = {"url": url, "entries": [entry.to_dict() for entry in self._entries]}
        if table != self._told:
            write_json(table_path(self._places), table)
            self._told = table
        self._notice_end()
        if self._process is None and self._entries and time.monotonic() >= self._start_at_s:
            self._start()
        elif self._process is not None and not self._entries:
            self._process.send(15)  # its end is noticed in a later pass

    def admit(self, routes: Sequence[Route]) -> list[Route]:
        """`routes` with those endpoints that have tokens and triggers open to the trigger process."""
        called = {entry.endpoint for entry in self._entries}
        digest = hashlib.sha256(self._token.encode()).hexdigest()
        return [
            dataclasses.replace(
                route, access=dataclasses.replace(route.access, token_sha256=(*route.access.token_sha256, digest))
            )
            if route.endpoint in called and route.access.token_sha256
            else route
            for route in routes
        ]

    def status(self, endpoint: str) -> list[dict[str, Any]]:
        """One endpoint's triggers: kind, label, state, counts and the last error."""
        told = (read_json(self._places.triggers_status) or {}) if self._process else {}
        idle = {"state": "starting" if self._process else "stopped"}
        return [
            {"kind": entry.trigger.kind, "label": entry.trigger.label, **(told.get(entry.key) or idle)}
            for entry in self._entries
            if entry.endpoint == endpoint
        ]

    def stop(self, timeout_s: float = 10.0) -> None:
        """End it; calls under way are waited for."""
        if self._process is not None:
            processes.stop_sync([self._process], timeout_s)
            self._process = None
        for path in (table_path(self._places), self._places.triggers_status, process_path(self._places)):
            path.unlink(missing_ok=True)

    def _notice_end(self) -> None:
        if self._process is None or self._process.is_alive():
            return
        now_s, status = time.monotonic(), self._process.exit_status()
        self._process.close()
        self._process = None
        if self._entries:
            self._failures = self._failures.after(now_s, processes.describe_exit(status), now_s - self._started_s)
            self._start_at_s = now_s + self._failures.delay_s
            log.warning("the trigger process %s; it is started again", self._failures.reason)

    def _start(self) -> None:
        env = {**os.environ, **self._settings.to_environ(), TOKEN: self._settings.token or self._token}
        command = processes.module_command(sys.executable, "mlfuncs_runtime.triggers.process")
        write_json(process_path(self._places), {"token": self._token})  # before it shows it to anybody
        self._process = processes.spawn(command, env, self._places.logs / "triggers.log", self._places.run)
        self._started_s = time.monotonic()
        write_json(process_path(self._places), {"process": self._process.to_dict(), "token": self._token})
        log.info("the trigger process (%d) serves %d triggers", self._process.pid, len(self._entries))
