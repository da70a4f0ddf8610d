"""What a run prints: kept in its log file, and shown where it would have been shown anyway.

A run in this process is captured where Python writes (`sys.stdout`, `sys.stderr` and the root logger's handlers); what
C code or a child process writes straight to the terminal is captured only in an isolated run.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlfuncs.errors import StorageError


class RunLog:
    """A run's log file, made at the first write; secret values are masked before anything is written."""

    def __init__(self, path: Path, secrets: Mapping[str, str]) -> None:
        self.path = path
        self._secrets = secrets
        self._file: IO[str] | None = None
        self._stream: Any = None
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        """Append text; it is readable in the file at once. Raises StorageError."""
        with self._lock:
            try:
                if self._file is None:
                    self._open()
                self._stream.write(text)
                self._stream.flush()
            except OSError as exc:
                raise StorageError(f"the run's log {str(self.path)!r} cannot be written: {exc.strerror}") from exc

    def close(self) -> None:
        """Write what was held back and close the file."""
        with self._lock:
            if self._file is not None:
                if self._stream is not self._file:
                    self._stream.close()
                self._file.close()
                self._file = None

    def _open(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._stream = self._file
        if self._secrets:
            from mlfuncs.secrets import Redactor

            self._stream = Redactor(self._secrets.values()).wrap(self._file)


class _Tee:
    """A stream in front of another that gives what is written to `route` as well."""

    def __init__(self, stream: Any, route: Callable[[str], None]) -> None:
        self._stream, self._route = stream, route

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        self._route(text)
        return len(text) if written is None else int(written)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_logs: dict[str, RunLog] = {}
_lock = threading.Lock()
_undo: list[Callable[[], None]] = []


@contextmanager
def captured(run_id: str, log: RunLog) -> Iterator[None]:
    """While the block runs, what Python code of the run prints goes to its log too."""
    with _lock:
        _logs[run_id] = log
        if len(_logs) == 1:
            _undo.extend(_install())
    try:
        yield
    finally:
        with _lock:
            del _logs[run_id]
            if not _logs:
                while _undo:
                    _undo.pop()()


def _route(text: str) -> None:
    from mlfuncs.runs.tracking import current_run

    run = current_run()
    log = _logs.get(run.id) if run is not None else None
    if log is not None:
        log.write(text)


def _install() -> list[Callable[[], None]]:
    before = {"stdout": sys.stdout, "stderr": sys.stderr}
    tees = {name: _Tee(stream, _route) for name, stream in before.items() if stream is not None}
    undo: list[Callable[[], None]] = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            for name, stream in before.items():
                if handler.stream is stream and name in tees:
                    handler.setStream(tees[name])
                    undo.append(lambda handler=handler, stream=stream: handler.setStream(stream))  # type: ignore[misc]
    for name, tee in tees.items():
        setattr(sys, name, tee)
        undo.append(lambda name=name, tee=tee: _restore(name, tee, before[name]))  # type: ignore[misc]
    return undo


def _restore(name: str, tee: _Tee, stream: Any) -> None:
    if getattr(sys, name) is tee:  # else somebody replaced it meanwhile, and it is theirs to restore
        setattr(sys, name, stream)
