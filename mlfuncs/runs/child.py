"""The child of an isolated run: `python -m mlfuncs.runs.child ANSWER_FD`, tasks as JSON lines on standard input.

It opens the verified bundle, executes, writes the run's journal and answers a line per run. When standard input ends it
ends; when that happens in the middle of a run, whoever started it is gone, and it ends at once.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.runs.journal import FINISH, Journal, failed
from mlfuncs.runs.worker_process import END_OF_OUTPUT
from mlfuncs.settings import Settings, read_settings

_ORPHANED = 3  # exit code when the parent went away during a run


def main() -> None:
    """Execute the runs that come in on standard input."""
    answer_to = int(sys.argv[1])
    tasks = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # the user's code must not read our tasks
    os.close(nothing)
    os.set_inheritable(answer_to, False)
    settings = read_settings()
    inbox = _Inbox(tasks)
    while (task := inbox.next()) is not None:
        try:
            _execute(task, settings)
        except KeyboardInterrupt:
            pass  # it came between the end of the user's code and ours: the run has its end already, or never will
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, END_OF_OUTPUT.encode())
        inbox.idle()
        os.write(answer_to, b"done\n")


class _Inbox:
    """Tasks from the parent. A thread reads them, so that the parent's end is seen while a run computes."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb")
        self._tasks: list[dict[str, Any] | None] = []
        self._changed = threading.Condition()
        self._running = False
        threading.Thread(target=self._read, name="mlfuncs-inbox", daemon=True).start()

    def next(self) -> dict[str, Any] | None:
        """The next task; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._tasks))
            self._running = True
            task = self._tasks.pop(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return task

    def idle(self) -> None:
        """Say that no run is being executed."""
        with self._changed:
            self._running = False

    def _read(self) -> None:
        for line in self._file:
            with self._changed:
                self._tasks.append(json.loads(line))
                self._changed.notify()
        with self._changed:
            self._tasks.append(None)
            self._changed.notify()
            if self._running:
                os._exit(_ORPHANED)


def _execute(task: dict[str, Any], settings: Settings) -> None:
    from mlfuncs.interface.signature import Signature
    from mlfuncs.runs.execution import execute
    from mlfuncs.runs.tracking import ActiveRun
    from mlfuncs.runs.values import decode
    from mlfuncs.secrets import available_secrets

    journal = Journal(Path(task["journal"]))
    try:
        target, spec = _load(task["bundle"], settings)
        signature = Signature.of(target)
        hints = {parameter.name: parameter.annotation for parameter in signature.parameters}
        values = {name: decode(value, _hint(hints.get(name)), settings) for name, value in task["values"].items()}
    except MlfuncsError as exc:
        journal.append(FINISH, failed(type(exc).__name__, str(exc)))
        return
    run = ActiveRun(task["run"], settings, journal, available_secrets(spec.secrets, settings))
    journal.append(FINISH, execute(target, values, signature.returns, spec, run).final)
    journal.close()


@functools.lru_cache(maxsize=4)
def _load(digest: str, settings: Settings) -> Any:
    from mlfuncs.bundles.bundle import open_bundle
    from mlfuncs.decorator import Function

    bundle = open_bundle(digest, settings)
    target = bundle.load()
    target = target.target if isinstance(target, Function) else target
    _stand_for_script(target)
    return target, bundle.manifest.function_spec


def _stand_for_script(target: Any) -> None:
    """Put what a script or notebook defined into this `__main__`, where `multiprocessing` finds functions by name."""
    main = sys.modules["__main__"]
    for name, value in getattr(target, "__globals__", {}).items():
        named = (getattr(value, "__module__", None), getattr(value, "__name__", None))
        if named == ("__main__", name) and not hasattr(main, name):
            setattr(main, name, value)


def _hint(annotation: Any) -> Any:
    return None if annotation is Any or isinstance(annotation, str) else annotation


if __name__ == "__main__":
    main()
