"""Where a sync handler runs, judged by how long its calls take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlfuncs_runtime.worker.placement import QUICK_S, STALL_S, Placement


def feed(placement: Placement, seconds: float, times: int) -> bool:
    for _ in range(times):
        placement.observe(seconds)
    return placement.inline


def test_moves_inline_after_a_trial_of_quick_calls() -> None:
    placement = Placement(trial=64)
    assert not feed(placement, 1e-6, 63)
    assert feed(placement, 1e-6, 1)


def test_a_slow_handler_never_moves_inline() -> None:
    assert not feed(Placement(), 2 * QUICK_S, 10_000)


def test_one_preempted_call_does_not_put_a_quick_handler_out() -> None:
    placement = Placement()
    feed(placement, 1e-6, 500)
    assert feed(placement, 0.01, 1)


def test_one_stalled_call_puts_it_out_and_the_next_trial_is_longer() -> None:
    placement = Placement(trial=64)
    feed(placement, 1e-6, 100)
    assert not feed(placement, STALL_S, 1)
    assert not feed(placement, 1e-6, 255)
    assert feed(placement, 1e-6, 1)


def test_a_handler_that_has_become_slow_is_put_out() -> None:
    placement = Placement()
    feed(placement, 1e-6, 500)
    assert not feed(placement, 0.002, 64)


@given(st.lists(st.floats(0, 10), max_size=300))
def test_is_never_inline_right_after_a_stalled_call(durations: list[float]) -> None:
    placement = Placement(trial=4)
    for seconds in durations:
        inline = placement.observe(seconds)
        assert not (inline and seconds >= STALL_S)
