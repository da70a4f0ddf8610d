"""The processes of a run's steps: started in warm workers, watched, timed, their output passed on, ended."""

from __future__ import annotations

import codecs
import contextlib
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs_pipelines.cache import Key
from mlfuncs_pipelines.messages import Exit, Preload, Request
from mlfuncs_pipelines.run_log import StepRecord
from mlfuncs_pipelines.steps import Prepared, container_name
from mlfuncs_pipelines.worker_pool import WorkerPool
from mlfuncs_pipelines.workers import Worker

_KILL_AFTER_S = 5.0  # between SIGTERM and SIGKILL when a run is stopped
_COMMAND = Preload(sys.executable)  # a zygote that imports nothing, for commands


@dataclass
class Running:
    """One step that has a process; `lock` is held on its cache entry while it runs."""

    prepared: Prepared
    record: StepRecord
    worker: Worker
    key: Key | None
    lock: int | None
    began: float
    log_seen: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    deadline: float = float("inf")
    timed_out: bool = False


class Processes:
    """The running steps of one run. `logged` gets what they print, as it comes; None: nobody listens."""

    def __init__(self, pool: WorkerPool, logged: Callable[[StepRecord, str], None] | None) -> None:
        self.running: dict[str, Running] = {}
        self._pool, self._logged = pool, logged
        self._poll = select.poll()
        self._workers: dict[int, Worker] = {}

    def start(
        self, prepared: Prepared, record: StepRecord, request: Request, held: tuple[Key | None, int | None]
    ) -> None:
        """Start the step's process; `held` is its cache key and the lock on it."""
        worker = self._watch(prepared)
        running = Running(prepared, record, worker, *held, time.monotonic())
        if prepared.plan.timeout_s:
            running.deadline = running.began + prepared.plan.timeout_s
        self.running[record.id] = running
        worker.run(record.id, request)
        self._move_on(worker)

    def wait(self, timeout_s: float) -> list[tuple[Running, Exit]]:
        """The steps that ended, once one did or `timeout_s` is over; those that take too long are killed."""
        ended: list[tuple[Running, Exit]] = []
        for descriptor, _ in self._poll.poll(timeout_s * 1000):
            worker = self._workers.get(descriptor)
            if worker is None or worker.is_closed:  # idle, and let go while this loop moved steps to other workers
                continue
            self._take(worker.receive(), ended)
            self._move_on(worker)
            if worker.is_idle and worker.is_lost:
                self._forget(descriptor)
                worker.close()
        now = time.monotonic()
        for running in list(self.running.values()):
            self._follow(running)
            if now > running.deadline and not running.timed_out:
                running.timed_out = True
                self._take(running.worker.kill(running.record.id, signal.SIGKILL), ended)
        return ended

    def stop(self, containers: str) -> None:
        """End every step: SIGTERM first, SIGKILL for those that do not heed it."""
        ended: list[tuple[Running, Exit]] = []
        for running in list(self.running.values()):
            self._take(running.worker.kill(running.record.id, signal.SIGTERM), ended)
            if running.prepared.plan.kind == "container" and containers == "docker":
                subprocess.run(["docker", "rm", "--force", container_name(running.prepared)], capture_output=True)
        deadline = time.monotonic() + _KILL_AFTER_S
        while self.running and time.monotonic() < deadline:
            for descriptor, _ in self._poll.poll(50):
                worker = self._workers[descriptor]
                self._take([] if worker.is_closed else worker.receive(), ended)
        for running in self.running.values():
            running.worker.kill(running.record.id, signal.SIGKILL)
        for worker in self._workers.values():
            worker.forget()

    def _take(self, exits: Iterable[Exit], ended: list[tuple[Running, Exit]]) -> None:
        """Add the steps that `exits` tell of to `ended`."""
        for end in exits:
            running = self.running.pop(end.step_id)
            self._measure(running, end)
            ended.append((running, end))

    def _watch(self, prepared: Prepared) -> Worker:
        """A worker for the step, listened to."""
        worker = self._pool.get(prepared.plan.preload or _COMMAND)
        descriptor = worker.fileno()
        if self._workers.get(descriptor) is not worker:
            for closed in [key for key, kept in self._workers.items() if kept.is_closed]:
                self._forget(closed)  # to make room for this one
            self._workers[descriptor] = worker
            self._poll.register(descriptor, select.POLLIN)
        return worker

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._workers[descriptor]

    def _move_on(self, worker: Worker) -> None:
        """Give the steps that a worker cannot take to another one."""
        overflow, worker.overflow = worker.overflow, {}
        for step_id, request in overflow.items():
            running = self.running[step_id]
            running.worker = self._watch(running.prepared)
            running.worker.run(step_id, request)

    def _measure(self, running: Running, end: Exit) -> None:
        self._follow(running, over=True)
        record = running.record
        record.duration_s = time.monotonic() - running.began
        record.max_rss_mib, record.cpu_s = round(end.max_rss_kib / 1024, 1), round(end.cpu_s, 4)

    def _follow(self, running: Running, over: bool = False) -> None:
        """Pass on what the step has printed since the last look; half a character waits for the rest of it."""
        if self._logged is None:
            return
        data = b""
        with contextlib.suppress(FileNotFoundError), open(running.prepared.log, "rb") as file:
            file.seek(running.log_seen)
            data = file.read()
        running.log_seen += len(data)
        text = running.decoder.decode(data, final=over)
        if text:
            self._logged(running.record, text)


def failure(running: Running, end: Exit) -> str:
    """Why the step failed, its traceback put into its record; "" when it did not."""
    record, prepared = running.record, running.prepared
    if running.timed_out:
        return f"it took over {prepared.plan.timeout_s:g} s and was stopped; raise its timeout_s"
    if end.code == 0 and not end.signal:
        return "" if _has_output(prepared, end) else "the function ended the process with exit code 0; return a value"
    if end.error:
        record.traceback = end.error
        prepared.log.write_text(end.error, encoding="utf-8")
        return f"its code cannot be loaded: {end.error.strip().splitlines()[-1]}"
    error = _reported(prepared.error_path)
    if error:
        record.traceback = error["traceback"]
        return f"{error['type']}: {error['message']}"
    if end.signal == signal.SIGKILL:
        return "its process was killed (signal 9), as happens when memory runs out"
    if end.signal:
        return f"its process was ended by signal {end.signal}"
    return f"its process ended with exit code {end.code}: {_tail(prepared.log)}"


def _has_output(prepared: Prepared, end: Exit) -> bool:
    """Whether a step of ours came to its end; commands and kfp's components need not tell."""
    file = prepared.executor_input["outputs"]["outputFile"]
    return prepared.plan.step is None or end.output is not None or Path(file).exists()


def _reported(path: Path) -> Mapping[str, Any]:
    """The exception that a Python step left behind; empty when there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _tail(log: Path, lines: int = 3) -> str:
    with contextlib.suppress(FileNotFoundError):
        return " / ".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
    return ""
