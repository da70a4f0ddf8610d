"""What the router measures: load in buckets of one second for the autoscaler, and request counts and durations.

The load is what Knative's queue-proxy reports: the time-weighted average of requests waiting or being answered.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from mlfuncs_runtime.worker.metrics import DURATION_BOUNDS_S, Histogram

_KEPT_S = 120  # seconds of buckets kept for a reader that is away


class LoadMeter:
    """Average concurrency and arrivals per second. Times are seconds on one monotonic clock.

    The time that requests were here in a second is the sum of their ends less the sum of their beginnings, where one
    that began before begins with the second, and one that is still here ends with it.

    >>> meter = LoadMeter(10.0)
    >>> meter.enter(10.5); meter.leave(10.75); meter.take(11.0)
    [(10, 0.25, 1)]
    """

    __slots__ = ("_area", "_arrived", "_buckets", "_end", "active")

    def __init__(self, now_s: float) -> None:
        self.active = 0
        self._area, self._arrived = 0.0, 0  # of the second under way, the ends of requests that are here not yet added
        self._end = math.floor(now_s) + 1
        self._buckets: list[tuple[int, float, int]] = []

    def enter(self, now_s: float) -> None:
        """Count one more request."""
        if now_s >= self._end:
            self._roll(now_s)
        self._area -= now_s
        self.active += 1
        self._arrived += 1

    def leave(self, now_s: float) -> None:
        """Count one request less."""
        if now_s >= self._end:
            self._roll(now_s)
        self._area += now_s
        self.active -= 1

    def take(self, now_s: float) -> list[tuple[int, float, int]]:
        """(second, average concurrency, arrivals) of every whole second since the last call, oldest first."""
        if now_s >= self._end:
            self._roll(now_s)
        taken, self._buckets = self._buckets, []
        return taken

    def under_way(self, now_s: float) -> tuple[int, float, int]:
        """The second that is not over, in the form of `take`: the least that it will come to.

        >>> meter = LoadMeter(10.0)
        >>> meter.enter(10.5); meter.under_way(10.75)
        (10, 0.25, 1)
        """
        if now_s >= self._end:
            self._roll(now_s)
        return self._end - 1, max(0.0, self._area + self.active * now_s), self._arrived

    def _roll(self, now_s: float) -> None:
        while now_s >= self._end:
            area = max(0.0, self._area + self.active * self._end)
            self._buckets.append((self._end - 1, area, self._arrived))
            self._end += 1
            if now_s - self._end > _KEPT_S:  # a long silence: only its end is told
                self._end = math.floor(now_s) - _KEPT_S
            self._area, self._arrived = float(-self.active * (self._end - 1)), 0
        del self._buckets[:-_KEPT_S]


class RequestCounts:
    """Answers by status, and their durations."""

    __slots__ = ("_told", "by_status", "durations")

    def __init__(self) -> None:
        self.by_status: dict[int, int] = {}
        self.durations = Histogram(DURATION_BOUNDS_S)
        self._told = list(self.durations.counts)

    def count(self, status: int, seconds: float) -> None:
        """Count one answer; status 0 is a caller that went away first."""
        by_status = self.by_status
        by_status[status] = by_status.get(status, 0) + 1
        durations = self.durations  # its `observe`, without the call: this is on the fast path
        durations.counts[bisect_left(DURATION_BOUNDS_S, seconds)] += 1
        durations.total += seconds

    def recent_quantiles_s(self, quantiles: Sequence[float]) -> list[float | None]:
        """Estimates over the answers since the last call, each within its histogram bucket; None without answers."""
        counts = [now - before for now, before in zip(self.durations.counts, self._told, strict=True)]
        self._told = list(self.durations.counts)
        return [_quantile(counts, quantile) for quantile in quantiles]


def _quantile(counts: Sequence[int], quantile: float) -> float | None:
    rank, seen, low = sum(counts) * quantile, 0, 0.0
    if not rank:
        return None
    for bound, count in zip(DURATION_BOUNDS_S, counts, strict=False):
        if seen + count >= rank:
            return low + (bound - low) * (rank - seen) / count
        seen, low = seen + count, bound
    return float(DURATION_BOUNDS_S[-1])
