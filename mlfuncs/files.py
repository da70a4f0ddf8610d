"""Files that are whole or absent, also after a power cut, and a lock that one process holds at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mlfuncs.errors import StorageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` whole, replacing what was there; its folder is made. On disk when this returns. Raises StorageError.

    Without the first sync, a power cut soon after could leave the new name with nothing in it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write_synced(file, content)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as exc:
        raise StorageError(f"{str(path)!r} cannot be written: {exc.strerror or exc}") from exc


def write_synced(file: BinaryIO, content: bytes) -> None:
    """Write all of `content` to an open file and have the disk keep it."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names that are in `folder` now."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
