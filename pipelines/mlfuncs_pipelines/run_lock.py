"""One engine at a time works on the folder of a run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlfuncs.errors import Conflict


@contextmanager
def sole_engine(folder: Path) -> Iterator[None]:
    """Hold the run in `folder`; let go when the block or the process ends. Raises Conflict while another holds it."""
    with open(folder / "lock", "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Conflict(
                f"pipeline run {folder.name} is running, pid {holder}; wait until it has ended, or end that process"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
