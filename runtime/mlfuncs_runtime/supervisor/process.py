"""The supervisor's process (`supervisor.py` says what it does).

    python -m mlfuncs_runtime.supervisor.process [--ready-fd N]

One per home: a lock on `run/supervisor.lock`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from mlfuncs.errors import Conflict, MlfuncsError
from mlfuncs.settings import Settings, read_settings
from mlfuncs_runtime.supervisor.places import Places, make_places
from mlfuncs_runtime.supervisor.supervisor import Supervisor

log = logging.getLogger("mlfuncs.supervisor")

EXIT_ALREADY_RUNS = 3  # sentinel.py knows it


def hold_lock(places: Places) -> int:
    """The lock of this home's supervisor, as a descriptor to keep. Raises Conflict when another one holds it."""
    handle = os.open(places.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        owner = os.read(handle, 32).decode() or "?"
        os.close(handle)
        raise Conflict(f"a supervisor of {str(places.home)!r} runs already (pid {owner.strip()})") from exc
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def main(argv: Sequence[str] | None = None) -> int:
    """Run the supervisor of the home that the settings name; the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlfuncs_runtime.supervisor.process", description=__doc__)
    parser.add_argument("--ready-fd", type=int, default=-1, help="where to write {} or an error once it is decided")
    options = parser.parse_args(argv)
    if options.ready_fd >= 0 and os.fork():
        os._exit(0)  # who started us waits for this process only, and the supervisor is nobody's child
    settings = read_settings()
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(message)s",
        stream=sys.stdout,
        force=True,
    )
    try:
        places = make_places(settings)
        hold_lock(places)
    except MlfuncsError as exc:
        _tell(options.ready_fd, exc, already_runs=isinstance(exc, Conflict))
        log.error("%s", exc)
        return EXIT_ALREADY_RUNS if isinstance(exc, Conflict) else 1
    try:
        asyncio.run(_live(settings, places, options.ready_fd))
    except MlfuncsError as exc:
        _tell(options.ready_fd, exc)
        log.error("%s", exc)
        return 1
    return 0


async def _live(settings: Settings, places: Places, ready_fd: int) -> None:
    supervisor = Supervisor(settings, places)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stopping.set)
    await supervisor.run(lambda: _tell(ready_fd, None))


def _tell(ready_fd: int, error: MlfuncsError | None, already_runs: bool = False) -> None:
    """Tell who started us how it went, once."""
    if ready_fd < 0:
        return
    answer: dict[str, Any] = {}
    if error is not None:
        answer = {"error": error.title, "message": str(error), "already_runs": already_runs}
    with contextlib.suppress(OSError):
        os.write(ready_fd, json.dumps(answer).encode() + b"\n")
        os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main())
