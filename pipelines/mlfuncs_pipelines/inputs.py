"""What a task receives: its declared sources looked up in the enclosing DAG, converted to the declared types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import InvalidInput
from mlfuncs_pipelines import conditions
from mlfuncs_pipelines.ir import ABSENT, Component, Iterator, Pipeline, Task, constant_of
from mlfuncs_pipelines.placeholders import Context, resolve_value
from mlfuncs_pipelines.values import check_literal, coerce, from_file

Artifacts = Mapping[str, list[dict[str, Any]]]  # runtime artifacts (kfp's JSON) by name


@dataclass(frozen=True)
class Values:
    """Parameters and artifacts: what goes into a task, or what came out of one."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Artifacts = field(default_factory=dict)


@dataclass(frozen=True)
class Surroundings:
    """What the tasks of one DAG can refer to: the DAG's own inputs, finished tasks' outputs and their states."""

    inputs: Values
    outputs: Mapping[str, Values]
    final_status: Mapping[str, Mapping[str, Any]]  # task -> kfp's PipelineTaskFinalStatus as JSON
    constants: Mapping[str, str]


def resolve_inputs(task: Task, component: Component, around: Surroundings) -> Values:
    """The values of `task`'s inputs, defaults included. Raises InvalidInput for what is missing or of a wrong type."""
    parameters: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name, source in task.parameters.items():
        value = _parameter(source, around)
        if value is ABSENT:
            continue
        if "runtimeValue" in source:
            constants[name] = value
        else:
            if source.get("parameterExpressionSelector"):
                value = conditions.select(source["parameterExpressionSelector"], value)
            parameters[name] = value
    context = Context({"inputs": {"parameterValues": parameters}}, around.constants)
    parameters |= {name: resolve_value(value, context) for name, value in constants.items()}
    return complete(Values(parameters, _artifacts(task, around)), component, f"task {task.name}", task.iterator)


def complete(given: Values, component: Component, what: str, iterator: Iterator | None = None) -> Values:
    """`given` with defaults filled in and types converted. Raises InvalidInput that names every missing input."""
    later = iterator.item_input if iterator else None  # the loop gives this one
    parameters = dict(given.parameters)
    missing = []
    for name, declared in component.input_parameters.items():
        if name in parameters:
            if name != later:
                parameters[name] = coerce(parameters[name], declared.type, f"{what}: input {name}")
                check_literal(parameters[name], declared, f"{what}: input {name}")
        elif declared.default is not ABSENT:
            parameters[name] = coerce(from_file(declared.default), declared.type, f"{what}: default of {name}")
        elif not declared.optional and name != later:
            missing.append(name)
    for name, artifact in component.input_artifacts.items():
        if not artifact.optional and name not in given.artifacts and name != later:
            missing.append(name)
    if missing:
        message = f"{what} has no value for {', '.join(missing)}: the upstream task gave none, and there is no default"
        raise InvalidInput(message, [{"field": name, "message": "missing"} for name in missing])
    return Values(parameters, given.artifacts)


def complete_run(params: Mapping[str, Any], pipeline: Pipeline) -> Values:
    """The parameters of a run with defaults filled in. Raises InvalidInput, also for null where a value is needed."""
    what = f"pipeline {pipeline.name}"
    for name, declared in pipeline.root.input_parameters.items():
        if name in params and params[name] is None and not (declared.optional and declared.default is ABSENT):
            mend = "leave it out for its default" if declared.default is not ABSENT else "give a value"
            raise InvalidInput(f"{what}: input {name} cannot be null; {mend}", [{"field": name, "message": "null"}])
    return complete(Values(dict(params)), pipeline.root, what)


def loop_items(iterator: Iterator, given: Values, what: str) -> list[Any]:
    """The items that a loop goes over: parameter values, or artifacts each as a one-element list."""
    if iterator.kind == "artifact":
        return [[artifact] for artifact in given.artifacts.get(iterator.source_input, [])]
    if iterator.raw is not None:
        return list(json.loads(iterator.raw))
    items = given.parameters.get(iterator.source_input, ABSENT)
    items = coerce(items, "LIST", f"{what}: the items of the loop") if items is not ABSENT else None
    if items is None:
        raise InvalidInput(f"{what}: the loop has no items: {iterator.source_input} has no value")
    return list(items)


def with_item(given: Values, component: Component, iterator: Iterator, item: Any) -> Values:
    """`given` with one loop item bound to the input that the loop fills."""
    if iterator.kind == "artifact":
        return Values(given.parameters, {**given.artifacts, iterator.item_input: item})
    declared = component.input_parameters.get(iterator.item_input)
    kind = declared.type if declared else ""
    try:
        item = coerce(item, kind, f"loop item {iterator.item_input}")
    except InvalidInput:
        if kind in ("LIST", "STRUCT"):  # kfp types an item by the first one of a list; others may differ
            raise
    return Values({**given.parameters, iterator.item_input: item}, given.artifacts)


def _parameter(source: Mapping[str, Any], around: Surroundings) -> Any:
    if "componentInputParameter" in source:
        return around.inputs.parameters.get(source["componentInputParameter"], ABSENT)
    if "taskOutputParameter" in source:
        reference = source["taskOutputParameter"]
        produced = around.outputs.get(reference["producerTask"], Values()).parameters
        return produced.get(reference["outputParameterKey"], ABSENT)
    if "taskFinalStatus" in source:
        return dict(around.final_status[source["taskFinalStatus"]["producerTask"]])
    if "runtimeValue" in source:
        runtime = source["runtimeValue"]
        if "runtimeParameter" in runtime:
            return around.inputs.parameters.get(runtime["runtimeParameter"], ABSENT)
        constant = constant_of(runtime)
        return constant if constant is ABSENT else from_file(constant)
    return ABSENT


def _artifacts(task: Task, around: Surroundings) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, source in task.artifacts.items():
        if "componentInputArtifact" in source:
            value = around.inputs.artifacts.get(source["componentInputArtifact"])
        else:
            reference = source.get("taskOutputArtifact", {})
            produced = around.outputs.get(reference.get("producerTask", ""), Values()).artifacts
            value = produced.get(reference.get("outputArtifactKey", ""))
        if value is not None:
            found[name] = value
    return found
