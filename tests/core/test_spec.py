"""Specs: right once they exist; a wrong one says which value and how to write it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.errors import SpecError
from mlfuncs.spec import Batch, FunctionSpec, Pod, Resources, Scale, check_name, parse_memory, slugify


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [("0", 0), ("128", 128), ("1k", 1000), ("1.5Gi", 1610612736), ("2M", 2_000_000), (" 1Ti ", 2**40), ("0.5Ki", 512)],
)
def test_memory_is_read_as_kubernetes_reads_it(quantity: str, expected: int) -> None:
    assert parse_memory(quantity) == expected


@pytest.mark.parametrize("quantity", ["", "1 GB", "1GB", "-1Gi", "lots", "1e3", "Gi"])
def test_other_memory_is_refused_with_an_example(quantity: str) -> None:
    with pytest.raises(SpecError, match="write it like '512Mi'"):
        Resources(memory=quantity)


@pytest.mark.parametrize("name", ["a", "a-b", "model-2", "x" * 53, "0"])
def test_names_that_are_host_names_pass(name: str) -> None:
    assert check_name("endpoint", name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a_b", "x" * 54, "a.b", "a/b", "é", "a\n"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="endpoint name"):
        check_name("endpoint", name)


@given(st.text(max_size=80))
def test_any_text_becomes_a_name(text: str) -> None:
    assert check_name("function", slugify(text)) == slugify(text)
    assert slugify(slugify(text)) == slugify(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Resources(cpu=0), "cpu must be above 0 cores, not 0"),
        (lambda: Resources(gpu=-1), "gpu must be 0 or more"),
        (lambda: Scale(min=-1), "scale.min"),
        (lambda: Scale(max=0), "scale.max must be 1 or more"),
        (lambda: Scale(min=5, max=4), r"scale.min \(5\) is above scale.max \(4\)"),
        (lambda: Scale(concurrency=-1), "scale.concurrency"),
        (lambda: Scale(target=0), "scale.target must be above 0"),
        (lambda: Scale(metric="cpu"), "scale.metric is 'concurrency' or 'rps', not 'cpu'"),
        (lambda: Scale(window_s=0.5), "scale.window_s must be at least 1 s"),
        (lambda: Scale(scale_down_delay_s=-1), "scale.scale_down_delay_s"),
        (lambda: Scale(grace_s=-1), "scale.grace_s"),
        (lambda: Scale(buffer=-1), "scale.buffer"),
        (lambda: Scale(max=2, initial=3), "scale.initial must be between 0 and scale.max"),
        (lambda: Batch(max_size=0), "batch.max_size"),
        (lambda: Batch(max_wait_ms=-1), "batch.max_wait_ms"),
        (lambda: FunctionSpec("Bad Name"), "function name 'Bad Name'"),
        (lambda: FunctionSpec("f", timeout_s=0), "timeout_s must be above 0 seconds"),
        (lambda: FunctionSpec("f", retries=-1), "retries must be 0 or more"),
        (lambda: FunctionSpec("f", env={"A-B": "x"}), "env name 'A-B'"),
        (lambda: FunctionSpec("f", env={"A": 1}), "env 'A' must be text, not int: write '1'"),
        (lambda: FunctionSpec("f", env={1: "x"}), "env is a dict like .*, and 1 is no name"),
        (lambda: FunctionSpec("f", env="A=1"), "env is a dict like {'MODE': 'fast'}, not 'A=1'"),
        (lambda: FunctionSpec("f", labels={"a": 1}), "labels 'a' must be text, not int: write '1'"),
        (lambda: FunctionSpec("f", requirements=3), "requirements is a list of texts, not 3"),
        (lambda: FunctionSpec("f", features=[1]), r"features is a list of texts, not \[1\]"),
        (lambda: FunctionSpec("f", triggers=5), "triggers must be a list"),
        (lambda: FunctionSpec("f", batch=64), r"batch is an ml.Batch, like ml.Batch\(max_size=64\), not 64"),
        (lambda: FunctionSpec("f", scale=3), "scale is an ml.Scale"),
        (lambda: FunctionSpec("f", resources={"cpu": 1}), "resources is an ml.Resources"),
        (lambda: FunctionSpec("f", pod=None), "pod is an ml.Pod"),
        (lambda: FunctionSpec("f", secrets=("a b",)), "secret name 'a b' must look like DB_PASSWORD"),
        (lambda: FunctionSpec("f", secrets=("A",), env={"A": "x"}), "'A' is in both env and secrets"),
        (
            lambda: FunctionSpec("f", requirements=("numpy=1",)),
            "requirement 'numpy=1' is not PEP 508.*scikit-learn>=1.5",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_at_construction(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_timeout_is_a_finite_number(value: float) -> None:
    with pytest.raises(SpecError, match="timeout_s"):
        FunctionSpec("f", timeout_s=value)


FULL = FunctionSpec(
    "churn",
    requirements=("numpy>=1", "scikit-learn[tests]>=1.5; python_version>'3'"),
    resources=Resources(cpu=0.5, memory="1Gi", gpu=1),
    scale=Scale(min=1, max=8, concurrency=4, target=2.5, metric="rps"),
    batch=Batch(32, 5.0),
    timeout_s=3.5,
    retries=2,
    env={"A": "b"},
    secrets=("DB_PASSWORD",),
    features=("spend:amount",),
    labels={"team": "x"},
)


@pytest.mark.parametrize("spec", [FunctionSpec("f"), FULL, FunctionSpec("f", requirements=())])
def test_a_spec_survives_json(spec: FunctionSpec) -> None:
    assert FunctionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_unknown_keys_of_a_stored_spec_are_named() -> None:
    with pytest.raises(SpecError, match="unknown keys: replicas"):
        FunctionSpec.from_dict({"name": "f", "replicas": 2})


def test_memory_in_bytes_or_no_limit() -> None:
    assert Resources(memory="1Mi").memory_bytes == 1_048_576
    assert Resources().memory_bytes is None


def test_a_spec_does_not_change_when_its_mappings_do() -> None:
    env = {"A": "b"}
    secrets = ["B"]
    spec = FunctionSpec("f", env=env, secrets=secrets)
    env["A"] = "changed"
    secrets.append("C")
    assert spec.env == {"A": "b"}
    assert spec.secrets == ("B",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale(min="1"), "scale.min must be a whole number, not '1'"),
        (lambda: Scale(min=True), "scale.min must be a whole number, not True"),
        (lambda: Scale(window_s="6"), "scale.window_s must be a number"),
        (lambda: Resources(cpu="500m"), "number of cores like 0.5"),
        (lambda: Resources(memory=-1), "memory must be text"),
        (lambda: Resources(memory="1"), "less than a mebibyte"),
        (lambda: Resources(gpu=1.5), "gpu must be a whole number"),
        (lambda: Pod(tolerations="x"), "pod.tolerations is a list"),
        (lambda: FunctionSpec("f", timeout_s="5"), "timeout_s must be a number"),
        (lambda: FunctionSpec("f", secrets="KEY"), r"write secrets=\['KEY'\]"),
        (lambda: FunctionSpec("f", requirements="numpy"), r"write requirements=\['numpy'\]"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_what_is_wanted(make, message):
    with pytest.raises(SpecError, match=message):
        make()
