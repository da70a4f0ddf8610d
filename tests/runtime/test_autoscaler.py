"""The autoscaler against decisions measured on Knative v1.23's own decider, and the rules that must always hold.

golden/knative_autoscaler.json: random walks of load and ready replicas fed to knative.dev/serving v0.50.0 (the module
of v1.23); a step is [now, stable, panic, ready, desired, excess burst capacity, panicking, valid].
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.errors import SpecError
from mlfuncs.spec import Scale
from mlfuncs_runtime.autoscaler import (
    AutoscalerConfig,
    AutoscalerState,
    Decision,
    Observation,
    decide,
    initial_state,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "knative_autoscaler.json").read_text())
TARGET_10 = AutoscalerConfig(target=10, target_utilization_percentage=100)


def test_decides_what_knative_decides() -> None:
    assert len(GOLDEN) >= 100
    for number, case in enumerate(GOLDEN):
        config = AutoscalerConfig(**case["config"])
        state = initial_state(config, case["initial_ready"], 0.0)
        for step in case["steps"]:
            now, stable, panic, ready, *expected = step
            decision, state = decide(config, Observation(stable, panic, ready), state, now)
            assert list(dataclasses.astuple(decision)) == expected, (number, step)


def test_golden_cases_cover_panic_calm_delay_and_missing_data() -> None:
    steps = [step for case in GOLDEN for step in case["steps"]]
    assert {step[6] for step in steps} == {step[7] for step in steps} == {True, False}
    assert {case["config"]["reachable"] for case in GOLDEN} == {True, False}
    assert {case["config"]["metric"] for case in GOLDEN} == {"concurrency", "rps"}
    assert any(case["config"]["scale_down_delay_s"] for case in GOLDEN)


def test_resolves_targets_and_panic_window_as_knative() -> None:
    for case in GOLDEN:
        config = AutoscalerConfig(**case["config"])
        assert config.target_value == pytest.approx(case["target_value"], rel=1e-12)
        assert config.total_value == pytest.approx(case["total_value"], rel=1e-12)
        assert config.panic_window_s == case["panic_window_s"]


def test_defaults_are_knatives() -> None:
    config = AutoscalerConfig()
    assert (config.total_value, config.target_value) == (100.0, 70.0)
    assert AutoscalerConfig(metric="rps").target_value == pytest.approx(140.0)
    assert AutoscalerConfig(container_concurrency=8).total_value == 8.0
    assert (config.window_s, config.panic_window_s, config.target_burst_capacity) == (60, 6.0, 211)


def test_no_data_is_not_zero() -> None:
    state = AutoscalerState(panic_since_s=1.0, max_panic_pods=7)
    decision, after = decide(TARGET_10, Observation(None, None, ready=7), state, 100.0)
    assert not decision.valid
    assert after == state
    idle, _ = decide(TARGET_10, Observation(0.0, 0.0, ready=1), AutoscalerState(), 100.0)
    assert idle.valid
    assert idle.desired == 0


def test_scales_down_by_at_most_half_a_tick() -> None:
    decision, _ = decide(TARGET_10, Observation(0.0, 0.0, ready=10), AutoscalerState(), 0.0)
    assert decision.desired == 5


def test_unreachable_revision_may_go_to_zero_at_once() -> None:
    config = dataclasses.replace(TARGET_10, reachable=False)
    decision, _ = decide(config, Observation(0.0, 0.0, ready=10), AutoscalerState(), 0.0)
    assert decision.desired == 0


def test_panic_holds_its_peak_until_a_whole_window_below_the_threshold() -> None:
    decision, state = decide(TARGET_10, Observation(10.0, 80.0, ready=1), AutoscalerState(), 0.0)
    assert decision == Decision(8, math.floor(10 - 211 - 80), panicking=True, valid=True)
    quiet = Observation(5.0, 5.0, ready=8)
    decision, state = decide(TARGET_10, quiet, state, 60.0)
    assert (decision.desired, decision.panicking) == (8, True)
    decision, state = decide(TARGET_10, quiet, state, 60.5)
    assert (decision.desired, decision.panicking) == (4, False)


def test_waits_for_delay_before_scaling_down() -> None:
    config = dataclasses.replace(TARGET_10, scale_down_delay_s=10)
    state = AutoscalerState()
    wishes = []
    for second, load in [(0, 50.0), (2, 30.0), (4, 30.0), (6, 30.0), (8, 30.0), (10, 30.0)]:
        decision, state = decide(config, Observation(load, load, ready=4), state, float(second))
        wishes.append(decision.desired)
    assert wishes == [5, 5, 5, 5, 5, 3]


def test_starts_in_panic_with_more_than_one_replica() -> None:
    decision, _ = decide(TARGET_10, Observation(1.0, 1.0, ready=6), initial_state(TARGET_10, 6, 0.0), 2.0)
    assert (decision.desired, decision.panicking) == (6, True)


def test_burst_capacity_zero_and_unlimited() -> None:
    for tbc, expected in [(0, 0), (-1, -1), (5, math.floor(3 * 10 - 5 - 12.5))]:
        config = dataclasses.replace(TARGET_10, target_burst_capacity=tbc)
        decision, _ = decide(config, Observation(1.0, 12.5, ready=3), AutoscalerState(), 0.0)
        assert decision.excess_burst_capacity == expected


def test_backlog_does_not_stack_replicas_on_those_starting() -> None:
    """Ten replicas take 30 s to start while the backlog grows: knative/serving#13284, where they exploded."""
    state = initial_state(TARGET_10, 0, 0.0)
    decision, state = decide(TARGET_10, Observation(100.0, 100.0, ready=0), state, 0.0)
    assert decision.desired == 10
    for tick in range(1, 60):
        backlog = 100.0 + 50.0 * tick
        decision, state = decide(TARGET_10, Observation(backlog, backlog, ready=0, starting=10), state, tick / 2)
        assert decision.desired == 10
    decision, state = decide(TARGET_10, Observation(400.0, 400.0, ready=10), state, 30.0)
    assert decision.desired == 40


