"""The target "process": endpoints as processes of this machine, kept by the supervisor of the home.

Any order that finds no supervisor starts one, detached from the caller's session, so that a notebook's end, a closed
terminal or a killed supervisor leaves no endpoint without one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import Conflict, DeployFailed, MlfuncsError, NotFound, Unavailable
from mlfuncs.readiness import readable
from mlfuncs.serving.client import error_of
from mlfuncs.serving.targets import EndpointStatus, ReplicaStatus, Report, router_url
from mlfuncs.settings import Settings
from mlfuncs_runtime.control import call
from mlfuncs_runtime.supervisor import processes
from mlfuncs_runtime.supervisor.places import find_places, make_places, read_json, remove_sockets

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow

START_S = 60.0
_POLL_S = 1.0
_DELETE_TRIES = 20  # of 30 s each: a worker may drain for as long as its function may take
_FOLLOW_S = 0.2


class ProcessTarget:
    """Endpoints of one home on this machine."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = find_places(settings)

    def apply(self, row: EndpointRow) -> None:
        """Make sure that the supervisor runs and has read the registry."""
        self._order({"op": "poke", "secrets": self._secrets(row)}, timeout_s=30.0)

    def wait(self, row: EndpointRow, rollout: str, timeout_s: float, report: Report) -> None:
        """Return when the rollout is complete. Raises DeployFailed with the end of the log."""
        deadline = time.monotonic() + timeout_s
        message = ""
        while time.monotonic() < deadline:
            order = {"op": "wait", "endpoint": row.name, "rollout": rollout, "timeout_s": _POLL_S, "message": message}
            answer = self._order(order, timeout_s=_POLL_S + 10.0)
            if answer["state"] == "complete":
                return
            if answer["state"] == "replaced":
                raise DeployFailed(f"endpoint {row.name!r}: {answer['message']}")
            if answer["state"] == "failed":
                raise DeployFailed(_failure(row, answer["message"], answer.get("log") or []))
            message = answer["message"]
            report(message)
        self._give_up(row, rollout, f"not ready after {timeout_s:g} s ({message or 'waiting'})")

    def url(self, row: EndpointRow) -> str:
        """Where the router takes requests for the endpoint."""
        self.start()
        return f"{router_url(self._settings)}/{row.name}"

    def status(self, row: EndpointRow) -> EndpointStatus:
        """What runs now."""
        self.start()
        found = [e for e in self.overview()["endpoints"] if e["name"] == row.name and e["project"] == row.project]
        if not found:
            raise NotFound("endpoint", row.name)
        return _status(found[0])

    def logs(self, row: EndpointRow, n: int, follow: bool) -> Iterator[str]:
        """The last lines of the newest revision that has written any, and then every further one of all revisions."""
        from mlfuncs_runtime.supervisor.orders import tail

        folder = self._places.logs / "endpoints" / row.name
        logs = sorted(folder.glob("*.log"), key=_last_write)
        ends = {path: _size(path) for path in logs}
        lines = [line for path in logs[-1:] for line in tail(path, n)]
        return _followed(folder, lines, ends) if follow else iter(lines)

    def delete(self, row: EndpointRow) -> None:
        """Return when no process of the endpoint is left and its tombstone is gone."""
        self.apply(row)
        order = {"op": "wait_deleted", "endpoint": row.name, "project": row.project, "timeout_s": 30.0}
        for _ in range(_DELETE_TRIES):
            if self._order(order, timeout_s=40.0)["deleted"]:
                return
        what = f"endpoint {row.name!r} is deleted, but its processes still run"
        raise Unavailable(f"{what}: see the logs in {self._places.logs}")

    # --- the home as a whole, for the command line

    def start(self) -> dict[str, Any]:
        """Make sure that the supervisor runs; its pid, url and version."""
        answer = self._answer({"op": "ping"}, 5.0) or self._launch()
        self._check_registry(answer)
        return answer

    def overview(self) -> dict[str, Any]:
        """Supervisor, router and the project's endpoints as they are; starts nothing. All empty when nothing runs."""
        answer = self._answer({"op": "status", "project": self._settings.project}, 10.0)
        return answer or {"supervisor": None, "router": None, "endpoints": []}

    def stop(self) -> list[int]:
        """Stop everything of this home and return the ids of what was stopped; the registry and the logs stay."""
        stopped: list[int] = []
        supervisor = self._supervisor_process()
        if supervisor is not None:
            stopped += self._running()
            with suppress(MlfuncsError):
                call(self._places.supervisor_socket, {"op": "shutdown"}, 10.0)
            if not supervisor.wait_sync(40.0):
                processes.stop_sync([supervisor], 5.0)
            stopped.append(supervisor.pid)
        stopped += self._stop_leftovers()
        if self._places.sockets.exists():
            remove_sockets(self._places)
        return sorted(set(stopped))

    def _order(self, order: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The supervisor's answer; one that is not there is started."""
        answer = self._answer(order, timeout_s)
        if answer is None:
            self._check_registry(self._launch())
            answer = call(self._places.supervisor_socket, order, timeout_s)
        elif order["op"] == "poke":
            self._check_registry(answer)
        return answer

    def _answer(self, order: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        """The answer of a running supervisor, or None when none answers."""
        try:
            return call(self._places.supervisor_socket, order, timeout_s)
        except Unavailable:
            return None

    def _launch(self) -> dict[str, Any]:
        """Start a supervisor and wait until it answers; another process may be quicker. Raises why it cannot."""
        make_places(self._settings)
        reader, writer = os.pipe()
        command = processes.module_command(
            sys.executable, "mlfuncs_runtime.supervisor.process", "--ready-fd", str(writer)
        )
        with open(self._places.logs / "supervisor.log", "ab") as log:
            child = subprocess.Popen(
                command,
                env={**os.environ, **self._settings.to_environ()},
                cwd=self._places.run,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(writer,),
            )
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            line = file.readline() if readable([reader], START_S) else b""
        child.wait()  # the supervisor itself is a child of that one, so that none of ours is left as a zombie
        answer = json.loads(line) if line else {}
        if answer and not (answer["already_runs"] and self._answers_soon(START_S)):  # another process was quicker
            raise error_of(answer["error"], answer["message"])
        if not self._answers_soon(2.0):
            raise Unavailable(f"the supervisor did not start; see {self._places.logs / 'supervisor.log'}")
        return call(self._places.supervisor_socket, {"op": "ping"})

    def _answers_soon(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            if self._answer({"op": "ping"}, 5.0):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)

    def _check_registry(self, answer: dict[str, Any]) -> None:
        from mlfuncs_runtime.supervisor.orders import registry_mark

        if answer["registry"] != registry_mark(self._settings.resolved_registry_url):
            raise Conflict(
                f"the supervisor (pid {answer['pid']}) of {str(self._settings.home)!r} uses another registry than "
                "MLFUNCS_REGISTRY_URL names: run 'mlfuncs down' there first, or set another MLFUNCS_HOME"
            )

    def _secrets(self, row: EndpointRow) -> dict[str, str]:
        """Values that this process's environment has for secrets of the endpoint: the supervisor's may lack them."""
        names = {name for revision in row.revisions for name in revision.config["spec"].get("secrets") or ()}
        return {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}

    def _give_up(self, row: EndpointRow, rollout: str, message: str) -> None:
        from mlfuncs.registry import open_registry
        from mlfuncs.serving.rollouts import fail_rollout, outcome_of

        endpoints = open_registry(self._settings).endpoints
        after = endpoints.update(row.name, lambda desired, _row: fail_rollout(desired, rollout, message))
        if outcome_of(after.desired, rollout).state != "complete":
            self.apply(after)
            raise DeployFailed(_failure(row, message, [str(line) for line in self.logs(row, 20, False)]))

    def _supervisor_process(self) -> processes.ProcessHandle | None:
        answer = self._answer({"op": "ping"}, 5.0)
        pid = answer["pid"] if answer else ((read_json(self._places.state) or {}).get("extra") or {}).get("supervisor")
        handle = processes.open_process(int(pid)) if pid else None
        if handle is not None and not answer and not _is_supervisor(handle.pid):
            handle.close()
            return None
        return handle

    def _running(self) -> list[int]:
        """Ids of the router, workers and zygotes that the state file names."""
        return [handle.pid for handle in self._noted()]

    def _noted(self) -> list[processes.ProcessHandle]:
        state = read_json(self._places.state) or {}
        entries = [
            (state.get("extra") or {}).get("sentinel"),
            (read_json(self._places.router_json) or {}).get("process"),
        ]
        entries += [entry.get("process") for part in ("replicas", "zygotes") for entry in state.get(part) or ()]
        return [handle for handle in map(processes.reopen, entries) if handle is not None]

    def _stop_leftovers(self) -> list[int]:
        """End what a dead supervisor left behind: the sentinel at first, so that it starts no other."""
        found = self._noted()
        pids = [handle.pid for handle in found]
        processes.stop_sync(found, 10.0, self._places.home)
        return pids


def _is_supervisor(pid: int) -> bool:
    with suppress(OSError):
        return b"mlfuncs_runtime.supervisor.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _status(values: dict[str, Any]) -> EndpointStatus:
    replicas = tuple(ReplicaStatus(r["id"], r["revision"], r["state"], r["pid"]) for r in values["replicas"])
    return EndpointStatus(**{**values, "replicas": replicas, "revisions": tuple(values["revisions"])})


def _failure(row: EndpointRow, message: str, lines: list[str]) -> str:
    serving = row.desired.get("traffic")
    kept = f"; {', '.join(serving)} still serves" if serving else ""
    log = "\nlast lines of its log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""
    return f"endpoint {row.name!r}: {message}{kept}{log}"


def _followed(folder: Path, lines: list[str], ends: dict[Path, int]) -> Iterator[str]:
    """`lines`, then whole lines as they are written to any log in `folder`."""
    yield from lines
    while True:
        found = False
        for path in sorted(folder.glob("*.log")):
            size = _size(path)
            start = ends.setdefault(path, 0)
            if size < start:  # moved aside
                ends[path] = start = 0
            if size > start:
                with open(path, "rb") as file:
                    file.seek(start)
                    text = file.read(size - start)
                whole = text[: text.rfind(b"\n") + 1]
                ends[path] = start + len(whole)
                for line in whole.decode("utf-8", "replace").splitlines():
                    found = True
                    yield line
        if not found:
            time.sleep(_FOLLOW_S)


def _last_write(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0
