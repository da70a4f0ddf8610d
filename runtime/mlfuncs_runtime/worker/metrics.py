"""A worker's own metrics in Prometheus' text format; cheap enough to count every request."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

# Prometheus' client defaults, with finer steps below 5 ms: handlers of tens of microseconds are common here
DURATION_BOUNDS_S = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
)
BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts per bucket; `observe` costs one bisection."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the histogram's base unit."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> list[str]:
        """The sample lines: cumulative buckets, sum and count."""
        lines, cumulative = [], 0
        comma = "," if labels else ""
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            cumulative += count
            lines.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {cumulative}')
        return [*lines, f"{name}_sum{{{labels}}} {self.total:.9g}", f"{name}_count{{{labels}}} {cumulative}"]


class WorkerMetrics:
    """What one worker counts. `labels` (endpoint, revision, replica) go on every sample."""

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        self.labels = ",".join(f'{key}="{_escape(value)}"' for key, value in (labels or {}).items())
        self.requests: dict[int, int] = {}
        self.durations = Histogram(DURATION_BOUNDS_S)
        self.batch_rows = Histogram(BATCH_BOUNDS)
        self.cold_start_s: float | None = None
        self.parts: list[Callable[[str], list[str]]] = []  # more lines, for the labels: what others count here

    def observe(self, status: int, seconds: float) -> None:
        """Count one answered request."""
        self.requests[status] = self.requests.get(status, 0) + 1
        self.durations.observe(seconds)

    def render(self, in_flight: int, waiting: int) -> bytes:
        """All metrics as Prometheus text, with the two gauges that the caller knows."""
        out: list[str] = []
        comma = "," if self.labels else ""
        codes = [(f'{self.labels}{comma}code="{code}"', count) for code, count in sorted(self.requests.items())]
        _family(out, "mlfuncs_worker_requests_total", "counter", "Requests answered, by HTTP status.", codes)
        name = "mlfuncs_worker_request_duration_seconds"
        _head(out, name, "histogram", "Time from a request's head to the end of its answer.")
        out += self.durations.lines(name, self.labels)
        if any(self.batch_rows.counts):
            _head(out, "mlfuncs_worker_batch_rows", "histogram", "Rows in one batched call.")
            out += self.batch_rows.lines("mlfuncs_worker_batch_rows", self.labels)
        self._gauge(out, "mlfuncs_worker_in_flight_requests", "Requests being answered now.", in_flight)
        self._gauge(out, "mlfuncs_worker_waiting_requests", "Requests that wait for or hold a handler thread.", waiting)
        if self.cold_start_s is not None:
            help_text = "From the wish for this replica until it was ready."
            self._gauge(out, "mlfuncs_worker_cold_start_seconds", help_text, self.cold_start_s)
        self._gauge(out, "process_resident_memory_bytes", "Resident memory.", _resident_bytes())
        cpu = time.process_time()
        _family(out, "process_cpu_seconds_total", "counter", "CPU time of this process.", [(self.labels, cpu)])
        for part in self.parts:
            out += part(self.labels)
        return ("\n".join(out) + "\n").encode()

    def _gauge(self, out: list[str], name: str, help_text: str, value: float) -> None:
        _family(out, name, "gauge", help_text, [(self.labels, value)])


def _head(out: list[str], name: str, kind: str, help_text: str) -> None:
    out += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]


def _family(out: list[str], name: str, kind: str, help_text: str, samples: Sequence[tuple[str, float]]) -> None:
    _head(out, name, kind, help_text)
    out += [f"{name}{{{labels}}} {value:.9g}" for labels, value in samples]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
