"""What a run used: CPU seconds and the peak of memory.

Both are the whole process's while the run lasted, its waited-for children included in CPU: threads share them, so runs
side by side in one process each count all of it. In an isolated run the process is the run's own. The peak is the
resident set's high-water mark, reset at the start (Linux); elsewhere the process's peak since it began. `ru_maxrss` is
not used where it can be helped: it survives exec, so a child would report its parent's peak.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_CLEAR_PEAK = b"5\n"  # proc(5), /proc/pid/clear_refs: reset the peak resident set size


@dataclass(frozen=True)
class Usage:
    """CPU seconds used, and the peak resident memory in MiB."""

    cpu_s: float
    peak_memory_mib: float


class Meter:
    """Measures from its creation to `read`."""

    def __init__(self) -> None:
        _reset_peak()
        self._cpu_s = _cpu_s()

    def read(self) -> Usage:
        """What was used since the meter was made."""
        return Usage(round(_cpu_s() - self._cpu_s, 6), round(_peak_bytes() / 2**20, 3))


def _cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_bytes(_CLEAR_PEAK)
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the process's whole life


def _peak_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc on this system
    factor = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
