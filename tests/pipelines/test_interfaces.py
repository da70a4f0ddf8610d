"""What a decorated function's signature and spec become in a pipeline: arguments, type errors, options of the pod."""

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from kfp import dsl

import mlfuncs as ml
from mlfuncs.errors import InvalidInput
from mlfuncs_pipelines import kubeflow_client

sys.path.append(str(Path(__file__).parent))
import own_steps as steps
from kubeflow_api import Api


@ml.function
def maybe(n: int | None) -> int:
    return -1 if n is None else n


@ml.function
def either(value: int | bool) -> str:
    return repr(value)


@ml.function
def quoted(n: "int", day: "datetime.date | None" = None) -> "str":
    return f"{n} {day}"


@ml.function
def mixed_up(a: int, b: int, *, c: int = 3) -> str:
    return f"{a}{b}{c}"


DAY = datetime.date(2024, 1, 2)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda: maybe("x"), ["n", "int"]),
        (lambda: maybe(steps.half(1.0).output), ["'n' of maybe", "int | None", "NUMBER_DOUBLE"]),
        (lambda: either(steps.load(3).output), ["'value' of either", "int | bool", "system.Dataset"]),
        (lambda: steps.describe("green", DAY, {}), ["color", "'red'", "'blue'"]),
        (lambda: steps.describe(steps.Color.RED, DAY, {}, mode="middling"), ["mode", "fast", "slow"]),
        (lambda: steps.describe(steps.Color.RED, "someday", {}), ["day", "date"]),
        (lambda: steps.describe(steps.Color.RED, DAY, {"c": "much"}), ["config", "c", "number"]),
        (lambda: steps.describe(steps.Color.RED, DAY, steps.half(1.0).output), ["'config'", "Config", "NUMBER_DOUBLE"]),
        (lambda: steps.tomorrow(steps.add(1).output), ["'day' of tomorrow", "datetime", "NUMBER_INTEGER"]),
        (lambda: quoted(steps.load(3).output), ["'n' of quoted", "int", "system.Dataset"]),
        (lambda: quoted(1, "someday"), ["day", "date"]),
        (lambda: mixed_up(1, 2, 3), ["takes 2 positional arguments, and 3 were given"]),
        (lambda: mixed_up(1, b=2, a=1), ["'a' twice"]),
    ],
)
def test_a_wrong_type_names_the_argument_and_both_types(body: Callable[[], Any], words: list[str]) -> None:
    @ml.pipeline
    def wrong():
        body()

    with pytest.raises(InvalidInput) as caught:
        wrong.compile("/dev/null")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_arguments_by_position_by_name_and_left_out() -> None:
    @ml.pipeline
    def arguments():
        mixed_up(1, 2)
        mixed_up(1, b=5, c=7)
        maybe(None)
        maybe(4)
        quoted(1, DAY)

    done = arguments.run()
    assert [done.value(name) for name in ("mixed-up", "mixed-up-2")] == ["123", "157"]
    assert [done.value(name) for name in ("maybe", "maybe-2", "quoted")] == [-1, 4, "1 2024-01-02"]


@dsl.container_component
def shout(text: str, out: dsl.OutputPath(str)):
    return dsl.ContainerSpec(image="alpine", command=["sh", "-c", 'printf "%s!" "$0" > "$1"', text, out])


@dsl.component(base_image="python:3.11")
def rows_of(data: dsl.Input[dsl.Dataset]) -> int:
    return len(open(data.path).read().splitlines()) - 1


@ml.function
def lengths(text: str, rows: int, data: pd.DataFrame) -> dict[str, int]:
    return {"text": len(text), "rows": rows, "read": len(data)}


def test_our_steps_stand_beside_every_kind_of_kfps(tmp_path: Path) -> None:
    (tmp_path / "given.csv").write_text("a,b\n1,2\n3,4\n")

    @ml.pipeline
    def inner(text: str):
        return shout(text=text).outputs["out"]

    @ml.pipeline
    def beside(text: str = "hey"):
        given = dsl.importer(artifact_uri=str(tmp_path / "given.csv"), artifact_class=dsl.Dataset)
        return lengths(inner(text).output, rows_of(data=given.output).output, given.output).output

    assert beside.run(containers="process").output == {"text": 4, "rows": 2, "read": 2}


def test_accelerators_and_variables_of_the_spec_are_in_the_pods() -> None:
    @ml.function(resources=ml.Resources(cpu=2, gpu=1, gpu_type="amd.com/gpu"), env={"MODE": "fast"})
    def heavy(x: int) -> int:
        return x

    @ml.pipeline
    def pods():
        heavy(1)

    container = pods.ir.executors["exec-heavy"]["container"]
    accelerator = container["resources"]["accelerator"]
    assert "amd.com/gpu" in accelerator.values() and "1" in {str(value) for value in accelerator.values()}
    assert container["resources"]["resourceCpuLimit"] == "2"
    assert {"name": "MODE", "value": "fast"} in container["env"]


def test_inside_a_cluster_the_token_is_the_pods(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @ml.pipeline
    def remote():
        steps.add(1)

    api.token = "of-the-pod"
    (tmp_path / "token").write_text("of-the-pod\n")
    monkeypatch.setattr(kubeflow_client, "_POD_TOKEN", tmp_path / "token")
    assert remote.submit(experiment="mine").id == "r-1"
    made = remote.schedule("0 5 * * *", experiment="nightly")
    assert made.url.endswith("/#/recurringrun/details/s-1")
    named = [body["display_name"] for method, path, body in api.requests if path.endswith("/experiments") and body]
    assert named == ["mine", "nightly"]
