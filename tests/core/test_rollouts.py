"""Changes of an endpoint's traffic as pure functions on its document."""

from __future__ import annotations

import pytest

from mlfuncs.errors import Conflict, NotFound, SpecError
from mlfuncs.serving.deployment import shift_traffic
from mlfuncs.serving.rollouts import (
    check_traffic,
    complete_rollout,
    fail_rollout,
    outcome_of,
    rollback_traffic,
    serving_revision,
    start_rollout,
)

EMPTY = {"traffic": {}, "tags": {}, "mirror": {}, "previous": {}}


def after(*steps: dict[str, int]) -> dict:
    desired = EMPTY
    for number, traffic in enumerate(steps):
        desired = complete_rollout(start_rollout(desired, str(number), traffic), str(number))
    return desired


def test_traffic_moves_only_when_the_rollout_is_complete():
    started = start_rollout(after({"rev-1": 100}), "x", {"rev-2": 100})
    assert started["traffic"] == {"rev-1": 100}
    assert outcome_of(started, "x").state == "pending"
    done = complete_rollout(started, "x")
    assert done["traffic"] == {"rev-2": 100}
    assert outcome_of(done, "x").state == "complete"


def test_a_failed_rollout_leaves_the_traffic_and_says_why():
    failed = fail_rollout(start_rollout(after({"rev-1": 100}), "x", {"rev-2": 100}), "x", "no memory")
    assert failed["traffic"] == {"rev-1": 100}
    assert outcome_of(failed, "x").message == "no memory"


def test_a_rollout_that_was_replaced_changes_nothing_any_more():
    started = start_rollout(start_rollout(after({"rev-1": 100}), "x", {"rev-2": 100}), "y", {"rev-3": 100})
    assert complete_rollout(started, "x") == started
    assert fail_rollout(started, "x", "late") == started
    assert outcome_of(started, "x").state == "replaced"


def test_rollback_is_one_step_from_anywhere_in_a_canary():
    canary = after({"rev-1": 100}, {"rev-1": 90, "rev-2": 10}, {"rev-1": 50, "rev-2": 50})
    assert rollback_traffic(canary, "churn") == {"rev-1": 100}
    promoted = after({"rev-1": 100}, {"rev-1": 90, "rev-2": 10}, {"rev-2": 100})
    assert rollback_traffic(promoted, "churn") == {"rev-1": 100}


def test_rollback_twice_returns():
    back = after({"rev-1": 100}, {"rev-2": 100}, {"rev-1": 100})
    assert rollback_traffic(back, "churn") == {"rev-2": 100}


def test_nothing_to_roll_back_to_is_said():
    with pytest.raises(Conflict, match="no earlier traffic"):
        rollback_traffic(after({"rev-1": 100}), "churn")


def test_wrong_traffic_is_refused():
    with pytest.raises(NotFound, match="rev-9"):
        check_traffic({"rev-9": 1}, ["rev-1"], "churn")
    for share in (-1, True, 0.5, "50"):
        with pytest.raises(SpecError, match="whole number"):
            check_traffic({"rev-1": share}, ["rev-1"], "churn")  # type: ignore[dict-item]
    with pytest.raises(SpecError, match="at least one"):
        check_traffic({"rev-1": 0}, ["rev-1"], "churn")


@pytest.mark.parametrize("percent", [0, 1, 10, 33, 99, 100])
def test_a_canary_takes_its_percentage_and_the_rest_keeps_its_proportions(percent):
    shares = shift_traffic({"rev-1": 2, "rev-2": 1}, "rev-3", percent)
    assert sum(shares.values()) == 100
    assert shares["rev-3"] == percent
    if percent < 90:
        assert abs(shares["rev-1"] - 2 * shares["rev-2"]) <= 2


def test_the_serving_revision_is_the_one_with_most_traffic():
    assert serving_revision({"rev-1": 90, "rev-2": 10}) == "rev-1"
    assert serving_revision({}, "rev-7") == "rev-7"
