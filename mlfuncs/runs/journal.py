"""A run's journal: one file of JSON lines, written before anything is acknowledged, read by whoever keeps the records.

A line is appended with one write to the operating system, so what was acknowledged survives the death of the process at
once. A power cut can take what was logged since the registry last took the journal in (half a second): a sync for each
metric would make training wait for the disk. While the registry is away, the recorder syncs the journal. The offset of
a line in the file is the entry's number, which makes reading the file twice harmless. Memory stays bounded however much
is logged: the file is the queue.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs.errors import StorageError

CHUNK_BYTES = 1 << 20

# kinds of entries: ["m", name, value, step, at], ["p", {params}], ["a", role, name, ref], ["t", attempt], ["f", {...}]
METRIC, PARAMS, ARTIFACT, ATTEMPT, FINISH = "m", "p", "a", "t", "f"


@dataclass(frozen=True)
class Entry:
    """One entry: `number` is its offset in the file, `fields` the JSON list without its kind."""

    number: int
    kind: str
    fields: list[Any]


class Journal:
    """The writing side; any thread and any forked child may append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._torn = False  # whether the last entry was cut short by a full disk

    def append(self, *entry: Any) -> None:
        """Add one entry; once this returns, it survives the process. Raises StorageError when it cannot be written."""
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        if self._torn:
            line = b"\n" + line  # the piece before it must not spoil this one
        try:
            if self._file is None:
                self._open()
            written = os.write(self._file, line)  # type: ignore[arg-type]
        except OSError as exc:
            raise StorageError(
                f"the run's journal {str(self.path)!r} cannot be written: {exc.strerror}; free some disk space or set "
                "MLFUNCS_HOME to a folder that can be written"
            ) from exc
        self._torn = written != len(line)
        if self._torn:
            raise StorageError(f"the run's journal {str(self.path)!r} was cut short: free some disk space")

    def sync(self) -> None:
        """Have the disk keep what was appended so far, by whichever process."""
        with contextlib.suppress(FileNotFoundError):  # nothing was appended
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def read_entries(path: Path, offset: int = 0) -> Iterator[tuple[list[Entry], int]]:
    """Chunks of whole entries from `offset` on, each with the offset that follows it.

    A torn last line is left for later; a line that a full disk cut short was never acknowledged and is left out.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        while lines := file.readlines(CHUNK_BYTES):
            entries = []
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                with contextlib.suppress(ValueError):
                    kind, *fields = json.loads(line)
                    entries.append(Entry(offset, kind, fields))
                offset += len(line)
            if entries:
                yield entries, offset
            if not lines[-1].endswith(b"\n"):
                return


def failed(error_type: str, message: str, traceback: str = "") -> dict[str, Any]:
    """The end of a run that failed without having said so itself."""
    error = {"type": error_type, "message": message, "traceback": traceback}
    return {"status": "failed", "error": error, "finished_at": time.time()}
