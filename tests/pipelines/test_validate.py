"""The strict validator: what kfp's loader misses, all at once, each with its place and mend."""

# ruff: noqa: UP014, SIM115 - components are written as kfp users write them

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from kfp import compiler, dsl

from mlfuncs.errors import NotFound
from mlfuncs_pipelines.ir_shape import Problem
from mlfuncs_pipelines.validate import InvalidPipeline, check, check_file, load_pipeline

IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}"  # no step needs another Python


@dsl.component(base_image=IMAGE)
def add(a: int, b: int = 2) -> int:
    return a + b


@dsl.component(base_image=IMAGE)
def numbers() -> list[int]:
    return [1, 2]


@dsl.component(base_image=IMAGE)
def write(out: dsl.Output[dsl.Dataset], n: int = 1):
    open(out.path, "w").write(str(n))


@dsl.component(base_image=IMAGE)
def read(data: dsl.Input[dsl.Dataset]) -> str:
    return open(data.path).read()


@dsl.component(base_image=IMAGE)
def final(status: dsl.PipelineTaskFinalStatus, note: str = ""):
    print(status, note)


@dsl.container_component
def shell(text: str, out: dsl.OutputPath(str)):
    return dsl.ContainerSpec(image="alpine", command=["sh", "-c", "echo", text, out])


@dsl.pipeline(name="inner")
def inner(q: int) -> int:
    return add(a=q).output


@dsl.pipeline(name="zoo")
def zoo(n: int = 3, text: str = "t") -> NamedTuple("Out", [("sum", int), ("text", str)]):
    with dsl.ExitHandler(final(note=f"note {text}")):
        first = add(a=n)
        with dsl.If(first.output > 2):
            add(a=first.output)
    with dsl.ParallelFor(numbers().output, parallelism=2) as item:
        add(a=item)
    data = write()
    shell(text=text)
    out = NamedTuple("Out", [("sum", int), ("text", str)])
    return out(inner(q=n).output, read(data=data.outputs["out"]).output)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ir") / "zoo.yaml"
    compiler.Compiler().compile(zoo, str(path))
    return yaml.safe_load(path.read_text())


def problems_of(document: dict[str, Any]) -> list[Problem]:
    return check(yaml.safe_dump(document))[1]


def test_what_kfp_compiles_is_valid(document: dict[str, Any]) -> None:
    assert problems_of(document) == []


def test_json_and_snake_case_are_read_too(document: dict[str, Any]) -> None:
    import json
    import re

    text = json.dumps(document)
    assert check(text)[1] == []
    for name in ("componentRef", "pipelineInfo", "inputDefinitions", "taskInfo"):
        text = text.replace(f'"{name}"', '"' + re.sub(r"([A-Z])", lambda m: "_" + m[1].lower(), name) + '"')
    assert check(text)[1] == []


def _put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place = document
        for part in parents:
            place = place[part]
        place[last] = value

    return change


