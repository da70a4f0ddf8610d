"""What a supervisor knows of its processes: the records of workers and zygotes, and the failures of revisions.

The books are written to `run/state.json` before and after each change, so that a supervisor that takes over after a
`kill -9` finds all that runs, by process id and start time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlfuncs_runtime.control import ControlClient
from mlfuncs_runtime.supervisor.places import Places, write_json
from mlfuncs_runtime.supervisor.processes import ProcessHandle
from mlfuncs_runtime.supervisor.reconcile import Failures, Key, Observed, Phase, ReplicaSeen, ZygotePhase, ZygoteSeen

log = logging.getLogger("mlfuncs.supervisor")

EXIT_LOAD_FAILED = 78  # EX_CONFIG of sysexits.h: the process says why in "<socket>.error"


@dataclass(frozen=True)
class Launch:
    """How processes of a revision are started; made by the supervisor from the registry."""

    python: str
    config: Mapping[str, Any]  # a WorkerConfig as a dict, without replica and socket
    env: Mapping[str, str]
    log: Path
    module: str = "mlfuncs_runtime.worker.process"  # what a replica's process runs
    forks: bool = True  # whether a zygote may fork replicas


@dataclass
class ReplicaRecord:
    """One worker."""

    seen: ReplicaSeen
    socket: str
    process: ProcessHandle | None = None
    misses: int = 0
    released: asyncio.Task[None] | None = None  # waits until the router has nothing in flight there

    def move(self, phase: Phase) -> None:
        """Enter a phase now."""
        self.seen = replace(self.seen, phase=phase, since_s=time.monotonic())

    @property
    def pid(self) -> int | None:
        """Its process id, once known."""
        return self.process.pid if self.process else None


@dataclass
class ZygoteRecord:
    """One zygote and the connection to it."""

    seen: ZygoteSeen
    path: Path
    process: ProcessHandle | None = None
    client: ControlClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = ControlClient(self.path)

    def move(self, phase: ZygotePhase) -> None:
        """Enter a phase now."""
        self.seen = replace(self.seen, phase=phase, since_s=time.monotonic())


class Books:
    """The records, their file, and the tasks that watch the processes. Lives on one asyncio loop."""

    def __init__(self, places: Places, launch: Callable[[Key], Awaitable[Launch]], changed: Callable[[], None]) -> None:
        self.places, self.launch, self.changed = places, launch, changed
        self.replicas: dict[str, ReplicaRecord] = {}
        self.zygotes: dict[Key, ZygoteRecord] = {}
        self.failures: dict[Key, Failures] = {}
        self.extra: dict[str, Any] = {}  # what else the supervisor wants remembered
        self._tasks: set[asyncio.Task[None]] = set()
        self._saved = ""

    def observe(self) -> Observed:
        """What is there now."""
        return Observed(
            tuple(record.seen for record in self.replicas.values()),
            tuple(record.seen for record in self.zygotes.values()),
            dict(self.failures),
        )

    def fail(self, key: Key, reason: str, ready_for_s: float = 0.0, fatal: bool = False) -> None:
        """Count a failure of a revision."""
        failures = self.failures.get(key, Failures()).after(time.monotonic(), reason, ready_for_s)
        self.failures[key] = replace(failures, count=max(failures.count, 2)) if fatal else failures
        log.warning("%s %s: %s (failure %d in a row)", *key, reason, self.failures[key].count)

    def save(self) -> None:
        """Remember everything on disk, when it is not what was remembered last."""
        values = {
            "replicas": [
                {**_key_dict(r.seen.key), "id": r.seen.id, "socket": r.socket, "phase": str(r.seen.phase)}
                | {"since_s": r.seen.since_s, "process": r.process.to_dict() if r.process else None}
                for r in self.replicas.values()
            ],
            "zygotes": [
                {**_key_dict(z.seen.key), "path": str(z.path), "phase": str(z.seen.phase), "since_s": z.seen.since_s}
                | {"process": z.process.to_dict() if z.process else None}
                for z in self.zygotes.values()
            ],
            "failures": [
                {**_key_dict(key), "count": f.count, "last_s": f.last_s, "reason": f.reason}
                for key, f in self.failures.items()
            ],
            "extra": self.extra,
        }
        text = json.dumps(values)
        if text != self._saved:
            write_json(self.places.state, values)
            self._saved = text

    def all_processes(self) -> list[ProcessHandle]:
        """Every worker and zygote that runs, workers first."""
        records: list[ReplicaRecord | ZygoteRecord] = [*self.replicas.values(), *self.zygotes.values()]
        return [record.process for record in records if record.process]

    async def forget(self) -> None:
        """Stop watching; the processes go on."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside the passes; what it raises is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the supervisor failed", exc_info=task.exception())


def _key_dict(key: Key) -> dict[str, str]:
    return {"endpoint": key[0], "revision": key[1]}


def load_error(path: str) -> str:
    """Why a worker or zygote could not load its bundle, from the problem document beside its socket."""
    try:
        problem = json.loads(Path(f"{path}.error").read_text(encoding="utf-8"))
        return f": {problem['title']}: {problem['detail']}"
    except (OSError, ValueError, KeyError):
        return ""
