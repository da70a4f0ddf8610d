"""The zygotes of one home: one process per revision that has loaded it and forks its workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from mlfuncs.errors import MlfuncsError, Unavailable
from mlfuncs_runtime.supervisor import processes
from mlfuncs_runtime.supervisor.books import EXIT_LOAD_FAILED, Books, ReplicaRecord, ZygoteRecord, load_error
from mlfuncs_runtime.supervisor.places import write_json
from mlfuncs_runtime.supervisor.processes import ProcessHandle
from mlfuncs_runtime.supervisor.reconcile import Key, ZygotePhase, ZygoteSeen

log = logging.getLogger("mlfuncs.supervisor")

LOAD_S = 120.0  # how long one answer of a zygote that is busy may take
FORK_S = 15.0


class Zygotes:
    """Starts and watches zygotes, and has them fork."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._exits: dict[int, int] = {}  # of forked workers, as their zygotes told

    def start(self, key: Key) -> None:
        """Begin to start the zygote of a revision."""
        path = self._books.places.sockets / f"z-{token_hex(5)}.sock"
        record = ZygoteRecord(ZygoteSeen(*key, ZygotePhase.STARTING, time.monotonic()), path)
        self._books.zygotes[key] = record
        self._books.run(self._bring_up(record))

    async def _bring_up(self, record: ZygoteRecord) -> None:
        key = record.seen.key
        try:
            launch = await self._books.launch(key)
            if not launch.forks:  # what makes the launch ready, an image say, is done by now
                record.move(ZygotePhase.UNUSABLE)
                self._books.changed()
                return
            config = self._books.places.configs / f"zygote-{key[0]}-{key[1]}.json"
            write_json(config, launch.config)
            arguments = ("--config", str(config), "--control", str(record.path))
            command = processes.module_command(launch.python, "mlfuncs_runtime.worker.zygote", *arguments)
            record.process = processes.spawn(command, launch.env, launch.log, self._books.places.run)
        except (MlfuncsError, OSError) as exc:
            self._books.zygotes.pop(key, None)
            self._books.fail(key, f"its zygote could not be started: {exc}", fatal=isinstance(exc, MlfuncsError))
            self._books.changed()
            return
        self._books.save()
        self._watch(record)

    def _watch(self, record: ZygoteRecord) -> None:
        self._books.run(self._await_end(record))
        if record.seen.phase is ZygotePhase.STARTING:
            self._books.run(self._await_ready(record))

    async def _await_ready(self, record: ZygoteRecord) -> None:
        delay_s = 0.005
        while record.seen.phase is ZygotePhase.STARTING and self._books.zygotes.get(record.seen.key) is record:
            if record.path.exists():
                try:
                    await record.client.call({"op": "ping"}, timeout_s=LOAD_S)
                    record.move(ZygotePhase.READY)
                    self._books.changed()
                    return
                except Unavailable:
                    pass
                except MlfuncsError as exc:
                    log.info("%s %s: no zygote (%s); workers are spawned", *record.seen.key, exc)
                    record.move(ZygotePhase.UNUSABLE)
                    self._books.changed()
                    return
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 1.2, 0.05)

    async def _await_end(self, record: ZygoteRecord) -> None:
        assert record.process is not None
        await record.process.wait()
        status = record.process.exit_status()
        record.process.close()
        record.client.close()
        record.path.unlink(missing_ok=True)
        key, phase = record.seen.key, record.seen.phase
        if self._books.zygotes.get(key) is not record:
            return
        error = load_error(str(record.path))
        if phase is ZygotePhase.UNUSABLE:
            record.process = None  # it said that it cannot fork and left; the record keeps a new one from being tried
        else:
            del self._books.zygotes[key]
            if phase is not ZygotePhase.STOPPING:
                ready_for_s = time.monotonic() - record.seen.since_s if phase is ZygotePhase.READY else 0.0
                reason = f"its zygote {processes.describe_exit(status)}{error}"
                self._books.fail(key, reason, ready_for_s, fatal=status == EXIT_LOAD_FAILED)
        Path(f"{record.path}.error").unlink(missing_ok=True)
        self._books.changed()

    def stop(self, record: ZygoteRecord) -> None:
        """Send SIGTERM; the workers it forked live on."""
        record.move(ZygotePhase.STOPPING)
        if record.process is None or not record.process.send(signal.SIGTERM):
            self._books.zygotes.pop(record.seen.key, None)

    def adopt(self, values: Mapping[str, Any]) -> None:
        """Go on with a zygote from an earlier supervisor's books."""
        handle = processes.reopen(values.get("process"))
        seen = ZygoteSeen(values["endpoint"], values["revision"], ZygotePhase(values["phase"]), values["since_s"])
        if handle is None:
            Path(values["path"]).unlink(missing_ok=True)
            return
        record = ZygoteRecord(seen, Path(values["path"]), handle)
        self._books.zygotes[seen.key] = record
        self._watch(record)

    async def fork(self, record: ReplicaRecord, zygote: ZygoteRecord, wished_s: float) -> ProcessHandle | None:
        """A worker of this revision, or None when the zygote says that it cannot fork. Raises Unavailable."""
        order = {"op": "fork", "replica": record.seen.id, "socket": record.socket, "requested_at": wished_s}
        try:
            answer = await zygote.client.call(order, timeout_s=FORK_S)
        except Unavailable:
            raise
        except MlfuncsError as exc:
            log.warning("%s %s: its zygote cannot fork (%s); workers are spawned instead", *record.seen.key, exc)
            zygote.move(ZygotePhase.UNUSABLE)
            return None
        handle = processes.open_process(int(answer["pid"]))
        if handle is None:
            raise Unavailable(f"the forked worker {answer['pid']} ended at once{load_error(record.socket)}")
        return handle

    async def exit_of(self, key: Key, pid: int) -> int | None:
        """The exit status of a forked worker, which its parent knows; None when that is gone."""
        zygote = self._books.zygotes.get(key)
        if zygote is not None and zygote.seen.phase is ZygotePhase.READY:
            with contextlib.suppress(MlfuncsError):
                answer = await zygote.client.call({"op": "exits"}, timeout_s=1.0)
                self._exits.update({int(end["pid"]): int(end["status"]) for end in answer["exits"]})
        return self._exits.pop(pid, None)
