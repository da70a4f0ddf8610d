"""When cron triggers tick: against croniter where that is present, a plain search, and the clocks' changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs.errors import SpecError
from mlfuncs.triggers import Cron
from mlfuncs_runtime.triggers.cron import Memory, last_time, look, next_time

NOON = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)


def field(low: int, high: int) -> st.SearchStrategy[str]:
    numbers = st.integers(low, high)
    pairs = st.tuples(numbers, numbers).filter(lambda pair: pair[0] < pair[1])  # libraries differ on 0-0
    spans = pairs.map(lambda pair: f"{pair[0]}-{pair[1]}")
    steps = st.tuples(st.one_of(st.just("*"), spans), st.integers(1, 12)).map(lambda pair: f"{pair[0]}/{pair[1]}")
    lists = st.lists(numbers, min_size=1, max_size=3, unique=True).map(lambda found: ",".join(map(str, found)))
    return st.one_of(st.just("*"), numbers.map(str), spans, steps, lists)


def allowed(text: str, low: int, high: int) -> set[int]:
    """A field's values, read another way than the library does."""
    found: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        start, end = (low, high) if span == "*" else (int(first), int(last or first))
        found |= set(range(start, end + 1, int(step or 1)))
    return found


moments = st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)).map(lambda found: found.replace(tzinfo=UTC))


@given(field(0, 59), field(0, 23), field(1, 28), moments)
@settings(max_examples=150, deadline=None)
def test_the_next_tick_is_the_first_minute_that_fits(minute: str, hour: str, day: str, after: datetime) -> None:
    minutes, hours, days = allowed(minute, 0, 59), allowed(hour, 0, 23), allowed(day, 1, 31)
    date = after.date()
    found = None
    while found is None:
        if date.day in days:
            ticks = (datetime(date.year, date.month, date.day, h, m, tzinfo=UTC) for h in hours for m in minutes)
            found = min((tick for tick in ticks if tick > after), default=None)
        date += timedelta(days=1)
    assert next_time(f"{minute} {hour} {day} * *", after) == found


@given(field(0, 59), field(0, 23), field(1, 12), field(0, 6), moments)
@settings(max_examples=100, deadline=None)
def test_the_next_tick_is_that_of_croniter(minute: str, hour: str, month: str, weekday: str, after: datetime) -> None:
    croniter = pytest.importorskip("croniter")
    schedule = f"{minute} {hour} * {month} {weekday}"
    assert next_time(schedule, after) == croniter.croniter(schedule, after).get_next(datetime)


@given(field(0, 59), field(0, 23), moments, st.integers(0, 400_000))
@settings(max_examples=60, deadline=None)
def test_the_last_tick_is_followed_by_none_until_now(minute: str, hour: str, after: datetime, seconds: int) -> None:
    until = after + timedelta(seconds=seconds)
    schedule = f"{minute} {hour} * * *"
    found = last_time(schedule, after, until)
    upcoming = next_time(schedule, found or after)
    assert upcoming is not None and upcoming > until
    assert found is None or after < found <= until


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("@hourly", "2026-03-10T13:00"),
        ("@daily", "2026-03-11T00:00"),
        ("@weekly", "2026-03-15T00:00"),
        ("@yearly", "2027-01-01T00:00"),
        ("0 9 * jan-apr mon-fri", "2026-03-11T09:00"),
        ("*/20 8-18/2 * * *", "2026-03-10T12:20"),
    ],
)
def test_names_and_shorthands(schedule: str, expected: str) -> None:
    found = next_time(schedule, NOON)
    assert found is not None and found.isoformat().startswith(expected)


def ticks(schedule: str, start: datetime, hours: int) -> list[str]:
    zone, found, tick = ZoneInfo("Europe/Berlin"), [], next_time(schedule, start, "Europe/Berlin")
    while tick is not None and tick <= start + timedelta(hours=hours):
        found.append(tick.astimezone(zone).isoformat()[5:])
        tick = next_time(schedule, tick, "Europe/Berlin")
    return found


def test_a_fixed_time_in_the_gap_of_spring_ticks_once_right_after_it() -> None:
    start = datetime(2026, 3, 28, 23, 0, tzinfo=UTC)
    assert ticks("30 2 * * *", start, 20) == ["03-29T03:00:00+02:00"]


def test_a_fixed_time_that_comes_twice_in_autumn_ticks_once() -> None:
    start = datetime(2026, 10, 24, 20, 0, tzinfo=UTC)
    assert len(ticks("30 2 * * *", start, 20)) == 1


def test_every_hour_follows_real_time_through_both_changes() -> None:
    assert len(ticks("0 * * * *", datetime(2026, 3, 28, 23, 30, tzinfo=UTC), 6)) == 6
    assert len(ticks("0 * * * *", datetime(2026, 10, 24, 23, 30, tzinfo=UTC), 6)) == 6


def test_every_tick_fires_exactly_once_however_often_one_looks_and_restarts() -> None:
    cron, memory, fired = Cron("*/5 * * * *"), Memory(NOON), []
    for seconds in range(0, 3600, 7):
        turn = look(cron, Memory.from_dict(memory.to_dict()), NOON + timedelta(seconds=seconds), busy=False)
        memory = turn.memory
        fired += [turn.fire] if turn.fire else []
    assert fired == [NOON.replace(second=0) + timedelta(minutes=5 * n) for n in range(1, 13)]


def test_of_missed_ticks_the_latest_is_made_up_for_or_none() -> None:
    later = NOON + timedelta(days=3, minutes=3)
    turn = look(Cron("0 * * * *"), Memory(NOON), later, busy=False)
    assert turn.fire == later.replace(minute=0, second=0)
    assert look(Cron("0 0 * * *"), Memory(NOON), later, busy=False).fire == datetime(2026, 3, 13, tzinfo=UTC)
    assert look(Cron("0 0 * * *", missed="skip"), Memory(NOON), later, busy=False).dropped is not None


def test_a_tick_during_a_call_is_dropped_unless_overlap_is_allowed() -> None:
    later = NOON + timedelta(minutes=1)
    dropped = look(Cron("* * * * *"), Memory(NOON), later, busy=True)
    assert dropped.fire is None and dropped.dropped is not None
    assert look(Cron("* * * * *"), dropped.memory, later, busy=False).fire is None
    assert look(Cron("* * * * *", overlap="allow"), Memory(NOON), later, busy=True).fire is not None


def test_a_schedule_seen_first_makes_up_for_nothing_and_a_clock_set_back_fires_nothing() -> None:
    assert look(Cron("* * * * *"), None, NOON, busy=False).fire is None
    assert look(Cron("* * * * *"), Memory(NOON), NOON - timedelta(hours=2), busy=False).fire is None


@pytest.mark.parametrize("schedule", ["", "* * * *", "* * * * * *", "61 * * * *", "0 0 30 2 *", "nonsense", "@often"])
def test_a_schedule_that_cannot_be_is_refused(schedule: str) -> None:
    with pytest.raises(SpecError):
        Cron(schedule)


def test_an_unknown_time_zone_or_policy_is_refused() -> None:
    with pytest.raises(SpecError, match="time zone"):
        Cron("@hourly", time_zone="Mars/Base")
    with pytest.raises(SpecError, match="overlap"):
        Cron("@hourly", overlap="maybe")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="JSON"):
        Cron("@hourly", body={"x": object()})
