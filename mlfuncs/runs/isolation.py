"""Runs in an interpreter of their own: started, watched, given up on, tried again.

This process stays the run's owner: it keeps the record and ends the child when it ends itself. The child only executes
and writes the run's journal; see `mlfuncs.runs.child`.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.runs.journal import ATTEMPT, Journal, failed, read_entries
from mlfuncs.runs.provenance import folder_of, git_state
from mlfuncs.runs.recorder import recorder
from mlfuncs.runs.records import Batch
from mlfuncs.runs.starting import Arguments, Place, Started, begin
from mlfuncs.runs.values import encode_for_child
from mlfuncs.runs.worker_process import Child, ChildDied
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec

if TYPE_CHECKING:
    from mlfuncs.bundles.bundle import Bundle
    from mlfuncs.decorator import Function

GRACE_S = 5.0  # between asking a run to stop and killing it
_FIRST_RETRY_S = 0.5
_SPEC_TIMEOUT_S = FunctionSpec(name="x").timeout_s


@dataclass(frozen=True)
class Packed:
    """A function as a child gets it: its bundle, the interpreter that has its requirements, its limits."""

    bundle: Bundle
    folder: Path  # where the code is from
    python: str
    spec: FunctionSpec
    settings: Settings
    timeout_s: float | None
    command: tuple[str, ...] = ()  # what is started instead of that interpreter, e.g. a container's stand-in


def pack_function(
    function: Function[Any, Any], settings: Settings, timeout_s: float | None, target: str = "process"
) -> Packed:
    """Bundle the function and make its environment or image ready; neither, when it runs "elsewhere".

    Raises BundleError or EnvironmentFailed.
    """
    from mlfuncs import adapters
    from mlfuncs.bundles.bundle import build_bundle
    from mlfuncs.environments.environment import environment_for

    bundle = build_bundle(function.target, function.spec, settings)
    command: tuple[str, ...] = ()
    python: str | Path = sys.executable
    if target == "process":
        python = environment_for(bundle.manifest.lock, settings)
    elif target != "elsewhere":
        command = tuple(adapters.load(f"runs:{target}")(bundle.digest, function.spec, settings))
    limit = time_limit(function.spec, timeout_s)
    return Packed(bundle, folder_of(function.target), str(python), function.spec, settings, limit, command)


def time_limit(spec: FunctionSpec, timeout_s: float | None) -> float | None:
    """How long an attempt may take: `timeout_s`, else the spec's when one was set (60 s is meant for requests)."""
    return spec.timeout_s if timeout_s is None and spec.timeout_s != _SPEC_TIMEOUT_S else timeout_s


def start_isolated(
    function: Function[Any, Any],
    arguments: Arguments,
    place: Place,
    settings: Settings,
    timeout_s: float | None,
    target: str = "process",
) -> tuple[Started, Supervision]:
    """Begin a run in a child of its own, a process or a container, and return at once."""
    packed = pack_function(function, settings, timeout_s, target)
    started = begin_isolated(function, packed, arguments, place)
    supervision = Supervision(lambda cancelled: _run_alone(packed, started, arguments, cancelled))
    return started, supervision


def begin_isolated(function: Function[Any, Any], packed: Packed, arguments: Arguments, place: Place) -> Started:
    """The run's row, with the versions that its bundle settles."""
    started = begin(function, arguments, place, packed.settings)
    recorder().watch(started.record)
    recorder().submit(started.row.id, lambda: _keep_versions(started, packed))
    return started


class Supervision:
    """A thread that sees an isolated run through; `cancel` asks it to stop the run.

    The process waits for it at its end, unless it is a daemon: then the run must be able to go on alone.
    """

    def __init__(self, work: Callable[[threading.Event], None], daemon: bool = False) -> None:
        self._cancelled = threading.Event()
        self._raised: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work,), name="mlfuncs-run", daemon=daemon)
        self._thread.start()

    def cancel(self) -> None:
        """Ask the run to stop: interrupt it, and kill it when it has not stopped after a grace."""
        self._cancelled.set()

    def join(self, timeout_s: float | None) -> None:
        """Wait until the run has ended; raises what kept its record from being written."""
        self._thread.join(timeout_s)
        if self._raised and not self._thread.is_alive():
            raise self._raised[0]

    def _run(self, work: Callable[[threading.Event], None]) -> None:
        try:
            work(self._cancelled)
        except BaseException as exc:  # noqa: BLE001 - raised again by `join`, in the thread that waits
            self._raised.append(exc)


def see_through(
    packed: Packed,
    started: Started,
    arguments: Arguments,
    children: Callable[[], Child],
    cancelled: threading.Event,
) -> dict[str, Any]:
    """The end of the run, after as many attempts as its spec allows; its record is finished with it.

    `children` gives the child for an attempt: a new one, or one that is used again.
    """
    journal, write = started.record.journal, started.log.write

    def tell(attempt: int) -> None:
        if attempt > 1:
            started.registry.runs.update(started.row.id, attempt=attempt)

    try:
        work = Work(packed, lambda: _task(packed, started, arguments), journal, write, cancelled, tell)
        final = attempt_often(work, children)
        started.end(final)
    finally:
        started.log.close()
        recorder().release(started.record)
    return final


