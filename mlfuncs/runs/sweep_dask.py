"""The points of a sweep on a Dask cluster.

A task carries the function's signed bundle, so that a worker needs no code of the user's. On the worker the point runs
in a child interpreter in the function's own environment, with its time limit and retries: a point that dies takes no
worker with it. When a worker dies, Dask runs its points again on another one.

A worker on this machine shares this home and its signing key. One elsewhere reads and writes at the artifact URL; what
it signs (models) loads here when its key is trusted or is the project's own (setting signing_key).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import MissingExtra, MlfuncsError, SpecError, Unavailable
from mlfuncs.runs.isolation import GRACE_S, Packed, Work, attempt_often, child_values, fresh_children
from mlfuncs.runs.journal import Journal, failed
from mlfuncs.runs.liveness import machine
from mlfuncs.runs.outcome import NOTHING, keep_outcome, outcome_of
from mlfuncs.runs.starting import Started
from mlfuncs.runs.sweep_plan import Sweep, unbroken
from mlfuncs.settings import Settings, read_settings

if TYPE_CHECKING:
    import distributed

_CONNECT_S = 10.0
_ASK_S = 0.5  # how often a worker looks whether its point was cancelled
_RETURN_S = 5.0  # how long the outcome of an interrupted point may take to come back, beyond its grace (guess)

_running_here: dict[str, threading.Event] = {}  # on a worker: what stops each point, by its task's key


def run_on_dask(sweep: Sweep) -> None:
    """Run the points, `parallel` at once, until all have ended or the sweep has seen enough. Raises Unavailable."""
    with _client(sweep.plan.address) as client:
        _Tasks(sweep, client).run()


class _Tasks:
    """The points that are on the cluster now."""

    def __init__(self, sweep: Sweep, client: distributed.Client) -> None:
        self._sweep, self._client = sweep, client
        self._waiting = iter(range(len(sweep.plan.points)))
        self._running: dict[distributed.Future, tuple[int, Started]] = {}
        self._shipped = _shipped(sweep.plan.packed)

    def run(self) -> None:
        import distributed

        enough = False
        try:
            first = itertools.islice(self._waiting, self._sweep.plan.parallel)
            done = distributed.as_completed([self._submit(number) for number in first], loop=self._client.loop)
            for future in done:
                with unbroken():
                    enough = self._take(future) or enough
                    number = None if enough else next(self._waiting, None)
                    if number is not None:
                        done.add(self._submit(number))
        except BaseException:
            self._cancel()
            raise

    def _submit(self, number: int) -> distributed.Future:
        started = self._sweep.begin(number)
        plan = self._sweep.plan
        task = {**self._shipped, "run": started.row.id, "values": child_values(plan.packed, plan.arguments[number])}
        key = f"{plan.function.spec.name}-{started.row.id}"
        future = self._client.submit(execute_point, task, key=key, pure=False)
        self._running[future] = number, started
        return future

    def _take(self, future: distributed.Future) -> bool:
        number, started = self._running.pop(future)
        try:
            outcome = future.result()
        except Exception as exc:  # noqa: BLE001 - whatever kept the point from running is its failure
            return self._sweep.fail(number, started, failed(type(exc).__name__, _why(exc)))
        return self._sweep.end(number, started, outcome)

    def _cancel(self) -> None:
        """Stop what is on the cluster and mark it; what runs is asked to end, for it then says what it logged."""
        import distributed

        self._sweep.cancelled.set()
        ended: dict[distributed.Future, dict[str, Any]] = {}
        with unbroken():
            with contextlib.suppress(TimeoutError, OSError, distributed.CancelledError):  # the cluster may be away
                ended = self._interrupted()
                self._client.cancel(list(self._running), force=True)
            for future, (_, started) in self._running.items():
                if future in ended:
                    keep_outcome(started, ended[future])
                else:
                    self._sweep.cancel(started)

    def _interrupted(self) -> dict[distributed.Future, dict[str, Any]]:
        """What came of the points that a worker had begun, once they were interrupted there."""
        keys = [future.key for future in self._running]
        answers = self._client.run(interrupt_points, keys, on_error="ignore")
        begun = {key for found in answers.values() for key in found}
        deadline = time.monotonic() + GRACE_S + _RETURN_S
        ended = {}
        for future in self._running:
            if future.key in begun:
                with contextlib.suppress(Exception):  # whatever kept its outcome from coming back, it was stopped
                    ended[future] = future.result(timeout=max(0.1, deadline - time.monotonic()))
        return ended


def execute_point(task: Mapping[str, Any]) -> dict[str, Any]:
    """On a worker: run one point in a child interpreter and return its outcome."""
    try:
        packed = _unpacked(task)
    except MlfuncsError as exc:
        return outcome_of(NOTHING.journal, failed(type(exc).__name__, str(exc)))
    log: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mlfuncs-point-", ignore_cleanup_errors=True) as folder:
        journal = Journal(Path(folder) / "journal.jsonl")
        order = {"run": task["run"], "bundle": task["bundle"], "journal": str(journal.path), "values": task["values"]}
        with _cancellation() as cancelled, fresh_children(packed) as next_child:
            final = attempt_often(Work(packed, lambda: order, journal, log.append, cancelled), next_child)
        journal.close()
        return outcome_of(journal.path, final, "".join(log))


def interrupt_points(keys: list[str]) -> list[str]:
    """On a worker: interrupt those points of `keys` that it runs, and say which."""
    found = [key for key in keys if key in _running_here]
    for key in found:
        _running_here[key].set()
    return found


def _shipped(packed: Packed) -> dict[str, Any]:
    """What every task takes along: the bundle, and where this machine's things are."""
    from mlfuncs.signing import project_key

    files = [path for path in packed.bundle.path.parent.iterdir() if path.is_file()]
    return {
        "bundle": packed.bundle.digest,
        "files": {path.name: base64.b64encode(path.read_bytes()).decode() for path in files},
        "timeout_s": packed.timeout_s,
        "machine": machine(),
        "home": str(packed.settings.home),
        "project": packed.settings.project,
        "artifacts_url": packed.settings.artifacts_url,
        "key": project_key(packed.settings).public,
    }


