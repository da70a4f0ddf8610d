"""Files that are whole or absent, and a lock that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlfuncs.errors import StorageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` whole, replacing what was there; its folder is made. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as exc:
        raise StorageError(f"{str(path)!r} cannot be written: {exc.strerror or exc}") from exc


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; other processes wait for it. Released when the process ends, however it does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115  closed below, and never removed: another process may wait on it
    except OSError as exc:
        raise StorageError(f"the lock {str(path)!r} cannot be opened: {exc.strerror or exc}") from exc
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