@dataclass(frozen=True)
class Work:
    """What a child is to do: its `task`, the journal it writes, where its output goes, what stops it."""

    packed: Packed
    task: Callable[[], Mapping[str, Any]]  # raises MlfuncsError when an argument cannot be stored
    journal: Journal
    write: Callable[[str], object]
    cancelled: threading.Event
    tell: Callable[[int], object] = lambda attempt: None  # is told the number of each attempt, from 1


def attempt_often(work: Work, children: Callable[[], Child]) -> dict[str, Any]:
    """The end of the last of as many attempts as the spec allows."""
    spec = work.packed.spec
    final = failed("NotStarted", "it was never started")
    for attempt in range(1, spec.retries + 2):
        final = _attempt(work, children, attempt)
        if final["status"] != "failed" or work.cancelled.is_set() or attempt > spec.retries:
            break
        error = final["error"]
        work.write(f"attempt {attempt} failed ({error['type']}: {error['message']}); trying again\n")
        work.cancelled.wait(_FIRST_RETRY_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
    return final


def _attempt(work: Work, children: Callable[[], Child], attempt: int) -> dict[str, Any]:
    packed, cancelled = work.packed, work.cancelled
    work.journal.append(ATTEMPT, attempt)
    work.tell(attempt)
    try:
        task = work.task()
        child = children()
        child.start(task, work.write)
    except MlfuncsError as exc:
        return failed(type(exc).__name__, str(exc))
    except ChildDied as died:
        return failed("ProcessDied", f"its process died before it began: {died}")
    deadline = None if packed.timeout_s is None else time.monotonic() + packed.timeout_s
    try:
        stopped = _watch(child, cancelled, deadline)
    except ChildDied as died:
        stopped = _why_stopped(cancelled, deadline)
        if stopped is None:
            return failed("ProcessDied", f"its process died: {died}")
    final = _last_word(work.journal)
    if stopped == "cancelled":
        ended = failed("Cancelled", "it was cancelled")
        return {**ended, **_usage(final), "status": "cancelled"}
    if stopped == "timeout":
        return {**failed("DeadlineExceeded", f"it ran longer than {packed.timeout_s:g} s"), **_usage(final)}
    return final or failed("ProcessDied", "its process ended without a result")


def _watch(child: Child, cancelled: threading.Event, deadline: float | None) -> str | None:
    """Wait for the child's answer; None when it came by itself, else why it was stopped. Raises ChildDied."""
    while not child.wait(0.05):
        reason = _why_stopped(cancelled, deadline)
        if reason is not None:
            child.interrupt()
            if not child.wait(GRACE_S):
                child.kill()
            return reason
    return None


def _why_stopped(cancelled: threading.Event, deadline: float | None) -> str | None:
    if cancelled.is_set():
        return "cancelled"
    return "timeout" if deadline is not None and time.monotonic() >= deadline else None


def _run_alone(packed: Packed, started: Started, arguments: Arguments, cancelled: threading.Event) -> None:
    with fresh_children(packed, teller()) as next_child:
        see_through(packed, started, arguments, next_child, cancelled)


@contextmanager
def fresh_children(packed: Packed, show: Callable[[str], None] | None = None) -> Iterator[Callable[[], Child]]:
    """What gives a new child for each attempt; the one before it is ended then, and the last with the block."""
    child: list[Child] = []

    def next_child() -> Child:
        for old in child:
            old.close()
        child[:] = [Child(packed.python, child_environ(packed), show, packed.command)]
        return child[0]

    try:
        yield next_child
    finally:
        for old in child:
            old.close()


def child_environ(packed: Packed, **extra: str) -> dict[str, str]:
    """The variables that a child of this function sees."""
    return {**os.environ, **extra, **packed.settings.to_environ(), **packed.spec.env}


def teller() -> Callable[[str], None]:
    """Shows a child's output where this process's goes now."""
    stream = sys.stdout

    def show(text: str) -> None:
        stream.write(text)
        stream.flush()

    return show


def _task(packed: Packed, started: Started, arguments: Arguments) -> dict[str, Any]:
    return {
        "run": started.row.id,
        "bundle": packed.bundle.digest,
        "journal": str(started.record.journal.path),
        "values": child_values(packed, arguments),
    }


def child_values(packed: Packed, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """The arguments as documents for another process, what is not plain stored. Raises ArtifactError."""
    settings, hints = packed.settings, arguments.hints
    return {name: encode_for_child(value, hints.get(name), settings) for name, value in arguments.given.items()}


def _last_word(journal: Journal) -> dict[str, Any] | None:
    batch = Batch()
    for entries, _offset in read_entries(journal.path):
        batch.add(entries)
    return batch.final


def _usage(final: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: final[key] for key in ("started_at", "cpu_s", "peak_memory_mib")} if final else {}


def _keep_versions(started: Started, packed: Packed) -> None:
    manifest = packed.bundle.manifest
    versions = {
        **started.row.versions,
        "code": packed.bundle.digest,
        "bundle": packed.bundle.digest,
        "environment": manifest.environment_digest,
        **git_state(packed.folder),
    }
    started.registry.runs.update(started.row.id, versions=versions)
