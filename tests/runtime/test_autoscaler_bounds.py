"""What follows the decider: bounds, the scale to start with, and the patience before zero, on a stepped clock.

golden/knative_bounds.json: walks of wishes and ready replicas fed to the scaler and the activity rules of
knative.dev/serving v0.50.0 (the module of v1.23) on a fake clock; a step is [now, wish or null, ready, seconds behind
the activator, replicas, activity, whether the initial scale was met].
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs_runtime.autoscaler import AutoscalerConfig, Replicas, ScaleState, apply_bounds, initial_scale_state

GOLDEN = json.loads((Path(__file__).parent / "golden" / "knative_bounds.json").read_text())
CONFIG = AutoscalerConfig(window_s=60, scale_to_zero_grace_period_s=30)
ACTIVE = ScaleState(replicas=2, activity="active", since_s=0.0, initialized=True)
INACTIVE = ScaleState(replicas=1, activity="inactive", since_s=0.0, initialized=True)


def step(config: AutoscalerConfig, desired: int | None, ready: int, state: ScaleState, now_s: float) -> ScaleState:
    return apply_bounds(config, desired, Replicas(ready), state, now_s)


def test_runs_the_replicas_that_knative_runs() -> None:
    assert len(GOLDEN) >= 100
    for number, case in enumerate(GOLDEN):
        config = AutoscalerConfig(**case["config"])
        state = initial_scale_state(config, 0.0)
        for now, desired, ready, proxied_s, *expected in case["steps"]:
            state = apply_bounds(config, desired, Replicas(ready, proxied_s), state, now)
            assert [state.replicas, state.activity, state.initialized] == expected, (number, now)


def test_golden_walks_cover_zero_and_every_change_of_activity() -> None:
    changes = set()
    for case in GOLDEN:
        for before, after in itertools.pairwise(case["steps"]):
            changes.add((before[5], after[5]))
            changes.add((before[4] > 0, after[4] > 0))
    words = ("activating", "active", "inactive")
    assert changes >= {*itertools.product(words, words), *itertools.product((True, False), (True, False))}
    for key in ("reachable", "enable_scale_to_zero", "allow_zero_initial_scale"):
        assert {case["config"][key] for case in GOLDEN} == {True, False}


@pytest.mark.parametrize(
    ("minimum", "maximum", "desired", "expected"),
    [(0, 0, 9, 9), (2, 0, 1, 2), (0, 3, 9, 3), (2, 5, 4, 4), (2, 2, 9, 2)],
)
def test_keeps_within_min_and_max(minimum: int, maximum: int, desired: int, expected: int) -> None:
    config = dataclasses.replace(CONFIG, min_scale=minimum, max_scale=maximum)
    assert step(config, desired, 2, ACTIVE, 100.0).replicas == expected


def test_min_scale_is_ignored_for_an_unreachable_revision() -> None:
    config = dataclasses.replace(CONFIG, min_scale=3, reachable=False)
    state = step(config, 0, 3, dataclasses.replace(ACTIVE, replicas=3), 100.0)
    assert state.activity == "inactive"
    assert step(config, 0, 3, state, 130.0).replicas == 0


def test_initial_scale_holds_until_it_was_met_once() -> None:
    config = dataclasses.replace(CONFIG, initial_scale=4)
    state = initial_scale_state(config, 0.0)
    assert (state.replicas, state.activity) == (4, "activating")
    state = step(config, 1, 3, state, 1.0)
    assert (state.replicas, state.initialized) == (4, False)
    state = step(config, 1, 4, state, 2.0)
    assert (state.replicas, state.activity, state.initialized) == (4, "active", True)
    assert step(config, 1, 4, state, 3.0).replicas == 1


def test_initial_scale_zero_needs_leave() -> None:
    assert initial_scale_state(dataclasses.replace(CONFIG, initial_scale=0), 0.0).replicas == 1
    config = dataclasses.replace(CONFIG, initial_scale=0, allow_zero_initial_scale=True)
    state = initial_scale_state(config, 0.0)
    assert state.replicas == 0
    state = step(config, None, 0, state, 1.0)
    assert (state.replicas, state.activity) == (0, "inactive")
    state = step(config, 2, 0, state, 2.0)
    assert (state.replicas, state.activity) == (2, "activating")


def test_goes_to_zero_after_the_idle_window_and_the_grace() -> None:
    state = dataclasses.replace(ACTIVE, since_s=0.0)
    state = step(CONFIG, 0, 2, state, 59.0)
    assert (state.replicas, state.activity) == (1, "active")
    state = step(CONFIG, 0, 1, state, 60.0)
    assert (state.replicas, state.activity) == (1, "inactive")
    state = step(CONFIG, 0, 1, state, 89.0)
    assert state.replicas == 1
    state = step(CONFIG, 0, 1, state, 90.0)
    assert state.replicas == 0
    state = step(CONFIG, 0, 0, state, 500.0)
    assert (state.replicas, state.activity) == (0, "inactive")


def test_a_request_during_the_grace_keeps_it_up() -> None:
    state = step(CONFIG, 1, 1, INACTIVE, 10.0)
    assert (state.replicas, state.activity, state.since_s) == (1, "active", 10.0)


def test_pod_retention_outlasts_the_grace() -> None:
    config = dataclasses.replace(CONFIG, scale_to_zero_pod_retention_period_s=100)
    assert step(config, 0, 1, INACTIVE, 99.0).replicas == 1
    assert step(config, 0, 1, INACTIVE, 100.0).replicas == 0
    unreachable = dataclasses.replace(config, reachable=False)
    assert step(unreachable, 0, 1, INACTIVE, 30.0).replicas == 0


def test_time_already_behind_the_queue_counts_as_grace() -> None:
    assert apply_bounds(CONFIG, 0, Replicas(1, proxied_s=30.0), INACTIVE, 1.0).replicas == 0
    retained = dataclasses.replace(CONFIG, scale_to_zero_pod_retention_period_s=20)
    assert apply_bounds(retained, 0, Replicas(1, proxied_s=30.0), INACTIVE, 1.0).replicas == 1


def test_never_zero_when_scale_to_zero_is_off() -> None:
    config = dataclasses.replace(CONFIG, enable_scale_to_zero=False)
    assert step(config, 0, 1, INACTIVE, 1000.0).replicas == 1


def test_without_a_decision_nothing_changes() -> None:
    assert step(CONFIG, None, 2, ACTIVE, 100.0) == ACTIVE
    assert step(CONFIG, None, 0, INACTIVE, 100.0) == INACTIVE
    state = initial_scale_state(CONFIG, 0.0)
    assert step(CONFIG, None, 0, state, 5.0) == state


def test_a_revision_that_never_activates_is_given_up_after_its_deadline() -> None:
    config = dataclasses.replace(CONFIG, progress_deadline_s=600)
    state = initial_scale_state(config, 0.0)
    assert step(config, 0, 0, state, 630.0).replicas == 1
    state = step(config, 0, 0, state, 630.5)
    assert (state.replicas, state.activity) == (0, "inactive")


@given(
    st.integers(0, 5),
    st.integers(0, 5),
    st.lists(st.tuples(st.none() | st.integers(0, 20), st.integers(0, 20), st.floats(0, 50)), max_size=30),
)
def test_bounds_hold_on_any_walk(low: int, extra: int, walk: list[tuple[int | None, int, float]]) -> None:
    config = dataclasses.replace(CONFIG, min_scale=low, max_scale=low + extra, initial_scale=1)
    state, now = initial_scale_state(config, 0.0), 0.0
    for desired, ready, gap in walk:
        now += gap
        state = step(config, desired, ready, state, now)
        assert low <= state.replicas
        assert low + extra == 0 or state.replicas <= max(1, low + extra)
