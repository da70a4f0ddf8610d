"""Windows against averages measured on Knative v1.23's own buckets, and against a slow, obvious version.

golden/knative_windows.json: random records and averages, late values and silences included, on
knative.dev/serving v0.50.0; an operation is ["record", now, value] or ["average", now, expected or null].
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs_runtime.autoscaler import AutoscalerConfig
from mlfuncs_runtime.windows import LinearWindow, LoadWindows, WeightedWindow

GOLDEN = json.loads((Path(__file__).parent / "golden" / "knative_windows.json").read_text())


def test_averages_are_knatives() -> None:
    checked = 0
    for number, case in enumerate(GOLDEN):
        window = (LinearWindow if case["algorithm"] == "linear" else WeightedWindow)(case["window_s"])
        for kind, now, value in case["ops"]:
            if kind == "record":
                window.record(now, value)
                continue
            average = window.average(now)
            if value is None:
                assert average is None, (number, now)
            else:
                assert average == pytest.approx(value, abs=2e-6), (number, now)
                checked += 1
    assert checked > 700


def test_first_seconds_average_over_what_was_seen() -> None:
    window = LinearWindow(60)
    window.record(100.0, 10.0)
    assert window.average(100.9) == 10.0
    window.record(105.0, 20.0)
    assert window.average(105.0) == 5.0  # 30 over six seconds, the silent ones counted as zero


def test_values_in_one_second_add_up() -> None:
    window = LinearWindow(6)
    window.record(1.0, 1.5)
    window.record(1.9, 2.5)
    assert window.average(1.95) == 4.0


def test_silence_longer_than_the_window_is_no_data() -> None:
    window = LinearWindow(6)
    window.record(10.0, 3.0)
    assert window.average(16.0) == 0.0
    assert window.average(17.0) is None


def test_after_silence_the_window_starts_anew() -> None:
    window = LinearWindow(6)
    window.record(10.0, 600.0)
    window.record(30.0, 6.0)
    assert window.average(30.0) == 6.0


def test_weighted_average_follows_the_newest_values() -> None:
    rising, falling = WeightedWindow(10), WeightedWindow(10)
    for second in range(10):
        rising.record(second, float(second))
        falling.record(second, float(9 - second))
    assert (rising.average(9.0) or 0) > 4.5 > (falling.average(9.0) or 0)


def test_panic_window_forgets_before_the_stable_one() -> None:
    windows = LoadWindows(AutoscalerConfig(window_s=60))
    assert windows.averages(0.0) == (None, None)
    windows.record(0.0, 60.0)
    assert windows.averages(0.0) == (60.0, 60.0)
    stable, panic = windows.averages(20.0)
    assert (stable, panic) == (60.0, 0.0)
    assert windows.averages(61.5) == (None, None)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1000)), min_size=1, max_size=60), st.integers(1, 20))
def test_linear_average_equals_the_obvious_sum(steps: list[tuple[int, float]], size: int) -> None:
    window, now = LinearWindow(size), 0
    seen: dict[int, float] = {}
    for gap, value in steps:
        if gap >= size:
            seen = {}
        now += gap
        window.record(float(now), value)
        seen[now] = seen.get(now, 0.0) + value
        valid = min(now - min(seen) + 1, size)
        expected = sum(v for at, v in seen.items() if at > now - size) / valid
        assert window.average(now + 0.5) == pytest.approx(expected, abs=1e-5)
    assert math.isfinite(window.average(float(now)) or 0.0)


def test_a_second_that_is_not_over_counts_where_it_raises_an_average_and_is_not_recorded() -> None:
    windows = LoadWindows(AutoscalerConfig(window_s=60))
    assert windows.averages(0.2, coming=(1, 7.0)) == (7.0, 7.0)
    assert windows.averages(0.2) == (None, None)
    for second in range(1, 7):
        windows.record(float(second), 6.0)
    assert windows.averages(6.5, coming=(7, 0.5)) == (6.0, 6.0)  # so far it is less: it may still become more
    assert windows.averages(6.5, coming=(7, 30.0)) == (pytest.approx(66 / 7, abs=1e-5), 10.0)


@given(
    st.lists(st.floats(0, 100), max_size=70),
    st.floats(0, 100),
    st.floats(0, 100),
    st.sampled_from(["linear", "weighted-exponential"]),
)
def test_what_a_second_has_come_to_gives_no_more_than_its_end_or_what_was_known(
    before: list[float], so_far: float, rest: float, algorithm: Literal["linear", "weighted-exponential"]
) -> None:
    windows = LoadWindows(AutoscalerConfig(window_s=20, metric_aggregation_algorithm=algorithm))
    for second, value in enumerate(before):
        windows.record(float(second), value)
    end = len(before)
    known = windows.averages(end - 0.5)
    early = windows.averages(end - 0.5, coming=(end, so_far))
    windows.record(float(end), so_far + rest)
    late = windows.averages(float(end))
    for one, other, last in zip(early, known, late, strict=True):
        assert (one or 0.0) <= max(other or 0.0, last or 0.0) + 1e-5
