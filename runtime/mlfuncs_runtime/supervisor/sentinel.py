"""Starts the supervisor again when it dies without having been told to stop.

    python -I -S sentinel.py PID STARTED COMMAND...

Standard library only, so that it costs a bare interpreter. Its own end is one of two: the supervisor stops it before
it stops itself, or a new supervisor is up and has a sentinel of its own.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

_FIRST_DELAY_S = 0.2  # guess; doubles with each start that fails
_MAX_DELAY_S = 30.0
_ALREADY_RUNS = 3  # the supervisor's exit status when another one holds the lock


def main(argv: list[str]) -> int:
    """Watch the process `argv[0]` (started at `argv[1]`), then start the command `argv[2:]` until it stays."""
    pid, started, command = int(argv[0]), argv[1], argv[2:]
    _wait_for_end(pid, started)
    delay_s = _FIRST_DELAY_S
    while True:
        time.sleep(delay_s)
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        status = child.wait()  # the new supervisor ends us once it is up
        if status in (0, _ALREADY_RUNS):
            return 0
        delay_s = min(delay_s * 2, _MAX_DELAY_S)


def _wait_for_end(pid: int, started: str) -> None:
    try:
        handle = os.pidfd_open(pid)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return
    if stat[stat.rindex(")") + 2 :].split()[19] == started:
        select.select([handle], [], [])
    os.close(handle)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