def test_some_ready_and_some_starting_still_wait() -> None:
    _, state = decide(TARGET_10, Observation(100.0, 100.0, ready=1), AutoscalerState(), 0.0)
    decision, _ = decide(TARGET_10, Observation(900.0, 900.0, ready=4, starting=6), state, 1.0)
    assert decision.desired == 10


def test_refuses_a_config_that_cannot_be_right() -> None:
    with pytest.raises(SpecError, match="metric"):
        AutoscalerConfig(metric="cpu")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="window_s"):
        AutoscalerConfig(window_s=0)


def test_takes_its_values_from_a_scale() -> None:
    scale = Scale(min=1, max=9, concurrency=4, target=3.0, window_s=10, scale_down_delay_s=5, grace_s=7, initial=2)
    config = AutoscalerConfig.of_scale(scale)
    assert (config.min_scale, config.max_scale, config.initial_scale) == (1, 9, 2)
    assert (config.total_value, config.window_s, config.scale_down_delay_s) == (3.0, 10, 5)
    assert config.scale_to_zero_grace_period_s == 7


loads = st.floats(0, 1e6, allow_nan=False)
configs = st.builds(
    AutoscalerConfig,
    metric=st.sampled_from(["concurrency", "rps"]),
    container_concurrency=st.integers(0, 1000),
    target=st.none() | st.floats(0.01, 1e4),
    target_utilization_percentage=st.floats(1, 100),
    window_s=st.integers(6, 600),
    panic_threshold_percentage=st.floats(110, 1000),
    max_scale_up_rate=st.floats(1.01, 1000),
    max_scale_down_rate=st.floats(1.01, 10),
    target_burst_capacity=st.sampled_from([-1, 0, 211]),
    activation_scale=st.integers(1, 5),
    scale_down_delay_s=st.sampled_from([0, 4, 30]),
    reachable=st.booleans(),
)
observations = st.builds(
    Observation, stable=loads, panic=loads, ready=st.integers(0, 1000), starting=st.integers(0, 100)
)


@given(configs, st.lists(observations, min_size=1, max_size=20))
def test_invariants_hold_on_any_walk(config: AutoscalerConfig, walk: list[Observation]) -> None:
    state = initial_state(config, walk[0].ready, 0.0)
    for tick, seen in enumerate(walk):
        before = state
        decision, state = decide(config, seen, state, tick * 2.0)
        ready = max(1, seen.ready)
        highest = max(math.ceil(config.max_scale_up_rate * ready), config.activation_scale)
        recent = max((wish for _, wish in before.delayed), default=0)
        assert decision.valid
        assert 0 <= decision.desired <= max(highest, before.max_panic_pods, recent)
        if decision.panicking:
            assert decision.desired >= before.max_panic_pods
            if seen.starting:
                under_way = seen.ready + seen.starting
                assert state.max_panic_pods <= max(before.max_panic_pods, under_way)
        elif config.reachable and not seen.starting:
            assert decision.desired >= math.floor(ready / config.max_scale_down_rate)


@given(configs, observations, st.integers(0, 50))
def test_starting_replicas_never_raise_the_wish(config: AutoscalerConfig, seen: Observation, peak: int) -> None:
    state = AutoscalerState(panic_since_s=0.0, max_panic_pods=peak)
    with_starting, _ = decide(config, seen, state, 1.0)
    without, _ = decide(config, dataclasses.replace(seen, starting=0), state, 1.0)
    assert with_starting.desired <= without.desired


@given(configs, observations, loads)
def test_more_load_never_means_fewer_replicas(config: AutoscalerConfig, seen: Observation, more: float) -> None:
    busier = dataclasses.replace(seen, stable=(seen.stable or 0) + more, panic=(seen.panic or 0) + more)
    first, _ = decide(config, seen, AutoscalerState(), 0.0)
    second, _ = decide(config, busier, AutoscalerState(), 0.0)
    if seen.starting == 0:
        assert second.desired >= first.desired
