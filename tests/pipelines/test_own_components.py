"""Decorated functions as steps: every type of the border, mixed with kfp's own components."""

# ruff: noqa: UP014 - components are written as kfp users write them

import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from kfp import dsl

import mlfuncs as ml
from mlfuncs.errors import InvalidInput, RunFailed, SpecError
from mlfuncs.settings import Settings
from mlfuncs_pipelines.components import is_tracing

sys.path.append(str(Path(__file__).parent))
import own_steps as steps


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One home for the module, so that warm workers are shared; caches do not leak between different steps."""
    base = tmp_path_factory.getbasetemp() / "own-components-home"
    monkeypatch.setenv("MLFUNCS_HOME", str(base))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")
    monkeypatch.setenv("PIPE_SECRET", "correct-horse-battery")
    yield base


@dsl.component(base_image="python:3.11")
def kfp_rows(data: dsl.Input[dsl.Dataset]) -> int:
    return int(data.metadata["rows"])


@dsl.component(base_image="python:3.11")
def kfp_csv(out: dsl.Output[dsl.Dataset]):
    with open(out.path, "w") as file:
        file.write("a,b\n1,2\n3,4\n")


def test_tables_models_and_metrics_travel_between_steps() -> None:
    @ml.pipeline
    def churn(n: int = 100):
        data = steps.load(n)
        parts = steps.split(data.output, fraction=0.7)
        with dsl.ParallelFor([{"c": 0.1, "names": []}, {"c": 1.0, "names": ["a"]}]) as config:
            model = steps.train(parts.outputs["train"], config)
            score = steps.area(steps.evaluate(model.output, parts.outputs["test"]).output)
        return steps.best(dsl.Collected(score.output))

    done = churn.run(n=120)
    assert done.output in (0, 1)
    assert done.value("split", "rows") == 120
    assert isinstance(done.value("load"), pd.DataFrame) and len(done.value("load")) == 120
    metrics = done.step("for-loop-2/0/evaluate").outputs.artifacts["Output"][0]
    assert metrics["type"]["schemaTitle"] == "system.ClassificationMetrics"
    assert {"confidenceMetrics", "confusionMatrix"} <= set(metrics["metadata"])
    model = done.step("for-loop-2/0/train").outputs.artifacts["Output"][0]
    assert model["type"]["schemaTitle"] == "system.Model" and "sklearn" in model["metadata"]["framework"]


def test_choices_dates_records_and_unions_are_parameters() -> None:
    @ml.pipeline
    def described(day: datetime.date = datetime.date(2024, 5, 1)):
        first = steps.describe(steps.Color.BLUE, day, {"c": 2.0}, mode="slow", either="x", tags={"k": 1})
        steps.describe(steps.Color.RED, datetime.date(2020, 1, 2), steps.configure(c=3).output)
        return first.output

    done = described.run(day=datetime.date(2024, 6, 7))
    assert done.output == "BLUE|2024-06-07|2.0[]|slow|'x'|None|{'k': 1}"
    assert done.value("describe-2") == "RED|2020-01-02|3.0['x']|fast|3|None|None"


def test_datetime_survives_as_text_between_steps() -> None:
    @ml.pipeline
    def days() -> datetime.datetime:
        return steps.tomorrow(steps.tomorrow(datetime.datetime(2024, 2, 28, 12, 30)).output).output

    assert days.run().output == "2024-03-01T12:30:00"


def test_unannotated_values_of_any_kind_pass() -> None:
    @ml.pipeline
    def loose():
        steps.anything([1, {"a": 2.5}])
        steps.anything(steps.add(1).output)
        steps.anything(steps.load(3).output)
        steps.untyped(steps.untyped("text").output)

    done = loose.run()
    assert done.value("anything") == {"got": [1, {"a": 2.5}], "kind": "list"}
    assert done.value("anything-2") == {"got": 3, "kind": "int"}
    assert done.value("anything-3")["kind"] == "DataFrame"
    assert done.value("untyped-2") == "text"


def test_files_keep_their_names_and_constants_are_imported(tmp_path: Path) -> None:
    (tmp_path / "given.csv").write_text("a,b\n5,6\n")

    @ml.pipeline
    def files(path: str):
        steps.read_file(steps.write_file("hello").output)
        steps.rows(str(tmp_path / "given.csv"))
        steps.rows(path)

    done = files.run(path=str(tmp_path / "given.csv"))
    assert done.value("read-file") == "made.csv:hello"
    assert done.value("rows") == done.value("rows-2") == 1


def test_pages_metrics_and_arrays_have_their_system_types() -> None:
    @ml.pipeline
    def shown():
        steps.report(0.5), steps.notes(0.5), steps.measure(0.25), steps.array(4)

    done = shown.run()
    titles = {step: done.step(step).outputs.artifacts["Output"][0]["type"]["schemaTitle"] for step in done.steps}
    assert titles == {
        "report": "system.HTML",
        "notes": "system.Markdown",
        "measure": "system.Metrics",
        "array": "system.Dataset",
    }
    report = done.step("report").outputs.artifacts["Output"][0]
    assert Path(report["uri"]).read_text() == "<b>0.50</b>"
    measured = done.step("measure").outputs.artifacts["Output"][0]["metadata"]
    assert measured["score"] == 0.25 and measured["n"] == 3
    assert done.value("array").tolist() == [0, 1, 2, 3]


def test_mixed_with_components_of_kfp() -> None:
    @ml.pipeline
    def mixed() -> NamedTuple("Out", [("ours", int), ("theirs", int)]):
        out = NamedTuple("Out", [("ours", int), ("theirs", int)])
        theirs = kfp_rows(data=steps.load(7).output)
        return out(steps.rows(kfp_csv().outputs["out"]).output, theirs.output)

    assert mixed.run().outputs == {"ours": 2, "theirs": 7}


def test_inside_a_plain_kfp_pipeline(compiled: Callable[[Any], Path]) -> None:
    @dsl.pipeline(name="plain")
    def plain(n: int = 3) -> int:
        with dsl.ParallelFor([1, 2]) as size:
            data = steps.load(size)
        return steps.add(steps.count(dsl.Collected(data.output)).output, n).output

    from mlfuncs.settings import read_settings
    from mlfuncs_pipelines.runner import run_pipeline
    from mlfuncs_pipelines.validate import load_pipeline

    assert run_pipeline(load_pipeline(compiled(plain)), {}, read_settings()).outputs == {"Output": 6}


def test_pipeline_nests_in_a_pipeline() -> None:
    @ml.pipeline
    def inner(a: int, b: int = 10):
        return steps.add(a, b)

    @ml.pipeline
    def outer(n: int = 1):
        return steps.add(inner(n).output, inner(a=n, b=5).output)

    assert outer.run(n=2).output == 19


def test_secrets_env_and_resources_reach_the_step() -> None:
    @ml.pipeline
    def secret():
        return steps.guarded(1)

    done = secret.run()
    assert done.output == "21green1"
    assert "the secret is ***" in done.logs("guarded")
    ir = secret.ir
    assert ir.executors["exec-guarded"]["container"]["resources"]["resourceMemoryLimit"] == "1Gi"
    assert ir.root.dag is not None and ir.root.dag.tasks["guarded"].retry.count == 1
    assert ir.executor_platform("exec-guarded")["secretAsEnv"][0]["keyToEnv"][0]["envVar"] == "PIPE_SECRET"


def test_missing_secret_is_said_before_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIPE_SECRET")

    @ml.pipeline
    def secret(path: str):
        steps.guarded(1)
        steps.touch(path)

    with pytest.raises(SpecError, match="PIPE_SECRET"):
        secret.run(path=str(tmp_path / "log"))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda: steps.add("x"), ["a"]),
        (lambda: steps.add(steps.load(3).output), ["'a'", "int", "system.Dataset"]),
        (lambda: steps.rows(steps.add(1).output), ["'data'", "DataFrame", "NUMBER_INTEGER"]),
        (lambda: steps.add(steps.half(1.0).output), ["'a'", "int", "NUMBER_DOUBLE"]),
        (lambda: steps.add(), ["needs a value for a"]),
        (lambda: steps.add(1, c=2), ["'c'", "is not a parameter", "a, b"]),
        (lambda: steps.add(steps.half(1.0)), ["'a'", ".output"]),
        (lambda: steps.rows(5), ["'data'", "DataFrame", "int"]),
    ],
)
def test_type_errors_name_the_argument_and_both_types(body: Callable[[], Any], words: list[str]) -> None:
    @ml.pipeline
    def wrong():
        body()

    with pytest.raises(InvalidInput) as caught:
        wrong.compile("/dev/null")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_ints_flow_into_floats() -> None:
    @ml.pipeline
    def halves():
        return steps.half(steps.add(1).output)

    assert halves.run().output == 1.5


def test_plain_call_stays_plain_while_kfp_is_imported() -> None:
    assert not is_tracing() and steps.add(1) == 3


def test_calling_a_pipeline_outside_of_one_says_what_to_do() -> None:
    @ml.pipeline
    def lonely():
        steps.add(1)

    with pytest.raises(SpecError, match="run"):
        lonely()


def test_failed_step_shows_traceback_inputs_and_how_to_go_on(tmp_path: Path) -> None:
    @ml.pipeline
    def broken(path: str):
        steps.needs_file(path)

    with pytest.raises(RunFailed) as caught:
        broken.run(path=str(tmp_path / "gone"))
    text = str(caught.value)
    assert "return Path(path).read_text() + value" in text  # the user's line
    assert "mlfuncs pipeline debug" in text and "gone" in text
    assert "zygote.py" not in text


def test_component_alone_compiles(tmp_path: Path) -> None:
    from kfp import compiler

    compiler.Compiler().compile(steps.describe.component, str(tmp_path / "component.yaml"))
    from mlfuncs_pipelines.validate import check_file

    pipeline, problems = check_file(tmp_path / "component.yaml")
    assert problems == [] and pipeline is not None
    assert pipeline.components["comp-describe"].input_parameters["mode"].default == "fast"


def test_compiled_file_is_the_same_each_time_and_loads_in_kfp(tmp_path: Path) -> None:
    @ml.pipeline
    def steady(n: int = 3):
        data = steps.load(n)
        steps.split(data.output)

    first, second = steady.compile(tmp_path / "a.yaml"), steady.compile(tmp_path / "b.yaml")
    assert first.read_bytes() == second.read_bytes()
    from kfp import components

    assert components.load_component_from_file(str(first)).name == "steady"


def test_compiled_file_runs_where_the_bundles_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @ml.pipeline
    def moved(n: int = 3):
        return steps.add(n)

    path = moved.compile(tmp_path / "moved.yaml")
    from mlfuncs.settings import read_settings
    from mlfuncs.signing import project_key
    from mlfuncs_pipelines.runner import run_pipeline
    from mlfuncs_pipelines.validate import load_pipeline

    key = project_key(read_settings()).public
    elsewhere = {"MLFUNCS_HOME": str(tmp_path / "other"), "MLFUNCS_PROJECT": "tests", "MLFUNCS_TRUSTED_KEYS": key}
    settings = read_settings(elsewhere, tmp_path)
    assert run_pipeline(load_pipeline(path), {"n": 4}, settings).outputs == {"Output": 6}
    stranger = read_settings(
        {**elsewhere, "MLFUNCS_HOME": str(tmp_path / "third"), "MLFUNCS_TRUSTED_KEYS": ""}, tmp_path
    )
    with pytest.raises(SpecError, match="not trusted"):
        run_pipeline(load_pipeline(path), {"n": 4}, stranger)


def test_ir_is_golden(tmp_path: Path) -> None:
    @ml.pipeline(name="golden", description="Every kind of port.")
    def golden(n: int = 3, color: steps.Color = steps.Color.RED):
        data = steps.load(n)
        parts = steps.split(data.output)
        model = steps.train(parts.outputs["train"], {"c": 0.5})
        steps.evaluate(model.output, parts.outputs["test"])
        steps.describe(color, datetime.date(2024, 1, 1), {"c": 1.0})
        return steps.guarded(n)

    text = golden.compile(tmp_path / "golden.yaml").read_text()
    expected = Path(__file__).parent / "golden" / "ports.json"
    found = json.dumps(_without_digests(text), indent=1, sort_keys=True) + "\n"
    if os.environ.get("WRITE_GOLDEN"):  # after a change that is meant: look at the diff, then commit it
        expected.write_text(found)
    assert found == expected.read_text()


def _without_digests(text: str) -> Any:
    """The documents with what depends on the machine (digests, keys, versions) put aside."""
    import yaml

    documents = list(yaml.safe_load_all(text))
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        container = executor["container"]
        for option in ("--bundle", "--inline"):
            container["args"][container["args"].index(option) + 1] = option.strip("-").upper()
        container["image"] = "IMAGE"
        for variable in container["env"]:
            if variable["name"] == "MLFUNCS_TRUSTED_KEYS":
                variable["value"] = "KEYS"
    documents[0]["sdkVersion"] = "SDK"
    return documents


def test_a_time_limit_that_was_set_reaches_the_pod() -> None:
    @ml.function(timeout_s=90.5)
    def limited(x: int) -> int:
        return x

    @ml.function
    def free(x: int) -> int:
        return x

    @ml.pipeline
    def limits():
        free(limited(1).output)

    ir = limits.ir
    assert ir.executor_platform("exec-limited")["activeDeadlineSeconds"] in (91, "91")
    assert "activeDeadlineSeconds" not in ir.executor_platform("exec-free")


def test_steps_start_from_the_image_that_functions_start_from(settings: Settings) -> None:
    from mlfuncs_pipelines.function_component import base_image

    name = f"mlfuncs/base:{ml.__version__}"
    pushed = dataclasses.replace(settings, image_registry="r.example/team/")
    assert base_image(settings) == settings.resolved_base_image == name
    assert base_image(pushed) == f"r.example/team/{name}"
    assert base_image(dataclasses.replace(pushed, base_image="own/base:1")) == "own/base:1"


def test_items_of_a_list_parameter_reach_steps_as_what_they_are() -> None:
    @ml.function
    def twice(n: int) -> int:
        return 2 * n

    @ml.pipeline
    def each(numbers: list[int]):
        with dsl.ParallelFor(numbers) as number:
            twice(number)

    run = each.run(numbers=[1, 21])
    assert [run.value(f"for-loop-1/{index}/twice") for index in (0, 1)] == [2, 42]
