"""When a cron schedule ticks; pure. The fields are read by cronsim, whose rules are those of Debian's cron.

Daylight saving time: a schedule with a `*` in the hour or minute follows real time, so it ticks in both of the two
hours at the end of summer and in none that does not exist. One at fixed hours ticks once a day: at the first moment
after a gap when its time fell into it, and once when its time comes twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from mlfuncs.triggers import Cron, five_fields


def next_time(schedule: str, after: datetime, time_zone: str = "UTC") -> datetime | None:
    """The first tick after `after` (aware), in UTC; None when none comes in cronsim's horizon of 50 years.

    >>> next_time("@hourly", datetime(2026, 1, 1, 10, 30, tzinfo=UTC)).isoformat()
    '2026-01-01T11:00:00+00:00'
    """
    from cronsim import CronSim

    found = next(CronSim(five_fields(schedule), after.astimezone(ZoneInfo(time_zone))), None)
    return None if found is None else found.astimezone(UTC)


def last_time(schedule: str, after: datetime, until: datetime, time_zone: str = "UTC") -> datetime | None:
    """The last tick in (after, until], in UTC; None when there is none.

    It looks back over spans that grow, so that a year without a look at a schedule of minutes costs no more than a day.
    """
    span = timedelta(hours=1)
    while True:
        start = max(after, until - span)
        found = None
        tick = next_time(schedule, start, time_zone)
        while tick is not None and tick <= until:
            found, tick = tick, next_time(schedule, tick, time_zone)
        if found is not None or start == after:
            return found
        span *= 8


@dataclass(frozen=True)
class Memory:
    """What is remembered of one cron trigger: until when its ticks are dealt with, and the tick fired last."""

    until: datetime
    fired: datetime | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"until": self.until.isoformat(), "fired": self.fired.isoformat() if self.fired else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Memory:
        """What `to_dict` wrote."""
        fired = values.get("fired")
        return cls(datetime.fromisoformat(values["until"]), datetime.fromisoformat(fired) if fired else None)


@dataclass(frozen=True)
class Turn:
    """What one look at the clock gives: what to remember, and the tick to fire or the tick that is dropped."""

    memory: Memory
    fire: datetime | None = None
    dropped: datetime | None = None


def look(cron: Cron, memory: Memory | None, now: datetime, busy: bool, grace_s: float = 60.0) -> Turn:
    """Decide at `now`. A schedule seen for the first time starts from now: what was before it is not made up for.

    Of several ticks since the last look only the latest counts; one older than `grace_s` was missed, and `cron.missed`
    says whether it is made up for. `busy`: the call of an earlier tick still runs.
    """
    if memory is None:
        return Turn(Memory(now))
    if now <= memory.until:  # the clock was set back: nothing fires twice
        return Turn(memory)
    tick = last_time(cron.schedule, memory.until, now, cron.time_zone)
    if tick is None:
        return Turn(memory)
    late = (now - tick).total_seconds() > grace_s
    if (busy and cron.overlap == "skip") or (late and cron.missed == "skip"):
        return Turn(Memory(tick, memory.fired), dropped=tick)
    return Turn(Memory(tick, tick), fire=tick)
