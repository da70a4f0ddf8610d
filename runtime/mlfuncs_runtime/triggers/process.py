"""Runs the triggers of one home: reads the table that the supervisor writes, and calls endpoints through the router.

    python -m mlfuncs_runtime.triggers.process

One per home (a lock on `run/triggers.lock`). SIGTERM waits for the calls under way; after a `kill -9` streams hand out
again what was not acknowledged.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.serving.request_context import watch_calls
from mlfuncs.settings import Settings, read_settings
from mlfuncs_runtime.supervisor.places import Places, make_places, read_json, write_json
from mlfuncs_runtime.supervisor.triggers import TOKEN, table_path
from mlfuncs_runtime.tracing import SpanExport, note_call, open_export
from mlfuncs_runtime.triggers.calls import Callee
from mlfuncs_runtime.triggers.runners import CronMemories, Runner, make_runner
from mlfuncs_runtime.triggers.table import Entry

log = logging.getLogger("mlfuncs.triggers")

_LOOK_EVERY_S = 0.5
_STOP_S = 8.0


class TriggerProcess:
    """The triggers that run, by (key, call)."""

    def __init__(self, settings: Settings, places: Places) -> None:
        from mlfuncs.registry import site_id

        self._settings, self._places = settings, places
        self._consumer = f"mlfuncs-{site_id(settings)}"
        self._memories = CronMemories(places.run / "cron.json")
        self._token = os.environ.get(TOKEN, "")
        self._runners: dict[tuple[str, Callee], Runner] = {}
        self._seen: dict[str, Any] | None = None
        self._told: dict[str, Any] | None = None

    def run(self, stop: threading.Event) -> None:
        """Follow the table until `stop`."""
        export = self._trace()
        while not stop.is_set():
            table = read_json(table_path(self._places))
            if table is not None and table != self._seen:
                self._follow(table)
                self._seen = table
            self._tell()
            stop.wait(_LOOK_EVERY_S)
        self._end(list(self._runners.values()))
        write_json(self._places.triggers_status, {})
        if export is not None:
            export.stop()

    def _trace(self) -> SpanExport | None:
        """Send a span of every call, when the settings name a collector."""
        settings = self._settings
        if not settings.otel_endpoint:
            return None
        attributes = {"service.namespace": settings.project, "mlfuncs.project": settings.project}
        try:
            export = open_export(settings.otel_endpoint, "mlfuncs-triggers", attributes)
        except MlfuncsError as exc:
            log.warning("%s", exc)
            return None
        watch_calls(lambda call: note_call(export, call, "CONSUMER"))
        export.start()
        return export

    def _follow(self, table: dict[str, Any]) -> None:
        """End what is not in the table any more, then begin what is new."""
        entries = [Entry.from_dict(values) for values in table["entries"]]
        wanted = {
            (entry.key, Callee(f"{table['url']}/{entry.endpoint}", entry.timeout_s, self._token)): entry
            for entry in entries
        }
        self._end([self._runners.pop(key) for key in list(self._runners) if key not in wanted])
        self._memories.forget_others({entry.key for entry in entries})
        for key, entry in wanted.items():
            if key not in self._runners:
                log.info("%s: %s", entry.key, entry.trigger.label)
                runner = make_runner(entry, key[1], self._memories, self._settings, self._consumer)
                self._runners[key] = runner
                runner.start()

    def _tell(self) -> None:
        status = {
            key[0]: {"kind": runner.entry.trigger.kind, "label": runner.entry.trigger.label, **runner.status()}
            for key, runner in self._runners.items()
        }
        if status != self._told:
            write_json(self._places.triggers_status, status)
            self._told = status

    def _end(self, runners: list[Runner]) -> None:
        for runner in runners:
            runner.stopping.set()
        deadline_s = time.monotonic() + _STOP_S
        for runner in runners:
            runner.join(max(0.0, deadline_s - time.monotonic()))


def wait_for_lock(handle: int, stop: threading.Event) -> bool:
    """Wait until an earlier process, which may still end its calls, lets go of the lock; False when told to stop."""
    while not stop.is_set():
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop.wait(_LOOK_EVERY_S)
        else:
            return True
    return False


def main() -> int:
    """Run until SIGTERM; the process's exit status."""
    settings = read_settings()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stdout
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        places = make_places(settings)
        with open(places.run / "triggers.lock", "w") as lock:
            if wait_for_lock(lock.fileno(), stop):
                TriggerProcess(settings, places).run(stop)
    except MlfuncsError as exc:
        log.error("%s", exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
