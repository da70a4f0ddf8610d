"""Runs that a cluster executes as jobs of its own. Such a job goes on when the process that started it ends.

The process that starts a run follows its job and keeps the record. When that process is gone, whoever looks at the run
next asks the cluster, and takes down what the job said once it has ended; the job keeps its log until then.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlfuncs import adapters
from mlfuncs.errors import MlfuncsError
from mlfuncs.files import locked
from mlfuncs.registry import Registry, RunRow
from mlfuncs.registry.runs import ACTIVE
from mlfuncs.runs.capture import RunLog
from mlfuncs.runs.isolation import Packed, Supervision, begin_isolated, teller, time_limit
from mlfuncs.runs.journal import FINISH, Journal, failed, read_entries
from mlfuncs.runs.ledger import Ledger
from mlfuncs.runs.recorder import recorder
from mlfuncs.runs.records import Batch, journal_path, keep_final, log_path
from mlfuncs.runs.starting import Arguments, Place, Started
from mlfuncs.runs.values import encode_for_child
from mlfuncs.settings import Settings

if TYPE_CHECKING:
    from mlfuncs.bundles.bundle import Bundle
    from mlfuncs.decorator import Function
    from mlfuncs.spec import FunctionSpec

ASK_S = 2.0  # how often a run that nobody follows is asked about, at most
log = logging.getLogger(__name__)
_asked: dict[str, float] = {}


@dataclass(frozen=True)
class Job:
    """One run's job, as it is found again."""

    run: str
    function: str
    namespace: str

    @property
    def name(self) -> str:
        """At most 63 characters: the function's name cut short, and the run's id."""
        return f"{self.function[:42].rstrip('-')}-{self.run}"

    @classmethod
    def of(cls, row: RunRow) -> Job:
        """The job of a run whose details name one."""
        return cls(row.id, row.function, row.details["job"]["namespace"])


@dataclass(frozen=True)
class Order:
    """What a job is to do: `values` are the arguments as `encode_for_child` gives them."""

    job: Job
    image: str
    bundle: Bundle
    spec: FunctionSpec
    timeout_s: float | None  # of one attempt, from the moment the function is called
    values: Mapping[str, dict[str, Any]]


class JobRuns(Protocol):
    """What executes jobs. Every method raises Unavailable, Forbidden or SpecError as the cluster answers."""

    def prepare(self, bundle: Bundle, spec: FunctionSpec) -> str:
        """The image that has the function's requirements, made and pushed when the registry lacks it."""

    def submit(self, order: Order) -> None:
        """Make the job."""

    def follow(self, job: Job, ledger: Ledger, cancelled: threading.Event) -> dict[str, Any]:
        """Tell the ledger what the job says until it has ended; the run's end. `cancelled` deletes the job."""

    def has_ended(self, job: Job) -> bool:
        """Whether nothing more will come of the job; so also when it is gone."""

    def cancel(self, job: Job) -> None:
        """Delete the job and its pods."""


def start_elsewhere(
    function: Function[Any, Any],
    arguments: Arguments,
    place: Place,
    settings: Settings,
    timeout_s: float | None,
    target: str,
) -> tuple[Started, Supervision]:
    """Begin a run as a job of `target` and return at once. The thread that follows it does not outlive the process."""
    from mlfuncs.bundles.bundle import build_bundle
    from mlfuncs.runs.provenance import folder_of

    runs: JobRuns = adapters.load(f"runs:{target}")(settings)
    bundle = build_bundle(function.target, function.spec, settings)
    image = runs.prepare(bundle, function.spec)
    limit = time_limit(function.spec, timeout_s)
    packed = Packed(bundle, folder_of(function.target), "", function.spec, settings, limit)
    details = {**place.details, "job": {"target": target, "namespace": settings.kubernetes_namespace, "image": image}}
    started = begin_isolated(function, packed, arguments, replace(place, details=details))

    def work(cancelled: threading.Event) -> None:
        _see_through(runs, packed, image, started, arguments, cancelled)

    return started, Supervision(work, daemon=True)


def _see_through(
    runs: JobRuns, packed: Packed, image: str, started: Started, arguments: Arguments, cancelled: threading.Event
) -> None:
    job, settings = Job.of(started.row), packed.settings
    ledger = Ledger(started.record.journal, started.log, settings, teller())
    try:
        try:
            hints = arguments.hints
            values = {n: encode_for_child(value, hints.get(n), settings) for n, value in arguments.given.items()}
            runs.submit(Order(job, image, packed.bundle, packed.spec, packed.timeout_s, values))
            final = runs.follow(job, ledger, cancelled)
        except MlfuncsError as exc:
            final = failed(type(exc).__name__, str(exc))
            with contextlib.suppress(MlfuncsError):  # what brought us here may stand in the way of this too
                runs.cancel(job)
        started.end(final)
    finally:
        started.log.close()
        recorder().release(started.record)


def collect(registry: Registry, settings: Settings, row: RunRow) -> None:
    """Take down the end of a run whose starter is gone, when its job has ended; asked at most every ASK_S seconds."""
    if time.monotonic() - _asked.get(row.id, -ASK_S) < ASK_S:
        return
    _asked[row.id] = time.monotonic()
    job = Job.of(row)
    try:
        runs: JobRuns = adapters.load(f"runs:{row.details['job']['target']}")(settings)
        if runs.has_ended(job):
            with locked(_journals(settings) / ".collect.lock"):
                if registry.runs.get(row.id).status in ACTIVE:
                    _take_down(runs, job, registry, settings)
    except MlfuncsError as exc:  # the cluster is away, or not ours to ask from here: the run stays as it is
        log.debug("the job of run %s cannot be asked about: %s", row.id, exc)


def cancel_elsewhere(registry: Registry, settings: Settings, row: RunRow) -> None:
    """Delete the job of a run that another process started, or that nobody follows any more."""
    runs: JobRuns = adapters.load(f"runs:{row.details['job']['target']}")(settings)
    runs.cancel(Job.of(row))
    ended = {**failed("Cancelled", "it was cancelled"), "status": "cancelled"}
    keep_final(registry, row.id, Batch(), ended, only_active=True)


def _take_down(runs: JobRuns, job: Job, registry: Registry, settings: Settings) -> None:
    """Write journal and log anew, from the first line of the job's log, and with them the run's end."""
    path, log_file = journal_path(settings, job.run), log_path(settings, job.run)
    for old in (path, log_file):
        old.unlink(missing_ok=True)
    journal, run_log = Journal(path), RunLog(log_file, {})
    try:
        final = runs.follow(job, Ledger(journal, run_log, settings), threading.Event())
        journal.append(FINISH, final)
    finally:
        journal.close()
        run_log.close()
    batch = Batch()
    for entries, _offset in read_entries(path):
        batch.add(entries)
    keep_final(registry, job.run, batch, final, only_active=True)
    path.unlink(missing_ok=True)


def _journals(settings: Settings) -> Path:
    folder = journal_path(settings, "x").parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
