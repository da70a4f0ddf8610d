"""The workers and zygotes of one home: starts, watches, signals and remembers them.

Everything is remembered in `run/state.json` before and after each change, so that a supervisor that takes over after a
`kill -9` finds all that runs, by process id and start time, and goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError, Unavailable
from mlfuncs_runtime import probing, processes
from mlfuncs_runtime.control import ControlClient
from mlfuncs_runtime.places import Places, write_json
from mlfuncs_runtime.processes import ProcessHandle
from mlfuncs_runtime.reconcile import (
    Action,
    DrainReplica,
    Failures,
    Key,
    KillReplica,
    Observed,
    ParkReplica,
    Phase,
    ReplicaSeen,
    StartReplica,
    StartZygote,
    StopReplica,
    StopZygote,
    UnparkReplica,
    ZygotePhase,
    ZygoteSeen,
)
from mlfuncs_runtime.routes import Replica

log = logging.getLogger("mlfuncs.supervisor")

HEALTH_EVERY_S = 5.0
HEALTH_TIMEOUT_S = 5.0
HEALTH_MISSES = 3
_ORPHAN_WAIT_S = 10.0  # a worker whose start was noted but not its process: time to show itself
_EXIT_LOAD_FAILED = 78  # EX_CONFIG of sysexits.h: the worker says why in "<socket>.error"


@dataclass(frozen=True)
class Launch:
    """How processes of a revision are started; made by the supervisor from the registry."""

    python: str
    config: Mapping[str, Any]  # a WorkerConfig as a dict, without replica and socket
    env: Mapping[str, str]
    log: Path


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


class Fleet:
    """Carries out the reconciler's actions and tells what is there. Runs on one asyncio loop."""

    def __init__(
        self,
        places: Places,
        launch: Callable[[Key], Awaitable[Launch]],
        drain: Callable[[str, float], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        self.replicas: dict[str, ReplicaRecord] = {}
        self.zygotes: dict[Key, ZygoteRecord] = {}
        self.failures: dict[Key, Failures] = {}
        self.extra: dict[str, Any] = {}  # what else the supervisor wants remembered
        self._places, self._launch, self._drain, self._changed = places, launch, drain, changed
        self._tasks: set[asyncio.Task[None]] = set()
        self._saved = ""
        self._exits: dict[int, int] = {}  # of forked workers, as their zygotes told

    def observe(self) -> Observed:
        """What is there now."""
        return Observed(
            tuple(record.seen for record in self.replicas.values()),
            tuple(record.seen for record in self.zygotes.values()),
            dict(self.failures),
        )

    def routable(self, endpoint: str) -> list[Replica]:
        """The workers of an endpoint that take requests."""
        return [
            Replica(r.seen.id, r.seen.revision, r.socket)
            for r in self.replicas.values()
            if r.seen.endpoint == endpoint and r.seen.phase is Phase.READY and r.seen.healthy
        ]

    def carry_out(self, action: Action) -> None:
        """Begin one action of the reconciler; its end shows in `observe`."""
        match action:
            case StartZygote(endpoint, revision):
                self._start_zygote((endpoint, revision))
            case StopZygote(endpoint, revision):
                self._stop_zygote(self.zygotes[(endpoint, revision)])
            case StartReplica(endpoint, revision, fork):
                self._start_replica((endpoint, revision), fork)
            case DrainReplica(id, reason):
                log.info("%s %s: it takes no new requests", id, reason)
                self.replicas[id].move(Phase.DRAINING)
            case StopReplica(id):
                self._signal(self.replicas[id], signal.SIGTERM, Phase.STOPPING)
            case KillReplica(id, reason):
                self._kill(self.replicas[id], reason)
            case ParkReplica(id):
                self.replicas[id].move(Phase.PARKED)
            case UnparkReplica(id):
                self._unpark(self.replicas[id])

    def release(self) -> None:
        """After the router knows who takes requests: wait for those in flight at the workers taken out."""
        for record in self.replicas.values():
            if record.seen.phase in (Phase.DRAINING, Phase.PARKED) and record.released is None:
                record.released = self._run(self._release(record))

    def fail(self, key: Key, reason: str, ready_for_s: float = 0.0, fatal: bool = False) -> None:
        """Count a failure of a revision."""
        failures = self.failures.get(key, Failures()).after(time.monotonic(), reason, ready_for_s)
        self.failures[key] = replace(failures, count=max(failures.count, 2)) if fatal else failures
        log.warning("%s %s: %s (failure %d in a row)", *key, reason, self.failures[key].count)

    async def adopt(self, state: Mapping[str, Any]) -> None:
        """Go on with what an earlier supervisor started and that still runs."""
        self.extra = dict(state.get("extra") or {})
        for values in state.get("zygotes") or ():
            self._adopt_zygote(values)
        for values in state.get("replicas") or ():
            self._adopt_replica(values)
        for values in state.get("failures") or ():
            self.failures[(values["endpoint"], values["revision"])] = Failures(
                values["count"], values["last_s"], values["reason"]
            )

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
            write_json(self._places.state, values)
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

    # --- workers

    def _start_replica(self, key: Key, fork: bool) -> None:
        name = f"{key[0]}-{key[1]}-{secrets.token_hex(3)}"
        socket = str(self._places.sockets / f"w-{secrets.token_hex(5)}.sock")
        now_s = time.monotonic()
        record = ReplicaRecord(ReplicaSeen(name, *key, Phase.STARTING, now_s), socket)
        self.replicas[name] = record
        self.save()  # before the process exists: a supervisor that takes over looks for it on its socket
        self._run(self._bring_up(record, self.zygotes.get(key) if fork else None, now_s))

    async def _bring_up(self, record: ReplicaRecord, zygote: ZygoteRecord | None, wished_s: float) -> None:
        try:
            if zygote is not None:
                record.process = await self._fork(record, zygote, wished_s)
            else:
                record.process = await self._spawn(record, wished_s)
        except (MlfuncsError, OSError) as exc:
            if self.replicas.pop(record.seen.id, None):
                self.fail(record.seen.key, f"a worker could not be started: {exc}")
            self._changed()
            return
        if record.seen.phase in (Phase.STOPPING, Phase.KILLED):  # not wanted any more before it was there
            record.process.send(signal.SIGKILL)
        self._watch(record)

    async def _fork(self, record: ReplicaRecord, zygote: ZygoteRecord, wished_s: float) -> ProcessHandle:
        order = {"op": "fork", "replica": record.seen.id, "socket": record.socket, "requested_at": wished_s}
        try:
            answer = await zygote.client.call(order, timeout_s=15.0)
        except Unavailable:
            raise
        except MlfuncsError as exc:
            log.warning("%s %s: its zygote cannot fork (%s); workers are spawned instead", *record.seen.key, exc)
            zygote.move(ZygotePhase.UNUSABLE)
            return await self._spawn(record, wished_s)
        handle = processes.open_process(int(answer["pid"]))
        if handle is None:
            raise Unavailable(f"the forked worker {answer['pid']} ended at once{_load_error(record.socket)}")
        return handle

    async def _spawn(self, record: ReplicaRecord, wished_s: float) -> ProcessHandle:
        launch = await self._launch(record.seen.key)
        config = {**launch.config, "replica": record.seen.id, "socket": record.socket, "requested_at": wished_s}
        path = self._places.configs / f"{record.seen.id}.json"
        write_json(path, config)
        command = processes.module_command(launch.python, "mlfuncs_runtime.worker", "--config", str(path))
        return processes.spawn(command, launch.env, launch.log, self._places.run)

    def _watch(self, record: ReplicaRecord) -> None:
        self._run(self._await_end(record))
        if record.seen.phase is Phase.STARTING:
            self._run(self._await_ready(record))

    async def _await_ready(self, record: ReplicaRecord) -> None:
        delay_s = 0.001
        while record.seen.phase is Phase.STARTING and record.seen.id in self.replicas:
            answer = await probing.probe(record.socket, probing.READY_PATH, HEALTH_TIMEOUT_S)
            if answer.pid and record.process is None:
                record.process = processes.open_process(answer.pid)
                if record.process:
                    self._run(self._await_end(record))
            if answer.status == 200 and record.seen.phase is Phase.STARTING and record.process:
                record.move(Phase.READY)
                self._changed()
                return
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 1.2, 0.05)

    async def _await_end(self, record: ReplicaRecord) -> None:
        assert record.process is not None
        await record.process.wait()
        status = record.process.exit_status()
        record.process.close()
        if status is None:
            status = await self._exit_by_zygote(record.seen.key, record.process.pid)
        if self.replicas.pop(record.seen.id, None) is None:
            return
        seen = record.seen
        if seen.phase in (Phase.STARTING, Phase.READY, Phase.PARKED):
            ready_for_s = 0.0 if seen.phase is Phase.STARTING else time.monotonic() - seen.since_s
            cause = _load_error(record.socket)
            reason = f"worker {record.process.pid} {processes.describe_exit(status)}{cause}"
            self.fail(seen.key, reason, ready_for_s, fatal=status == _EXIT_LOAD_FAILED or bool(cause))
        for path in (record.socket, record.socket + ".error", str(self._places.configs / f"{seen.id}.json")):
            Path(path).unlink(missing_ok=True)
        self._changed()

    async def _exit_by_zygote(self, key: Key, pid: int) -> int | None:
        """The exit status of a forked worker, which its parent knows; None when that is gone."""
        zygote = self.zygotes.get(key)
        if zygote is not None and zygote.seen.phase is ZygotePhase.READY:
            with contextlib.suppress(MlfuncsError):
                answer = await zygote.client.call({"op": "exits"}, timeout_s=1.0)
                self._exits.update({int(end["pid"]): int(end["status"]) for end in answer["exits"]})
        return self._exits.pop(pid, None)

    def _signal(self, record: ReplicaRecord, number: int, phase: Phase) -> None:
        if record.seen.phase is Phase.PARKED and record.process:
            record.process.send(signal.SIGCONT)
        record.move(phase)
        if record.process:
            record.process.send(number)

    def _kill(self, record: ReplicaRecord, reason: str) -> None:
        log.warning("%s %s and is killed", record.seen.id, reason)
        if record.seen.phase is Phase.STARTING:
            self.fail(record.seen.key, f"worker {record.pid or ''} {reason}")
        self._signal(record, signal.SIGKILL, Phase.KILLED)
        if record.process is None:  # its start was noted and nothing ever came of it
            self.replicas.pop(record.seen.id, None)

    def _unpark(self, record: ReplicaRecord) -> None:
        if record.released:
            record.released.cancel()
            record.released = None
        if record.process:
            record.process.send(signal.SIGCONT)
        record.move(Phase.READY)

    async def _release(self, record: ReplicaRecord) -> None:
        with contextlib.suppress(MlfuncsError):
            await self._drain(record.seen.id, 3600.0)
        if record.seen.phase is Phase.PARKED and record.process:
            record.process.send(signal.SIGSTOP)
        elif record.seen.phase is Phase.DRAINING:
            record.seen = replace(record.seen, drained=True)
            self._changed()

    async def check_health(self) -> None:
        """Ask every ready worker whether it lives; one that stays silent several times in a row is unhealthy."""

        async def ask(record: ReplicaRecord) -> None:
            answer = await probing.probe(record.socket, probing.LIVE_PATH, HEALTH_TIMEOUT_S)
            record.misses = 0 if answer.status else record.misses + 1
            if record.misses >= HEALTH_MISSES and record.seen.phase is Phase.READY:
                record.seen = replace(record.seen, healthy=False)
                self.fail(
                    record.seen.key, f"worker {record.pid} does not answer", time.monotonic() - record.seen.since_s
                )
                self._changed()

        ready = [record for record in self.replicas.values() if record.seen.phase is Phase.READY]
        await asyncio.gather(*(ask(record) for record in ready))

    # --- zygotes

    def _start_zygote(self, key: Key) -> None:
        path = self._places.sockets / f"z-{secrets.token_hex(5)}.sock"
        record = ZygoteRecord(ZygoteSeen(*key, ZygotePhase.STARTING, time.monotonic()), path)
        self.zygotes[key] = record
        self._run(self._bring_up_zygote(record))

    async def _bring_up_zygote(self, record: ZygoteRecord) -> None:
        key = record.seen.key
        try:
            launch = await self._launch(key)
            config = self._places.configs / f"zygote-{key[0]}-{key[1]}.json"
            write_json(config, launch.config)
            arguments = ("--config", str(config), "--control", str(record.path))
            command = processes.module_command(launch.python, "mlfuncs_runtime.zygote", *arguments)
            record.process = processes.spawn(command, launch.env, launch.log, self._places.run)
        except (MlfuncsError, OSError) as exc:
            self.zygotes.pop(key, None)
            self.fail(key, f"its zygote could not be started: {exc}", fatal=isinstance(exc, MlfuncsError))
            self._changed()
            return
        self.save()
        self._watch_zygote(record)

    def _watch_zygote(self, record: ZygoteRecord) -> None:
        self._run(self._await_zygote_end(record))
        if record.seen.phase is ZygotePhase.STARTING:
            self._run(self._await_zygote_ready(record))

    async def _await_zygote_ready(self, record: ZygoteRecord) -> None:
        delay_s = 0.005
        while record.seen.phase is ZygotePhase.STARTING and self.zygotes.get(record.seen.key) is record:
            if record.path.exists():
                try:
                    await record.client.call({"op": "ping"}, timeout_s=120.0)
                    record.move(ZygotePhase.READY)
                    self._changed()
                    return
                except Unavailable:
                    pass
                except MlfuncsError as exc:
                    log.info("%s %s: no zygote (%s); workers are spawned", *record.seen.key, exc)
                    record.move(ZygotePhase.UNUSABLE)
                    self._changed()
                    return
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 1.2, 0.05)

    async def _await_zygote_end(self, record: ZygoteRecord) -> None:
        assert record.process is not None
        await record.process.wait()
        status = record.process.exit_status()
        record.process.close()
        record.client.close()
        record.path.unlink(missing_ok=True)
        key, phase = record.seen.key, record.seen.phase
        if self.zygotes.get(key) is not record:
            return
        error = _load_error(str(record.path))
        if phase is ZygotePhase.UNUSABLE:
            record.process = None  # it said that it cannot fork and left; the record keeps a new one from being tried
        else:
            del self.zygotes[key]
            if phase is not ZygotePhase.STOPPING:
                ready_for_s = time.monotonic() - record.seen.since_s if phase is ZygotePhase.READY else 0.0
                reason = f"its zygote {processes.describe_exit(status)}{error}"
                self.fail(key, reason, ready_for_s, fatal=status == _EXIT_LOAD_FAILED)
        Path(f"{record.path}.error").unlink(missing_ok=True)
        self._changed()

    def _stop_zygote(self, record: ZygoteRecord) -> None:
        record.move(ZygotePhase.STOPPING)
        if record.process is None or not record.process.send(signal.SIGTERM):
            self.zygotes.pop(record.seen.key, None)

    # --- taking over

    def _adopt_replica(self, values: Mapping[str, Any]) -> None:
        seen = ReplicaSeen(
            values["id"], values["endpoint"], values["revision"], Phase(values["phase"]), values["since_s"]
        )
        record = ReplicaRecord(seen, values["socket"], processes.reopen(values.get("process")))
        if record.process is None and (values.get("process") or seen.phase is not Phase.STARTING):
            Path(record.socket).unlink(missing_ok=True)
            return
        self.replicas[seen.id] = record
        if record.process is not None:
            self._watch(record)
        else:
            self._run(self._find_orphan(record))

    async def _find_orphan(self, record: ReplicaRecord) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ORPHAN_WAIT_S):
                await self._await_ready(record)
        if record.process is None:
            self.replicas.pop(record.seen.id, None)
            self._changed()

    def _adopt_zygote(self, values: Mapping[str, Any]) -> None:
        handle = processes.reopen(values.get("process"))
        seen = ZygoteSeen(values["endpoint"], values["revision"], ZygotePhase(values["phase"]), values["since_s"])
        if handle is None:
            Path(values["path"]).unlink(missing_ok=True)
            return
        record = ZygoteRecord(seen, Path(values["path"]), handle)
        self.zygotes[seen.key] = record
        self._watch_zygote(record)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
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


def _load_error(path: str) -> str:
    """Why a worker or zygote could not load its bundle, from the problem document beside its socket."""
    try:
        problem = json.loads(Path(f"{path}.error").read_text(encoding="utf-8"))
        return f": {problem['title']}: {problem['detail']}"
    except (OSError, ValueError, KeyError):
        return ""
