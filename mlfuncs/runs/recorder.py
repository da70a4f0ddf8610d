"""The thread that keeps this process's runs: journals into the registry, heartbeats, and work that may come later.

One thread for the whole process, started with the first run. It never stands in a run's way: what it cannot write now
(the database is away) stays in the journal.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlfuncs.errors import MlfuncsError
from mlfuncs.runs.liveness import HEARTBEAT_S

if TYPE_CHECKING:
    from mlfuncs.runs.records import Record

DRAIN_S = 0.5  # how long a logged metric may take to show in the registry
_EXIT_S = 5.0  # how long the process waits at its end for work that was put off

log = logging.getLogger(__name__)


class Recorder:
    """Keeps the records given to `watch` until they are finished, and does the work given to `submit`, in order."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._work: dict[str, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self._busy: str | None = None
        self._beaten = 0.0
        self._thread: threading.Thread | None = None

    def watch(self, record: Record) -> None:
        """Drain the record's journal and say that its run is alive, until its end is in the registry."""
        with self._changed:
            self._records[record.run_id] = record
            self._start()
            self._changed.notify_all()

    def release(self, record: Record) -> None:
        """Leave the record alone once its end is in the registry; until then, go on trying."""
        if record.is_finished:
            with self._changed:
                self._records.pop(record.run_id, None)

    def submit(self, name: str, work: Callable[[], None]) -> None:
        """Do `work` soon; `settle(name)` waits for it."""
        with self._changed:
            self._work[name] = work
            self._start()
            self._changed.notify_all()

    def settle(self, name: str, timeout_s: float = _EXIT_S) -> bool:
        """Wait until the work of that name is done; False when it takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: name not in self._work and self._busy != name, timeout_s)

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._loop, name="mlfuncs-recorder", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while True:
            work = self._next_work()
            if work is not None:
                self._do(work)
            self._tend()

    def _next_work(self) -> Callable[[], None] | None:
        with self._changed:
            if not self._work:
                self._changed.wait(DRAIN_S if self._records else None)
            if not self._work:
                return None
            self._busy, work = next(iter(self._work.items()))
            del self._work[self._busy]
            return work

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # the loop must go on for the other runs
            log.warning("what was put off until after a run failed", exc_info=True)
        finally:
            with self._changed:
                self._busy = None
                self._changed.notify_all()

    def _tend(self) -> None:
        with self._changed:
            records = list(self._records.values())
        due = time.monotonic() - self._beaten >= HEARTBEAT_S
        if due:
            self._beaten = time.monotonic()
        for record in records:
            try:
                record.drain()
                self.release(record)
                if due and not record.is_finished:
                    record.heartbeat()
            except MlfuncsError as exc:
                log.debug("the record of run %s waits: %s", record.run_id, exc)
                with contextlib.suppress(OSError):  # the journal is all there is now; a full disk says so to who logs
                    record.journal.sync()
            except Exception:  # the loop must go on for the other runs
                log.warning("the record of run %s cannot be kept now", record.run_id, exc_info=True)

    def finish(self) -> None:
        """Wait a little, at the process's end, for work that was put off."""
        with self._changed:
            self._changed.wait_for(lambda: not self._work and self._busy is None, _EXIT_S)


_recorder = Recorder()


def recorder() -> Recorder:
    """This process's recorder."""
    return _recorder


def _forget() -> None:
    global _recorder
    _recorder = Recorder()  # the thread and the runs belong to the process we were forked from


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: recorder().finish())  # the one of this process, also after a fork
