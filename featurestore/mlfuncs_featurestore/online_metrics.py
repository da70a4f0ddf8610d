"""What reading features counts, as Prometheus text: in the workers of endpoints and in the feature server.

Owns: ReadMetrics (reads of features), FeatureMetrics (the server's requests and its reads).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STATUSES = ("PRESENT", "NULL", "NOT_FOUND", "EXPIRED")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Durations:
    """A histogram of seconds. The caller holds a lock."""

    def __init__(self) -> None:
        self._buckets = [0] * (len(BOUNDS_S) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self._seconds += seconds

    def lines(self, name: str, text: str, labels: str = "") -> list[str]:
        comma, total = "," if labels else "", 0
        lines = _head(name, "histogram", text)
        for bound, count in zip((*BOUNDS_S, "+Inf"), self._buckets, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{_braced(labels)} {self._seconds:.9g}", f"{name}_count{_braced(labels)} {total}"]


class ReadMetrics:
    """Reads of online features: how long they took, how many failed, their cells by status."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durations = _Durations()
        self._cells: Counter[str] = Counter()
        self._failed = 0

    def read(self, seconds: float, cells: Mapping[str, int]) -> None:
        """Count one read; `cells` are its cells by status."""
        with self._lock:
            self._durations.observe(seconds)
            self._cells.update(cells)

    def failed(self) -> None:
        """Count a read that raised."""
        with self._lock:
            self._failed += 1

    def lines(self, labels: str = "") -> list[str]:
        """The samples, each with `labels` ('endpoint="x",...')."""
        comma = "," if labels else ""
        with self._lock:
            about = "How long reads of online features took, decoding included."
            lines = self._durations.lines("mlfuncs_features_read_duration_seconds", about, labels)
            lines += _head("mlfuncs_features_cells_total", "counter", "Feature values read, by status.")
            for status in STATUSES:
                count = self._cells[status]
                lines.append(f'mlfuncs_features_cells_total{{{labels}{comma}status="{status}"}} {count}')
            lines += _head("mlfuncs_features_failed_reads_total", "counter", "Reads of online features that failed.")
            return [*lines, f"mlfuncs_features_failed_reads_total{_braced(labels)} {self._failed}"]


class FeatureMetrics:
    """The feature server: requests by route and HTTP status, how long they took, rows pushed, and its reads."""

    def __init__(self) -> None:
        self.reads = ReadMetrics()
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._durations = _Durations()
        self._pushed = 0

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        with self._lock:
            self._requests[route, status] += 1
            self._durations.observe(seconds)

    def pushed(self, rows: int) -> None:
        """Count rows taken by push."""
        with self._lock:
            self._pushed += rows

    def render(self) -> str:
        """All metrics."""
        with self._lock:
            lines = _head("mlfuncs_features_requests_total", "counter", "Requests answered, by route and HTTP status.")
            for (route, status), count in sorted(self._requests.items()):
                lines.append(f'mlfuncs_features_requests_total{{route="{route}",code="{status}"}} {count}')
            lines += self._durations.lines("mlfuncs_features_request_duration_seconds", "How long requests took.")
            lines += _head("mlfuncs_features_pushed_rows_total", "counter", "Rows taken by push.")
            lines.append(f"mlfuncs_features_pushed_rows_total {self._pushed}")
        return "\n".join([*lines, *self.reads.lines()]) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""
