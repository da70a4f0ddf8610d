"""A worker's log: every line with its request id, as text or JSON, without secrets, written whole.

What the user's code prints is a log line too. What C code or a child process writes to descriptors 1 and 2 goes to the
same file as it is; when the function has secrets it passes a thread that takes them out.
"""

from __future__ import annotations

import faulthandler
import io
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlfuncs.serving.request_context import current_request

Redact = Callable[[str], str]


def _unchanged(text: str) -> str:
    return text


@dataclass(frozen=True)
class LogOptions:
    """Where a worker logs and how. `labels` (endpoint, revision, replica) go on every JSON line."""

    path: str = ""  # empty: descriptor 1 as it is
    format: str = "text"  # "text" or "json"
    level: str = "INFO"
    labels: Mapping[str, str] = field(default_factory=dict)
    redact: Redact = _unchanged


def open_log(options: LogOptions, descriptors: Literal["raw", "redacted", "nowhere"] = "raw") -> None:
    """Send logging, print and the standard descriptors of this process to the log. Call again after a fork.

    What is written to the descriptors themselves goes to the file as it is, or through a thread that redacts it, or
    (in a process that may have no thread) nowhere. Raises OSError when the file cannot be opened.
    """
    if options.path:
        os.makedirs(os.path.dirname(options.path) or ".", mode=0o700, exist_ok=True)
        target = os.open(options.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    else:
        target = os.dup(1)
    lines = _Lines(target, options)
    root = logging.getLogger()
    root.handlers[:] = [_Handler(lines)]
    root.setLevel(options.level.upper())
    logging.getLogger("uvicorn").setLevel("WARNING")
    sys.stdout, sys.stderr = _Stream("stdout", lines), _Stream("stderr", lines)
    if options.path:
        faulthandler.enable(target)
        _redirect(target, lines, descriptors)


class _Lines:
    """Formats records and writes each with one system call, so that lines of several processes do not mix."""

    def __init__(self, target: int, options: LogOptions) -> None:
        self._target, self._options = target, options

    def write(self, level: str, source: str, message: str, trace: str = "") -> None:
        request = current_request()
        request_id = request.request_id if request else ""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        if self._options.format == "json":
            record: dict[str, Any] = {"time": stamp, "level": level, "source": source, "message": message}
            record |= {"request_id": request_id} if request_id else {}
            record |= {"traceback": trace} if trace else {}
            line = json.dumps({**record, **self._options.labels}, ensure_ascii=False, default=str)
        else:
            tag = f" [{request_id}]" if request_id else ""
            line = f"{stamp} {level:<7}{tag} {message}" + (f"\n{trace.rstrip()}" if trace else "")
        data = (self._options.redact(line) + "\n").encode("utf-8", "replace")
        while data:
            data = data[os.write(self._target, data) :]


class _Handler(logging.Handler):
    def __init__(self, lines: _Lines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        trace = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        try:
            self._lines.write(record.levelname, record.name, record.getMessage(), trace)
        except (OSError, TypeError, ValueError):
            self.handleError(record)


class _Stream(io.TextIOBase):
    """`sys.stdout` of a worker: whole lines become log lines of the request that printed them."""

    encoding = "utf-8"

    def __init__(self, name: str, lines: _Lines) -> None:
        self.name, self._lines = name, lines
        self._partial: dict[int, str] = {}  # thread -> text without its newline yet

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1 if self.name == "stdout" else 2

    def write(self, text: str) -> int:
        thread = threading.get_ident()
        *lines, rest = (self._partial.pop(thread, "") + text).split("\n")
        if rest:
            self._partial[thread] = rest
        for line in lines:
            self._lines.write("INFO" if self.name == "stdout" else "WARNING", self.name, line)
        return len(text)


def _redirect(target: int, lines: _Lines, descriptors: str) -> None:
    if descriptors == "redacted":
        reader, target = os.pipe()
        threading.Thread(target=_pump, args=(reader, lines), name="log", daemon=True).start()
    elif descriptors == "nowhere":
        target = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(target, 1)
    os.dup2(target, 2)


def _pump(reader: int, lines: _Lines) -> None:
    with open(reader, encoding="utf-8", errors="replace") as file:
        for line in file:
            lines.write("INFO", "descriptor", line.rstrip("\n"))