def _drop(path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place = document
        for part in parents:
            place = place[part]
        del place[last]

    return change


TASKS = "root/dag/tasks"
CASES = {
    "unknown top field": (_put("surprise", 1), "surprise", "unknown field"),
    "misspelt field": (_put(f"{TASKS}/write/componantRef", {}), "root.dag.tasks.write.componantRef", "componentRef"),
    "unknown deep field": (
        _put("deploymentSpec/executors/exec-write/container/ports", []),
        "container.ports",
        "unknown",
    ),
    "schema version": (_put("schemaVersion", "2.0.0"), "schemaVersion", "2.1.0"),
    "no schema version": (_drop("schemaVersion"), "schemaVersion", "2.1.0"),
    "no root": (_drop("root"), "root", "no root"),
    "no name": (_drop("pipelineInfo/name"), "pipelineInfo.name", "no name"),
    "bad name": (_put("pipelineInfo/name", "My Pipe"), "pipelineInfo.name", "My Pipe"),
    "no tasks": (_put(TASKS, {}), "root.dag.tasks", "no tasks"),
    "dangling executor": (
        _put("components/comp-write/executorLabel", "exec-gone"),
        "comp-write.executorLabel",
        "exec-gone",
    ),
    "executor removed": (_drop("deploymentSpec/executors/exec-read"), "comp-read.executorLabel", "exec-read"),
    "dangling component": (_put(f"{TASKS}/write/componentRef/name", "comp-x"), "tasks.write.componentRef", "comp-x"),
    "dangling dependency": (_put(f"{TASKS}/read/dependentTasks", ["writ"]), "read.dependentTasks", "'write'"),
    "dangling task output": (
        _put(f"{TASKS}/read/inputs/artifacts/data/taskOutputArtifact/producerTask", "gone"),
        "tasks.read",
        "gone",
    ),
    "dangling artifact": (
        _put(f"{TASKS}/read/inputs/artifacts/data/taskOutputArtifact/outputArtifactKey", "outt"),
        "read.inputs.artifacts.data",
        "outt",
    ),
    "artifact taken as parameter": (
        _put(
            f"{TASKS}/inner/inputs/parameters/q",
            {"taskOutputParameter": {"producerTask": "write", "outputParameterKey": "out"}},
        ),
        "tasks.inner.inputs.parameters.q",
        "artifact",
    ),
    "dangling component input": (
        _put(f"{TASKS}/inner/inputs/parameters/q/componentInputParameter", "m"),
        "inner.inputs.parameters.q",
        "'m'",
    ),
    "unknown input": (
        _put(f"{TASKS}/inner/inputs/parameters/z", {"runtimeValue": {"constant": 1.0}}),
        "inner.inputs.parameters.z",
        "'z'",
    ),
    "missing required input": (_drop(f"{TASKS}/inner/inputs"), "tasks.inner", "'q'"),
    "constant of a wrong type": (
        _put(f"{TASKS}/inner/inputs/parameters/q", {"runtimeValue": {"constant": "many"}}),
        "inner.inputs.parameters.q",
        "NUMBER_INTEGER",
    ),
    "type clash": (
        _put(
            f"{TASKS}/inner/inputs/parameters/q",
            {"taskOutputParameter": {"producerTask": "numbers", "outputParameterKey": "Output"}},
        ),
        "inner.inputs.parameters.q",
        "LIST",
    ),
    "text into an integer": (
        _put(f"{TASKS}/inner/inputs/parameters/q/componentInputParameter", "text"),
        "inner.inputs.parameters.q",
        "STRING",
    ),
    "artifact type clash": (
        _put("components/comp-read/inputDefinitions/artifacts/data/artifactType/schemaTitle", "system.Model"),
        "read.inputs.artifacts.data",
        "system.Dataset",
    ),
    "cycle": (_put(f"{TASKS}/write/dependentTasks", ["read"]), "root.dag.tasks", "read -> write"),
    "own dependency": (_put(f"{TASKS}/write/dependentTasks", ["write"]), "root.dag.tasks", "write -> write"),
    "component contains itself": (
        _put("components/comp-inner/dag/tasks/add/componentRef/name", "comp-inner"),
        "components.comp-inner",
        "contain",
    ),
    "dangling output": (
        _put("root/dag/outputs/parameters/sum/valueFromParameter/producerSubtask", "gone"),
        "root.dag.outputs.parameters.sum",
        "gone",
    ),
    "undeclared output": (_drop("root/outputDefinitions/parameters/sum"), "outputs.parameters.sum", "not declared"),
    "output from nowhere": (_drop("root/dag/outputs/parameters/sum"), "root.dag.outputs", "'sum'"),
    "bad default": (
        _put("root/inputDefinitions/parameters/n/defaultValue", "three"),
        "root.inputDefinitions.parameters.n",
        "three",
    ),
    "bad enum": (
        _put("root/inputDefinitions/parameters/n/parameterType", "INT64"),
        "parameters.n.parameterType",
        "INT64",
    ),
    "bad trigger": (
        _put(f"{TASKS}/write/triggerPolicy", {"strategy": "SOMETIMES"}),
        "triggerPolicy.strategy",
        "SOMETIMES",
    ),
    "condition that is no CEL": (
        _put(f"{TASKS}/write/triggerPolicy", {"condition": "x = = 1"}),
        "tasks.write.triggerPolicy.condition",
        "CEL",
    ),
    "condition on no input": (
        _put(f"{TASKS}/write/triggerPolicy", {"condition": "inputs.parameter_values['nope'] == 1"}),
        "tasks.write.triggerPolicy.condition",
        "'nope'",
    ),
    "loop over nothing": (
        _put(f"{TASKS}/for-loop-3/parameterIterator/items", {"inputParameter": "nope"}),
        "parameterIterator.items",
        "'nope'",
    ),
    "loop items are no list": (
        _put(f"{TASKS}/for-loop-3/parameterIterator/items", {"raw": '{"a": 1}'}),
        "parameterIterator.items.raw",
        "JSON list",
    ),
    "loop fills no input": (
        _put(f"{TASKS}/for-loop-3/parameterIterator/itemInput", "nope"),
        "parameterIterator.itemInput",
        "'nope'",
    ),
    "command names no input": (
        _put("deploymentSpec/executors/exec-shell/container/args", ["{{$.inputs.parameters['nope']}}"]),
        "executors.exec-shell",
        "'nope'",
    ),
    "placeholder names no input": (
        _put(
            f"{TASKS}/shell/inputs/parameters/text", {"runtimeValue": {"constant": "{{$.inputs.parameters['nope']}}"}}
        ),
        "shell.inputs.parameters.text",
        "'nope'",
    ),
    "no image": (_put("deploymentSpec/executors/exec-shell/container/image", ""), "exec-shell.container", "image"),
    "executor of two kinds": (
        _put("deploymentSpec/executors/exec-shell/importer", {"artifactUri": {"constant": "x"}}),
        "executors.exec-shell",
        "exclude",
    ),
    "bad duration": (
        _put(f"{TASKS}/write/retryPolicy", {"maxRetryCount": 1, "backoffDuration": "soon"}),
        "retryPolicy.backoffDuration",
        "soon",
    ),
    "negative retries": (_put(f"{TASKS}/write/retryPolicy", {"maxRetryCount": -1}), "retryPolicy.maxRetryCount", "-1"),
    "retries that are no number": (
        _put(f"{TASKS}/write/retryPolicy", {"maxRetryCount": "x"}),
        "retryPolicy.maxRetryCount",
        "whole number",
    ),
    "parallelism that is no number": (
        _put(f"{TASKS}/write/iteratorPolicy", {"parallelismLimit": 1.5}),
        "iteratorPolicy.parallelismLimit",
        "whole number",
    ),
    "name that is no text": (_put("pipelineInfo/name", 5), "pipelineInfo.name", "string"),
    "importer of nothing": (_put("deploymentSpec/executors/exec-shell", {"importer": {}}), "importer", "no URI"),
    "text where a list belongs": (_put(f"{TASKS}/read/dependentTasks", "write"), "read.dependentTasks", "list"),
    "final status of no task": (
        _put(f"{TASKS}/final/inputs/parameters/status/taskFinalStatus/producerTask", "gone"),
        "tasks.final",
        "gone",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_fault_is_found_with_its_place(document: dict[str, Any], case: str) -> None:
    change, place, word = CASES[case]
    broken = copy.deepcopy(document)
    change(broken)
    found = problems_of(broken)
    assert any(place in problem.place and word in str(problem) for problem in found), [str(p) for p in found]
    assert all(problem.mend for problem in found)


def test_what_the_compiler_writes_around_collected_values_is_valid(compiled: Callable[[Any], Path]) -> None:
    """kfp declares what passes through a condition on its way to dsl.Collected as a list."""

    @dsl.component(base_image=IMAGE)
    def total(xs: list[int]) -> int:
        return sum(xs)

    @dsl.pipeline(name="gathered")
    def gathered(limit: int = 1):
        with dsl.ParallelFor([1, 2, 3]) as item, dsl.If(item >= limit):
            each = add(a=item)
        with dsl.If(limit == 1):
            total(xs=dsl.Collected(each.output))

    assert check_file(compiled(gathered))[1] == []


def test_limits_known_only_at_run_time_and_a_nested_final_status_are_valid(document: dict[str, Any]) -> None:
    given = copy.deepcopy(document)  # as kfp 2.14 writes them: inputs of the task that its component does not have
    task = given["root"]["dag"]["tasks"]["write"]
    task.setdefault("inputs", {}).setdefault("parameters", {})["cpu_limit"] = {"runtimeValue": {"constant": "4"}}
    status = given["components"]["comp-final"]["inputDefinitions"]["parameters"]["status"]
    status["parameterType"] = "STRUCT"
    assert problems_of(given) == []


def test_all_problems_come_at_once(document: dict[str, Any]) -> None:
    broken = copy.deepcopy(document)
    names = ["schema version", "dangling executor", "dangling dependency", "constant of a wrong type", "no image"]
    for name in names:
        CASES[name][0](broken)
    found = problems_of(broken)
    for name in names:
        assert any(CASES[name][1] in problem.place for problem in found), name


def test_a_file_with_blocking_problems_is_not_run(document: dict[str, Any], tmp_path: Path) -> None:
    broken = copy.deepcopy(document)
    CASES["dangling executor"][0](broken)
    CASES["cycle"][0](broken)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(InvalidPipeline) as caught:
        load_pipeline(tmp_path / "x.yaml")
    assert len(caught.value.problems) == 2 and "exec-gone" in str(caught.value)


def test_an_unknown_field_is_reported_but_does_not_keep_the_pipeline_from_running(
    document: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**document, "surprise": 1}))
    assert load_pipeline(tmp_path / "x.yaml").name == "zoo"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: [1", "YAML"),
        ("", "0 pipeline documents"),
        ("[1, 2]", "not an object"),
        ("root: {dag: {}}\nroot: {}", "twice"),
        ("apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nspec: {}", "v1"),
        ("!!python/object/apply:os.system ['true']", "YAML"),
        ("root: 5\nschemaVersion: 2.1.0", "root"),
    ],
)
def test_text_that_is_no_pipeline_is_refused(text: str, word: str) -> None:
    pipeline, problems = check(text)
    assert pipeline is None and word in " ".join(map(str, problems))


def test_two_pipelines_in_one_file_are_refused(document: dict[str, Any]) -> None:
    text = yaml.safe_dump_all([document, document])
    assert "2 pipeline documents" in str(check(text)[1][0])


def test_platform_document_is_read_and_checked(document: dict[str, Any]) -> None:
    good = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"exec-read": {"nodeSelector": {}}}}}}}
    pipeline, problems = check(yaml.safe_dump_all([document, good]))
    assert problems == [] and pipeline is not None
    assert pipeline.executor_platform("exec-read") == {"nodeSelector": {}}
    bad = {"platforms": {"kubernetes": {"deployment": {}}}}
    assert "platforms.kubernetes.deployment" in check(yaml.safe_dump_all([document, bad]))[1][0].place


def test_file_over_32_mib_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with open(path, "wb") as file:
        file.truncate(32 * 2**20 + 1)
    assert "32 MiB" in str(check_file(path)[1][0])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nope\.yaml"):
        check_file(tmp_path / "nope.yaml")