def _unpacked(task: Mapping[str, Any]) -> Packed:
    """The task's function, opened and verified, with its environment on this worker."""
    from mlfuncs.bundles.bundle import Bundle, open_bundle
    from mlfuncs.bundles.store import unpack_files

    settings = worker_settings(task)
    unpack_files(task["bundle"], task["files"], settings)
    bundle = open_bundle(task["bundle"], settings)
    spec = bundle.manifest.function_spec
    found = Bundle(bundle.digest, bundle.path, bundle.manifest)
    return Packed(found, Path.cwd(), str(bundle.python()), spec, settings, task["timeout_s"])


def worker_settings(task: Mapping[str, Any]) -> Settings:
    """The worker's own settings with the sender's project, key and artifacts, and its home when that is here too.

    Raises SpecError when the sender keeps its artifacts where this machine cannot read them.
    """
    own, url = read_settings(), task["artifacts_url"]
    is_here = task["machine"] == machine()
    if not is_here and "://" not in url:
        raise SpecError(
            f"this Dask worker is on another machine and cannot read the sweep's artifacts ({url or 'in its home'}): "
            "set MLFUNCS_ARTIFACTS_URL to a URL that all machines reach"
        )
    trusted = ",".join(filter(None, [task["key"], own.trusted_keys]))
    home = Path(task["home"]) if is_here else own.home
    return dataclasses.replace(own, home=home, project=task["project"], artifacts_url=url, trusted_keys=trusted)


@contextmanager
def _cancellation() -> Iterator[threading.Event]:
    """An event that is set once this task is to stop: it was interrupted, or the scheduler has given it up."""
    import distributed

    worker = distributed.get_worker()
    key = str(worker.get_current_task())
    cancelled, over = threading.Event(), threading.Event()
    _running_here[key] = cancelled

    def watch() -> None:
        while not over.wait(_ASK_S):
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                cancelled.set()
                return

    thread = threading.Thread(target=watch, name="mlfuncs-cancellation", daemon=True)
    thread.start()
    try:
        yield cancelled
    finally:
        del _running_here[key]
        over.set()
        thread.join()


@contextmanager
def _client(address: str) -> Iterator[distributed.Client]:
    """The client of the scheduler at `address`, else the active one."""
    try:
        import distributed
    except ImportError as exc:
        raise MissingExtra("target='dask'", "dask") from exc
    if not address:
        try:
            yield distributed.get_client()
        except ValueError:
            raise SpecError(
                "there is no Dask cluster: give address='tcp://scheduler:8786', or start one with distributed.Client()"
            ) from None
        return
    try:
        client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as exc:
        raise Unavailable(f"the Dask scheduler at {address} does not answer: {exc}", 10) from exc
    with client:
        yield client


def _why(exc: Exception) -> str:
    import distributed

    if isinstance(exc, distributed.KilledWorker):
        return f"every worker that ran it died ({exc.args[0] if exc.args else ''}); perhaps of memory"
    return str(exc)
