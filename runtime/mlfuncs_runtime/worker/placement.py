"""On which thread a sync handler runs, decided from how long its calls take.

Handing a call to another thread and its result back costs 12 us of CPU per request under load and 75 us at one
client (measured: 2 cores, Python 3.11, benchmarks/worker_fast_path.py), more than the whole of a quick handler. So a
handler starts beside the server's loop, moves into it once it has proved quick, and is put out again when it is slow.
Wall time is looked at, so one preempted call must not count: the judge is a moving mean.
"""

from __future__ import annotations

QUICK_S = 200e-6  # guess: a call this short delays a health check less than the kernel's own scheduling
SLUGGISH_S = 500e-6  # guess: leave at a mean well above the mean to enter, or the two modes alternate
STALL_S = 50e-3  # guess: longer than a scheduler's time slice, so it was the handler
_WEIGHT = 1 / 64  # of the newest call in the mean
_TRIAL = 64
_TRIAL_MAX = 1 << 16


class Placement:
    """Feed it each call's duration; `inline` says where the next call should run.

    >>> placement = Placement(trial=2)
    >>> [placement.observe(1e-6), placement.observe(1e-6)]
    [False, True]
    >>> placement.observe(0.5)
    False
    """

    def __init__(self, trial: int = _TRIAL) -> None:
        self.inline = False
        self._base = self._trial = trial
        self._calls = 0  # since the last move
        self._mean_s = 0.0

    def observe(self, seconds: float) -> bool:
        """Take one call's duration in; True when the next call should run inline."""
        self._calls += 1
        self._mean_s += (seconds - self._mean_s) * (_WEIGHT if self._calls > 64 else 1 / self._calls)
        if self.inline:
            if seconds >= STALL_S or (self._mean_s >= SLUGGISH_S and self._calls >= 8):
                self._move(inline=False)
        elif seconds >= STALL_S:
            self._calls = 0  # the trial begins anew
        elif self._calls >= self._trial and self._mean_s < QUICK_S:
            self._move(inline=True)
        return self.inline

    def _move(self, inline: bool) -> None:
        """Change sides; a stay inline that was short makes the next trial four times as long."""
        if not inline:
            short = self._calls < 100 * self._trial
            self._trial = min(self._trial * 4, _TRIAL_MAX) if short else self._base
        self.inline, self._calls, self._mean_s = inline, 0, 0.0
