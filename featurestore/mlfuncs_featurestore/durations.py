"""Durations written as "1h" or "30d", kept as whole microseconds.

Owns: parsing and printing of window lengths and ttls.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from mlfuncs.errors import SpecError

_UNITS_US = {
    "us": 1,
    "ms": 1_000,
    "s": 10**6,
    "m": 60 * 10**6,
    "h": 3600 * 10**6,
    "d": 86400 * 10**6,
    "w": 7 * 86400 * 10**6,
}
_DURATION = re.compile(r"(\d+)\s*(us|ms|s|m|h|d|w)")


def parse_duration(duration: Any, what: str = "duration") -> int:
    """Microseconds in "90s", "1h", "7d" (us, ms, s, m, h, d, w) or a timedelta; above 0. Raises SpecError.

    >>> parse_duration("1h")
    3600000000
    """
    if isinstance(duration, datetime.timedelta):
        microseconds = duration // datetime.timedelta(microseconds=1)
    elif isinstance(duration, str) and (match := _DURATION.fullmatch(duration.strip().lower())):
        microseconds = int(match[1]) * _UNITS_US[match[2]]
    else:
        raise SpecError(f"{what} {duration!r} is not a duration: write it like '90s', '1h' or '7d'")
    if not 0 < microseconds < 2**62:
        raise SpecError(f"{what} {duration!r} must be above 0 and below 146,000 years")
    return microseconds


def format_duration(microseconds: int) -> str:
    """The shortest exact spelling in one unit.

    >>> format_duration(3600 * 10**6), format_duration(86400 * 10**6 * 7)
    ('1h', '7d')
    """
    for unit in ("d", "h", "m", "s", "ms"):
        if microseconds % _UNITS_US[unit] == 0:
            return f"{microseconds // _UNITS_US[unit]}{unit}"
    return f"{microseconds}us"
