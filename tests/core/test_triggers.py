"""Triggers as declared: what is refused, and what they do to a spec."""

from __future__ import annotations

from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.errors import SpecError
from mlfuncs.serving.deployment import read_options
from mlfuncs.spec import FunctionSpec

EVERY = [
    ml.Cron("*/5 * * * *", body={"x": [1, None]}, time_zone="Europe/Berlin", overlap="allow", missed="skip"),
    ml.RedisStream("orders", group="score", max_tries=2, url="secret:ORDERS_URL"),
    ml.KafkaTopic("clicks", servers="broker:9092", options={"sasl.password": "secret:KAFKA_PASSWORD"}),
]


def score(x: int = 1) -> int:
    return x


def test_a_spec_with_triggers_comes_back_equal_and_one_without_has_no_key() -> None:
    spec = FunctionSpec("score", triggers=tuple(EVERY))
    assert FunctionSpec.from_dict(spec.to_dict()) == spec
    assert "triggers" not in FunctionSpec("score").to_dict()


def test_triggers_are_given_to_the_function_or_at_deploy() -> None:
    declared = ml.function(triggers=[EVERY[0]])(score)
    assert declared.spec.triggers == (EVERY[0],)
    assert read_options(declared, None, "process", {}).spec.triggers == (EVERY[0],)
    assert read_options(declared, None, "process", {"triggers": [EVERY[1]]}).spec.triggers == (EVERY[1],)
    assert read_options(declared, None, "knative", {"triggers": []}).spec.triggers == ()


def test_a_target_without_a_supervisor_refuses_triggers() -> None:
    with pytest.raises(SpecError, match="knative"):
        read_options(ml.function(triggers=EVERY)(score), None, "knative", {})


@pytest.mark.parametrize("triggers", ["@hourly", ["@hourly"], EVERY[0], [EVERY[0], EVERY[0]], [{"kind": "cron"}]])
def test_what_is_no_list_of_different_triggers_is_refused(triggers: Any) -> None:
    with pytest.raises(SpecError):
        FunctionSpec("score", triggers=triggers)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ml.RedisStream(""),
        lambda: ml.RedisStream("orders", max_tries=0),
        lambda: ml.RedisStream("orders", url="redis://:hunter2@host/0"),
        lambda: ml.RedisStream("orders", url="host"),
        lambda: ml.KafkaTopic("clicks", servers=""),
        lambda: ml.KafkaTopic("clicks", servers="b:9092", options={"sasl.password": "hunter2"}),
        lambda: ml.KafkaTopic("clicks", servers="b:9092", options={"ssl.key.pem": "-----BEGIN"}),
        lambda: ml.KafkaTopic("clicks", servers="b:9092", options={"enable.auto.commit": True}),
        lambda: ml.KafkaTopic("clicks", servers="b:9092", options={"group.id": "g"}),
        lambda: ml.KafkaTopic("clicks", servers="b:9092", options={"retries": None}),  # type: ignore[dict-item]
        lambda: ml.RedisStream("orders", url="http://host:6379"),
        lambda: ml.RedisStream("orders", url="redis://host:6379?password=hunter2"),
    ],
)
def test_a_stream_that_cannot_be_right_is_refused_without_showing_a_password(make: Any) -> None:
    with pytest.raises(SpecError) as refused:
        make()
    assert "hunter2" not in str(refused.value)
