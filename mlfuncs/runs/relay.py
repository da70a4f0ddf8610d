"""How a run in a cluster tells what happened through its log, the one channel that every cluster has.

What the function prints is passed on as it is. Records are lines of their own: a mark, JSON, a newline. The marks are
control characters that are taken out of what the function prints, so that it cannot be mistaken for a record.

    WHOLE  before a record that begins where the output ended with a newline
    CUT    before one that had to begin a new line: the newline before it is not the function's

Records are a journal's entries (see `mlfuncs.runs.journal`) and

    ["k", public key]                       what stored objects are signed with, said before any
    ["o", digest, base64, more to come]     a piece of a stored object, said before the entry that names it
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

WHOLE, CUT = "\x1e", "\x1f"
KEY, OBJECT = "k", "o"
PIECE_BYTES = 9_000  # 12,000 characters of base64: container runtimes cut log lines at 16 KiB
_NO_MARKS = {ord(WHOLE): None, ord(CUT): None}


class Relay:
    """The telling side: text and records into one stream, each record on a line of its own. Safe for threads."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._at_line_start = True

    def text(self, text: str) -> None:
        """Pass on what the function printed."""
        text = text.translate(_NO_MARKS)
        if text:
            with self._lock:
                self._write(text)
                self._at_line_start = text.endswith("\n")

    def record(self, *record: Any) -> None:
        """Tell one record."""
        line = json.dumps(record, separators=(",", ":")) + "\n"
        with self._lock:
            self._write(f"{WHOLE}{line}" if self._at_line_start else f"\n{CUT}{line}")
            self._at_line_start = True

    def object(self, digest: str, content: bytes) -> None:
        """Tell a stored object, in pieces that no log cuts."""
        for start in range(0, max(len(content), 1), PIECE_BYTES):
            piece = content[start : start + PIECE_BYTES]
            self.record(OBJECT, digest, base64.b64encode(piece).decode(), start + PIECE_BYTES < len(content))


class Listener:
    """The listening side: takes the log line by line, gives back text and records in the order they were told."""

    def __init__(self) -> None:
        self._newline = ""  # of the last line of text: given with what follows, for it may not be the function's

    def line(self, line: str) -> Iterator[str | list[Any]]:
        """What one line of the log (without its newline) says: text, or a record as a list."""
        if line[:1] not in (WHOLE, CUT):
            yield self._newline + line
            self._newline = "\n"
            return
        if line[0] == WHOLE and self._newline:
            yield self._newline
        self._newline = ""
        try:
            record = json.loads(line[1:])
        except ValueError:
            return  # the log was cut in the middle of it
        yield record

    def end(self) -> Iterator[str]:
        """What was held back, once the log has ended."""
        if self._newline:
            yield self._newline
        self._newline = ""
