"""Averages of a load over time, as Knative aggregates it (pkg/autoscaler/aggregation); the clock is an argument.

Values are summed into buckets of 1 s. "No data" is None: a revision that nobody measured is not an idle one.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlfuncs_runtime.autoscaler import AutoscalerConfig

WEIGHT_PRECISION = 0.9999  # the weights of a whole window sum to at least this
MIN_EXPONENT = 0.2  # smallest decay per bucket, so that long windows are not a plain mean
_DIGITS = 6  # Knative rounds the linear average to this many digits


class LinearWindow:
    """The plain mean of the buckets in the last `window_s` seconds.

    Before a whole window has been seen the mean is over the seconds since the first value; a gap counts as zeros, and
    trailing seconds without any value do not count.

    >>> window = LinearWindow(60)
    >>> window.average(0.0) is None
    True
    >>> window.record(0.0, 4.0); window.record(1.0, 8.0); window.average(1.5)
    6.0
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._buckets = [0.0] * math.ceil(window_s)
        self._total = 0.0
        self._first: int | None = None  # second of the first value after silence
        self._last: int | None = None  # second of the newest value

    def record(self, now_s: float, value: float) -> None:
        """Add `value` to the bucket of `now_s`; a value older than the window is dropped."""
        second = math.floor(now_s)
        if self._first is None or self._last is None:
            self._first = self._last = second
        elif second != self._last:
            if second + self._window_s <= self._last:
                return
            self._first = min(self._first, second)
            if second > self._last:
                self._advance(self._last, second)
        self._buckets[second % len(self._buckets)] += value
        self._total += value

    def _advance(self, last: int, second: int) -> None:
        if second - last >= self._window_s:
            self._first = second
            self._buckets = [0.0] * len(self._buckets)
            self._total = 0.0
        else:
            for stale in range(last + 1, second + 1):
                index = stale % len(self._buckets)
                self._total -= self._buckets[index]
                self._buckets[index] = 0.0
        self._last = second

    def is_empty(self, now_s: float) -> bool:
        """Whether nothing was recorded for longer than the window."""
        return self._last is None or math.floor(now_s) - self._last > self._window_s

    def average(self, now_s: float) -> float | None:
        """The mean at `now_s`, or None when there is no data."""
        if self._first is None or self._last is None or self.is_empty(now_s):
            return None
        second, size = math.floor(now_s), len(self._buckets)
        silent = max(0, second - self._last)
        if silent >= self._window_s:
            return 0.0
        stale = sum(self._buckets[at % size] for at in range(self._last + 1, self._last + silent + 1))
        return _rounded((self._total - stale) / min(self._last - self._first + 1, size - silent))

    def average_with(self, at_s: float, value: float) -> float:
        """What the mean at `at_s` would be with `value` recorded there; nothing is recorded."""
        ahead = copy.copy(self)
        ahead._buckets = list(self._buckets)
        ahead.record(at_s, value)
        return ahead.average(at_s) or 0.0


class WeightedWindow(LinearWindow):
    """A mean in which newer buckets weigh exponentially more; the decay follows from the window's length."""

    def __init__(self, window_s: float) -> None:
        super().__init__(window_s)
        self._decay = max(1 - (1 - WEIGHT_PRECISION) ** (1 / len(self._buckets)), MIN_EXPONENT)

    def average(self, now_s: float) -> float | None:
        """The weighted mean at `now_s`, or None when there is no data."""
        if self._last is None or self.is_empty(now_s):
            return None
        size = len(self._buckets)
        silent = max(0, math.floor(now_s) - self._last)
        weight = self._decay * (1 - self._decay) ** silent
        mean = 0.0
        for back in range(size - silent):
            mean += self._buckets[(self._last - back) % size] * weight
            weight *= 1 - self._decay
        return mean


class LoadWindows:
    """The stable and the panic window of one revision, fed with one measure per second."""

    def __init__(self, config: AutoscalerConfig) -> None:
        kind = LinearWindow if config.metric_aggregation_algorithm == "linear" else WeightedWindow
        self._stable = kind(config.window_s)
        self._panic = kind(config.panic_window_s)

    def record(self, now_s: float, value: float) -> None:
        """Add one second's average concurrency, or its number of requests."""
        self._stable.record(now_s, value)
        self._panic.record(now_s, value)

    def averages(self, now_s: float, coming: tuple[float, float] | None = None) -> tuple[float | None, float | None]:
        """The (stable, panic) averages; both None when nothing was recorded for a whole stable window.

        `coming` is (when, value) of a measure that is not complete and can only grow: it counts where it raises an
        average, so that what it already makes certain need not be waited for, and it lowers none.
        """
        stable, panic = self._stable.average(now_s), self._panic.average(now_s)
        if coming is not None and coming[1] > 0:
            stable = max(stable or 0.0, self._stable.average_with(*coming))
            panic = max(panic or 0.0, self._panic.average_with(*coming))
        return (None, None) if stable is None else (stable, panic or 0.0)


def _rounded(value: float) -> float:
    """Half away from zero at six digits, as Go's math.Round."""
    scaled = value * 10**_DIGITS
    return math.copysign(math.floor(abs(scaled) + 0.5), scaled) / 10**_DIGITS
