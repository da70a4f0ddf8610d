"""What the feature server counts, as Prometheus text.

Owns: FeatureMetrics.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter

BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class FeatureMetrics:
    """Requests by route and HTTP status, how long they took, cells by status, rows pushed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._cells: Counter[str] = Counter()
        self._buckets = [0] * (len(BOUNDS_S) + 1)
        self._seconds = 0.0
        self._pushed = 0

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        with self._lock:
            self._requests[route, status] += 1
            self._buckets[bisect_left(BOUNDS_S, seconds)] += 1
            self._seconds += seconds

    def served(self, statuses: dict[str, list[str]]) -> None:
        """Count the cells of one answer."""
        with self._lock:
            for codes in statuses.values():
                self._cells.update(codes)

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
            lines += _head("mlfuncs_features_request_duration_seconds", "histogram", "How long requests took.")
            total = 0
            for bound, count in zip((*BOUNDS_S, "+Inf"), self._buckets, strict=True):
                total += count
                lines.append(f'mlfuncs_features_request_duration_seconds_bucket{{le="{bound}"}} {total}')
            lines.append(f"mlfuncs_features_request_duration_seconds_sum {self._seconds:.9g}")
            lines.append(f"mlfuncs_features_request_duration_seconds_count {total}")
            lines += _head("mlfuncs_features_cells_total", "counter", "Feature values served, by status.")
            lines += [f'mlfuncs_features_cells_total{{status="{one}"}} {n}' for one, n in sorted(self._cells.items())]
            lines += _head("mlfuncs_features_pushed_rows_total", "counter", "Rows taken by push.")
            lines.append(f"mlfuncs_features_pushed_rows_total {self._pushed}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
