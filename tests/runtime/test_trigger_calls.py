"""What a failed call of a trigger means, and what is in force for which endpoint."""

from __future__ import annotations

import fcntl
import sys
import threading
from pathlib import Path

import pytest

import mlfuncs as ml
from mlfuncs.errors import DeadlineExceeded, MissingExtra, Unavailable
from mlfuncs.serving.client import error_of
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.spec import FunctionSpec
from mlfuncs_runtime.supervisor.plan import EndpointPlan
from mlfuncs_runtime.triggers.calls import Fault, judge_failure
from mlfuncs_runtime.triggers.process import wait_for_lock
from mlfuncs_runtime.triggers.table import Entry, entries_of


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        *((status, "hold") for status in (429, 503, 401, 403, 404)),
        *((status, "refused") for status in (400, 413, 422)),
        *((status, "failed") for status in (409, 500, 502, 504)),
    ],
)
def test_the_status_says_whose_fault_it_is(status: int, fault: str) -> None:
    assert judge_failure(error_of("", "no", {"status": status})).fault == fault


def test_retry_after_is_honoured_up_to_a_minute() -> None:
    assert judge_failure(error_of("Overloaded", "no", {"status": 429, "retry_after_s": 7.0})).wait_s == 7.0
    assert judge_failure(error_of("Overloaded", "no", {"status": 429, "retry_after_s": 1e6})).wait_s == 60.0


def test_without_an_answer_only_what_was_never_a_request_costs_no_try() -> None:
    assert judge_failure(Unavailable("nobody listens", retry_after_s=0.0)).fault is Fault.HOLD
    assert judge_failure(Unavailable("the connection broke")).fault is Fault.FAILED
    assert judge_failure(DeadlineExceeded("no answer")).fault is Fault.FAILED


def test_the_triggers_of_the_revision_with_most_traffic_are_in_force() -> None:
    def config(*triggers: ml.Cron) -> RevisionConfig:
        return RevisionConfig(FunctionSpec("score", triggers=triggers))

    plan = EndpointPlan(
        project="p",
        name="score",
        generation=1,
        traffic={"rev-1": 90, "rev-2": 10},
        tags={},
        mirror={},
        previous={},
        rollout=None,
        revisions={"rev-1": config(ml.Cron("@daily")), "rev-2": config(ml.Cron("@hourly"))},
        digests={},
    )
    (entry,) = entries_of([plan])
    assert entry.trigger == ml.Cron("@daily") and Entry.from_dict(entry.to_dict()) == entry
    assert entry.key == Entry("p", "score", 1.0, ml.Cron("@daily")).key


def test_kafka_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlfuncs_runtime.triggers.kafka import KafkaSource

    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(MissingExtra, match=r"mlfuncs\[kafka\]"):
        KafkaSource(ml.KafkaTopic("clicks", servers="b:9092"), "b:9092", {})


def test_a_trigger_process_waits_for_the_one_before_it_and_can_be_told_to_stop_meanwhile(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        stop, found = threading.Event(), list[bool]()
        waiting = threading.Thread(target=lambda: found.append(wait_for_lock(second.fileno(), stop)))
        waiting.start()
        stop.set()
        waiting.join(60)
        assert found == [False]
        fcntl.flock(first, fcntl.LOCK_UN)
        assert wait_for_lock(second.fileno(), threading.Event())
