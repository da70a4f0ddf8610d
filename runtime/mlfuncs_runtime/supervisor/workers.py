"""The workers of one home: started by fork or spawn, watched, parked, drained and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs_runtime.supervisor import probing, processes
from mlfuncs_runtime.supervisor.books import EXIT_LOAD_FAILED, Books, ReplicaRecord, ZygoteRecord, load_error
from mlfuncs_runtime.supervisor.places import write_json
from mlfuncs_runtime.supervisor.processes import ProcessHandle
from mlfuncs_runtime.supervisor.reconcile import Key, Phase, ReplicaSeen
from mlfuncs_runtime.supervisor.zygotes import Zygotes
from mlfuncs_runtime.worker import limits

log = logging.getLogger("mlfuncs.supervisor")

HEALTH_TIMEOUT_S = 5.0
HEALTH_MISSES = 3
_ORPHAN_WAIT_S = 10.0  # a worker whose start was noted but not its process: time to show itself
_OUT_OF_MEMORY = "was killed for memory: it needs more than resources.memory allows; raise it, or send less at once"
_DRAIN_S = 3600.0  # the reconciler's own limit comes first


def _describe_end(replica: str, pid: int, status: int | None) -> str:
    """How a worker ended, for people; its cgroup, when it had one, is removed."""
    parent = limits.cgroup_parent()
    ran_out = parent is not None and limits.close_cgroup(parent / limits.cgroup_name(replica, pid))
    is_killed = status in (None, -signal.SIGKILL)
    return _OUT_OF_MEMORY if ran_out and is_killed else processes.describe_exit(status)


class Workers:
    """Starts, watches and signals workers; `drain` returns when the router has nothing in flight at one."""

    def __init__(self, books: Books, zygotes: Zygotes, drain: Callable[[str, float], Awaitable[None]]) -> None:
        self._books, self._zygotes, self._drain = books, zygotes, drain

    def start(self, key: Key, fork: bool) -> None:
        """Begin to start one more worker of a revision."""
        name = f"{key[0]}-{key[1]}-{token_hex(3)}"
        socket = str(self._books.places.sockets / f"w-{token_hex(5)}.sock")
        now_s = time.monotonic()
        record = ReplicaRecord(ReplicaSeen(name, *key, Phase.STARTING, now_s), socket)
        self._books.replicas[name] = record
        self._books.save()  # before the process exists: a supervisor that takes over looks for it on its socket
        self._books.run(self._bring_up(record, self._books.zygotes.get(key) if fork else None, now_s))

    async def _bring_up(self, record: ReplicaRecord, zygote: ZygoteRecord | None, wished_s: float) -> None:
        try:
            if zygote is not None:
                record.process = await self._fork(record, zygote, wished_s)
            else:
                record.process = await self._spawn(record, wished_s)
        except (MlfuncsError, OSError) as exc:
            died = zygote is not None and not (zygote.process and zygote.process.is_alive())
            if self._books.replicas.pop(record.seen.id, None) and not died:  # a zygote's death is a failure of its own
                self._books.fail(record.seen.key, f"a worker could not be started: {exc}")
            self._books.changed()
            return
        if record.seen.phase in (Phase.STOPPING, Phase.KILLED):  # not wanted any more before it was there
            record.process.send(signal.SIGKILL)
        self._books.save()
        self._watch(record)

    async def _spawn(self, record: ReplicaRecord, wished_s: float) -> ProcessHandle:
        launch = await self._books.launch(record.seen.key)
        config = {**launch.config, "replica": record.seen.id, "socket": record.socket, "requested_at": wished_s}
        path = self._books.places.configs / f"{record.seen.id}.json"
        write_json(path, config)
        command = processes.module_command(launch.python, launch.module, "--config", str(path))
        return processes.spawn(command, launch.env, launch.log, self._books.places.run)

    async def _fork(self, record: ReplicaRecord, zygote: ZygoteRecord, wished_s: float) -> ProcessHandle:
        handle = await self._zygotes.fork(record, zygote, wished_s)
        return handle if handle is not None else await self._spawn(record, wished_s)

    def _watch(self, record: ReplicaRecord) -> None:
        self._books.run(self._await_end(record))
        if record.seen.phase is Phase.STARTING:
            self._books.run(self._await_ready(record))

    async def _await_ready(self, record: ReplicaRecord) -> None:
        delay_s = 0.001
        while record.seen.phase is Phase.STARTING and record.seen.id in self._books.replicas:
            answer = await probing.probe(record.socket, probing.READY_PATH, HEALTH_TIMEOUT_S)
            if answer.pid and record.process is None:
                record.process = processes.open_process(answer.pid)
                if record.process:
                    self._books.run(self._await_end(record))
            if answer.status == 200 and record.seen.phase is Phase.STARTING and record.process:
                record.move(Phase.READY)
                self._books.changed()
                return
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 1.2, 0.05)

    async def _await_end(self, record: ReplicaRecord) -> None:
        assert record.process is not None
        await record.process.wait()
        status = record.process.exit_status()
        record.process.close()
        if status is None:
            status = await self._zygotes.exit_of(record.seen.key, record.process.pid)
        if left := processes.end_session(record.process.pid, self._books.places.home):
            log.warning("worker %d left %s running, which were killed", record.process.pid, left)
        end = _describe_end(record.seen.id, record.process.pid, status)
        if self._books.replicas.pop(record.seen.id, None) is None:
            return
        seen = record.seen
        if seen.phase in (Phase.STARTING, Phase.READY, Phase.PARKED):
            ready_for_s = 0.0 if seen.phase is Phase.STARTING else time.monotonic() - seen.since_s
            cause = load_error(record.socket)
            reason = f"worker {record.process.pid} {end}{cause}"
            self._books.fail(seen.key, reason, ready_for_s, fatal=status == EXIT_LOAD_FAILED or bool(cause))
        for path in (record.socket, record.socket + ".error", str(self._books.places.configs / f"{seen.id}.json")):
            Path(path).unlink(missing_ok=True)
        self._books.changed()

    def send(self, record: ReplicaRecord, number: int, phase: Phase) -> None:
        """Send a signal and enter the phase that goes with it."""
        if record.seen.phase is Phase.PARKED and record.process:
            record.process.send(signal.SIGCONT)
        record.move(phase)
        if record.process:
            record.process.send(number)

    def kill(self, record: ReplicaRecord, reason: str) -> None:
        """Send SIGKILL; one that was only starting has failed."""
        log.warning("%s %s and is killed", record.seen.id, reason)
        if record.seen.phase is Phase.STARTING:
            self._books.fail(record.seen.key, f"worker {record.pid or ''} {reason}")
        self.send(record, signal.SIGKILL, Phase.KILLED)
        if record.process is None:  # its start was noted and nothing ever came of it
            self._books.replicas.pop(record.seen.id, None)

    def unpark(self, record: ReplicaRecord) -> None:
        """Let a spare go on and take requests."""
        if record.released:
            record.released.cancel()
            record.released = None
        if record.process:
            record.process.send(signal.SIGCONT)
        record.move(Phase.READY)

    def release(self) -> None:
        """After the router knows who takes requests: wait for those in flight at the workers taken out."""
        for record in self._books.replicas.values():
            if record.seen.phase in (Phase.DRAINING, Phase.PARKED) and record.released is None:
                record.released = self._books.run(self._release(record))

    async def _release(self, record: ReplicaRecord) -> None:
        with contextlib.suppress(MlfuncsError):
            await self._drain(record.seen.id, _DRAIN_S)
        if record.seen.phase is Phase.PARKED and record.process:
            record.process.send(signal.SIGSTOP)
        elif record.seen.phase is Phase.DRAINING:
            record.seen = replace(record.seen, drained=True)
            self._books.changed()

    async def check_health(self) -> None:
        """Ask every ready worker whether it lives; one that stays silent several times in a row is unhealthy."""

        async def ask(record: ReplicaRecord) -> None:
            answer = await probing.probe(record.socket, probing.LIVE_PATH, HEALTH_TIMEOUT_S)
            record.misses = 0 if answer.status else record.misses + 1
            if record.misses >= HEALTH_MISSES and record.seen.phase is Phase.READY:
                record.seen = replace(record.seen, healthy=False)
                self._books.fail(
                    record.seen.key, f"worker {record.pid} does not answer", time.monotonic() - record.seen.since_s
                )
                self._books.changed()

        ready = [record for record in self._books.replicas.values() if record.seen.phase is Phase.READY]
        await asyncio.gather(*(ask(record) for record in ready))

    def adopt(self, values: Mapping[str, Any]) -> None:
        """Go on with a worker from an earlier supervisor's books."""
        seen = ReplicaSeen(
            values["id"], values["endpoint"], values["revision"], Phase(values["phase"]), values["since_s"]
        )
        record = ReplicaRecord(seen, values["socket"], processes.reopen(values.get("process")))
        if record.process is None and (values.get("process") or seen.phase is not Phase.STARTING):
            Path(record.socket).unlink(missing_ok=True)
            return
        self._books.replicas[seen.id] = record
        if record.process is not None:
            self._watch(record)
        else:
            self._books.run(self._find_orphan(record))

    async def _find_orphan(self, record: ReplicaRecord) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ORPHAN_WAIT_S):
                await self._await_ready(record)
        if record.process is None:
            self._books.replicas.pop(record.seen.id, None)
            self._books.changed()
