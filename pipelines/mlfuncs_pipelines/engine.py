"""The local engine: runs a pipeline on this machine, its steps in parallel processes.

The control flow is `graph.Scheduler`'s. This module owns what that one must not know: processes, clocks, files.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import ArtifactError, InvalidInput, MlfuncsError, SpecError
from mlfuncs.settings import Settings
from mlfuncs_pipelines.cache import Key, StepCache, are_intact, remember_digests, stamps_of
from mlfuncs_pipelines.executor_io import read_outputs
from mlfuncs_pipelines.graph import Scheduler
from mlfuncs_pipelines.importer import run_importer
from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.instructions import Instruction, NodeEnded, RunEnded, RunStep, Step
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.messages import Exit
from mlfuncs_pipelines.observer import Observer
from mlfuncs_pipelines.preflight import Plan
from mlfuncs_pipelines.processes import Processes, Running, failure
from mlfuncs_pipelines.run_log import (
    PipelineRun,
    RunLog,
    StepRecord,
    finished_steps,
    from_json,
    plain,
    step_run_id,
    to_json,
)
from mlfuncs_pipelines.step_queue import StepQueue
from mlfuncs_pipelines.steps import (
    Prepared,
    cache_key,
    identity,
    make_folder,
    make_request,
    place_request,
    prepare_step,
)
from mlfuncs_pipelines.switching import quick_switching
from mlfuncs_pipelines.worker_pool import WorkerPool

_TICK_S = 0.1  # how often logs are looked at while steps run
_LOCK_POLL_S = 0.05  # how often a step asks whether the same step elsewhere is done


__all__ = ["Engine", "Observer", "Options"]


@dataclass(frozen=True)
class Options:
    """How to run: `parallel` steps at once, cached results used or not, containers by "docker" or "process".

    `resume` keeps the steps that ended well when the run's journal was written; with `changed`, because the pipeline
    is not the one of then, only those whose code and inputs are as they were.
    Raises SpecError for a value that none of them takes.
    """

    parallel: int | None = None  # None: one per core, at least 4
    cache: bool = True
    ignore: frozenset[str] = frozenset()  # inputs that do not count for the cache
    containers: str = "docker"
    resume: bool = False
    changed: bool = False

    def __post_init__(self) -> None:
        if self.parallel is not None and (type(self.parallel) is not int or self.parallel < 1):
            raise SpecError(f"parallel must be a whole number of steps, 1 or more, not {self.parallel!r}")
        if type(self.cache) is not bool:
            raise SpecError(f"cache must be True or False, not {self.cache!r}")
        if self.containers not in ("docker", "process"):
            raise SpecError(f"containers must be 'docker' or 'process', not {self.containers!r}")

    @functools.cached_property
    def slots(self) -> int:
        """How many steps may run at once."""
        return self.parallel or max(4, os.cpu_count() or 1)


@dataclass
class Engine:
    """One run of `pipeline` in `folder`. `plans` come from `preflight.prepare`."""

    pipeline: Pipeline
    run: PipelineRun
    plans: Mapping[str, Plan]
    constants: Mapping[str, str]
    settings: Settings
    pool: WorkerPool
    options: Options = field(default_factory=Options)
    observers: Sequence[Observer] = ()

    def __post_init__(self) -> None:
        self._scheduler = Scheduler(self.pipeline, self.run.params, self.constants)
        self._cache = StepCache(self.settings.home / "pipelines" / "cache")
        self._queue = StepQueue()
        self._blocked: list[tuple[Prepared, Key]] = []
        self._finished = finished_steps(self.run.folder) if self.options.resume else {}
        self._log = RunLog(self.run.folder)
        self._over = False
        self._environ = dict(os.environ)
        watched = any(type(one).step_logged is not Observer.step_logged for one in self.observers)
        self._processes = Processes(self.pool, functools.partial(self._tell, "step_logged") if watched else None)

    def execute(self) -> PipelineRun:
        """Run to the end and return the run. KeyboardInterrupt ends the steps, marks the run cancelled, and goes on."""
        try:
            self._log.append("run", pipeline=self.pipeline.name, params=dict(self.run.params), pid=os.getpid())
            self._tell("run_started", self.run)
            with quick_switching():
                self._obey(self._scheduler.start())
                while not self._over:
                    self._start_ready()
                    if not self._over:
                        self._wait()
        except BaseException as exc:
            self._stop(exc)
            raise
        finally:
            self._cache.release()  # what a stopped run held: the same step may run again in this process
            self._log.close()
        return self.run

    def _obey(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, RunStep):
                self._queue.add(instruction.step, time.monotonic())
            elif isinstance(instruction, NodeEnded):
                self._note_end(instruction)
            else:
                self._finish(instruction)

    def _note_end(self, ended: NodeEnded) -> None:
        record = self.run.steps.get(ended.id)
        if record is None:
            record = StepRecord(ended.id, ended.id.rsplit("/", 1)[-1], "running", is_group=ended.is_group)
            self.run.steps[ended.id] = record
        record.status, record.reason = ended.state, ended.reason
        if ended.is_group or ended.state not in ("succeeded", "failed"):
            self._log.append("ended", id=ended.id, state=ended.state, reason=ended.reason, group=ended.is_group)
        self._tell("step_changed", self.run, record)

    def _finish(self, ended: RunEnded) -> None:
        self._over = True
        self.run.status = "succeeded" if ended.state == "succeeded" else "failed"
        self.run.outputs, self.run.error = plain(ended.outputs), ended.reason
        self.run.duration_s = time.time() - self.run.started
        self._log.append("done", status=self.run.status, outputs=self.run.outputs, error=ended.reason)
        self._tell("run_ended", self.run)

    def _start_ready(self) -> None:
        blocked, self._blocked = self._blocked, []
        for prepared, key in blocked:
            self._start_cached(prepared, key)
        while len(self._processes.running) < self.options.slots and not self._over:
            if (step := self._queue.next(time.monotonic())) is None:
                break
            self._begin(step)

    def _begin(self, step: Step) -> None:
        """Answer the step from the journal or the cache, or start its process."""
        prepared = prepare_step(step, self.plans[step.component.executor], self.run.folder / "steps", self.constants)
        record = StepRecord(step.id, step.task.name, "running", attempt=step.attempt, inputs=prepared.inputs)
        record.started, record.log = time.time(), str(prepared.log)
        record.journal, record.identity = f"{prepared.folder}/journal.jsonl", identity(prepared)
        record.resources = prepared.plan.spec.get("resources", {})
        self.run.steps[step.id] = record
        done = self._finished.get(step.id)
        if done and self._holds(done, record):
            record.resumed = True
            self._succeed(record, from_json(done["outputs"]))
        elif prepared.plan.kind == "importer":
            self._import(prepared, record)
        else:
            key = cache_key(prepared) if self.options.cache else None
            record.versions = prepared.plan.versions
            if key is None:
                self._spawn(prepared, record, None, None)
            else:
                ignored = {f"input {name}" for name in self.options.ignore}
                key = Key({name: part for name, part in key.parts.items() if name not in ignored})
                record.cache_parts = key.parts
                self._start_cached(prepared, key)

    def _holds(self, done: Mapping[str, Any], record: StepRecord) -> bool:
        """Whether the end of a step that the journal tells of is that of this step, its results still there."""
        is_same = not self.options.changed or done.get("identity") == record.identity
        return is_same and are_intact(done["stamps"])

    def _import(self, prepared: Prepared, record: StepRecord) -> None:
        component = prepared.step.component
        try:
            outputs = run_importer(prepared.plan.spec, component, prepared.inputs, self.constants)
        except MlfuncsError as exc:
            self._fail(record, str(exc))
        else:
            self._succeed(record, outputs)

    def _start_cached(self, prepared: Prepared, key: Key) -> None:
        """Use the stored outputs; else run, but only once for any number of equal steps at the same time."""
        record = self.run.steps[prepared.step.id]
        lock = self._cache.lock(key)
        if lock is None:
            self._blocked.append((prepared, key))
            return
        outputs = self._cache.get(key)
        if outputs is None:
            record.cache_note = self._cache.explain(key, self.pipeline.name, record.id)
            self._spawn(prepared, record, key, lock)
        else:
            self._cache.release(lock)
            record.cached, record.cache_note = True, "hit"
            record.journal = str(self._cache.journal(key))  # what the step logged when it ran
            self._succeed(record, outputs)

    def _spawn(self, prepared: Prepared, record: StepRecord, key: Key | None, lock: int | None) -> None:
        make_folder(prepared)
        track = {"run_id": step_run_id(self.run.id, record), "journal": record.journal}
        body = make_request(prepared, self.options.containers, self.run.folder, track)
        body["digests"] = self.options.cache
        request = place_request(prepared, body, self._environ)
        self._log.append_started(record, str(prepared.folder), request.text)
        self._processes.start(prepared, record, request, (key, lock))
        self._tell("step_changed", self.run, record)

    def _wait(self) -> None:
        """Sleep until a step ends or something is due, then take it in."""
        timeout = _TICK_S if self._processes.running else 1.0
        if self._blocked:
            timeout = _LOCK_POLL_S
        due_in = self._queue.due_in(time.monotonic())
        if due_in is not None:
            timeout = min(timeout, due_in)
        for running, ended in self._processes.wait(timeout):
            self._take(running, ended)

    def _take(self, running: Running, ended: Exit) -> None:
        """A process ended: read its outputs, store them, and tell the scheduler."""
        record, step = running.record, running.prepared.step
        reason, outputs = failure(running, ended), Values()
        if not reason:
            try:
                complete = running.prepared.plan.step is None
                outputs = read_outputs(step.component, running.prepared.executor_input, ended.output, complete)
            except (InvalidInput, ArtifactError) as exc:
                reason = f"{type(exc).__name__}: {exc}"
        remember_digests(ended.digests)
        if not reason and running.key is not None:
            origin = {"pipeline": self.pipeline.name, "run": self.run.id, "step": record.id}
            self._cache.put(running.key, outputs, origin, record.journal)
        if running.lock is not None:
            self._cache.release(running.lock)
        if reason:
            self._fail(record, reason)
        else:
            self._succeed(record, outputs)

    def _succeed(self, record: StepRecord, outputs: Values) -> None:
        record.outputs = outputs
        kept = {"outputs": to_json(outputs), "stamps": stamps_of(outputs), "identity": record.identity}
        self._journal(record, "succeeded", **kept)
        self._obey(self._scheduler.succeed(record.id, outputs))

    def _fail(self, record: StepRecord, reason: str) -> None:
        record.status, record.reason = "failed", reason
        self._journal(record, "failed", reason=reason, traceback=record.traceback)
        retriable = not reason.startswith("InvalidInput: ")  # the same values would come again
        instructions = self._scheduler.fail(record.id, reason, retriable)
        if any(isinstance(one, RunStep) and one.step.id == record.id for one in instructions):
            self._tell("attempt_failed", self.run, record)
        self._obey(instructions)

    def _journal(self, record: StepRecord, state: str, **fields: Any) -> None:
        measured = {"duration_s": record.duration_s, "max_rss_mib": record.max_rss_mib, "cached": record.cached}
        self._log.append("ended", id=record.id, state=state, attempt=record.attempt, **measured, **fields)

    def _stop(self, cause: BaseException) -> None:
        """End every step, then mark the run."""
        self._processes.stop(self.options.containers)
        for record in self.run.steps.values():
            if record.status == "running":
                record.status, record.duration_s = "cancelled", time.time() - record.started
                self._tell("step_changed", self.run, record)
        self.run.status = "cancelled" if isinstance(cause, KeyboardInterrupt) else "failed"
        self.run.error = "interrupted" if isinstance(cause, KeyboardInterrupt) else f"{type(cause).__name__}: {cause}"
        self.run.duration_s = time.time() - self.run.started
        self._log.append("done", status=self.run.status, outputs={}, error=self.run.error)
        self._tell("run_ended", self.run)

    def _tell(self, method: str, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, method)(*arguments)
