"""Do the references in a pipeline lead somewhere, and do the types on both ends fit? Part of `validate`."""

from __future__ import annotations

from collections.abc import Iterable

from mlfuncs.errors import InvalidInput
from mlfuncs_pipelines.cycles import find_cycle
from mlfuncs_pipelines.dag_check import DagCheck, dags_of
from mlfuncs_pipelines.ir import ABSENT, Component, Pipeline
from mlfuncs_pipelines.ir_shape import Problem, nearest
from mlfuncs_pipelines.placeholders import mentions
from mlfuncs_pipelines.values import coerce, from_file


def check_references(pipeline: Pipeline) -> list[Problem]:
    """Every dangling reference, type clash and cycle of `pipeline`."""
    problems: list[Problem] = []
    looped = {task.component for dag in dags_of(pipeline) for task in dag.tasks.values() if task.iterator}
    for place, component in _components(pipeline):
        _check_executor(pipeline, component, place, problems)
        if component.dag:
            DagCheck(pipeline, component, f"{place}.dag", problems, component.name in looped).run()
        _check_defaults(component, place, problems)
    _check_nesting(pipeline, problems)
    return problems


def _check_executor(pipeline: Pipeline, component: Component, place: str, problems: list[Problem]) -> None:
    if component.dag is not None:
        return
    if not component.executor:
        mend = "add a dag or an executorLabel"
        problems.append(Problem(place, "the component has neither a DAG nor an executor", mend))
        return
    executor = pipeline.executors.get(component.executor)
    if executor is None:
        mend = nearest(component.executor, pipeline.executors, "executors are")
        problems.append(Problem(f"{place}.executorLabel", f"there is no executor {component.executor!r}", mend))
        return
    where = f"deploymentSpec.executors.{component.executor}"
    if "container" in executor:
        container = executor["container"]
        if not container.get("image"):
            problems.append(Problem(f"{where}.container", "the container has no image", "add an image"))
        _check_command(component, where, [*container.get("command", []), *container.get("args", [])], problems)
    elif "importer" in executor:
        if not executor["importer"].get("artifactUri"):
            mend = "add artifactUri: a constant, or the runtimeParameter that gives it"
            problems.append(Problem(f"{where}.importer", "the importer has no URI to import", mend))
    else:
        kind = next(iter(executor), "nothing")
        mend = "use a container or an importer; resolvers and custom jobs exist on Vertex AI only"
        problems.append(Problem(where, f"an executor with {kind} cannot run", mend))


def _check_command(component: Component, where: str, parts: list[str], problems: list[Problem]) -> None:
    known: dict[tuple[str, str], Iterable[str]] = {
        ("inputs", "parameters"): component.input_parameters,
        ("inputs", "artifacts"): component.input_artifacts,
        ("outputs", "parameters"): component.output_parameters,
        ("outputs", "artifacts"): component.output_artifacts,
        ("inputs", "any"): [*component.input_parameters, *component.input_artifacts],
    }
    for part in parts:
        for side, kind, name in mentions(part):
            if name not in known[side, kind]:
                mend = nearest(name, known[side, kind], f"its {side} are")
                message = f"the command names {side} {kind} {name!r}, which {component.name} does not have"
                problems.append(Problem(where, message, mend))


def _check_defaults(component: Component, place: str, problems: list[Problem]) -> None:
    for name, declared in component.input_parameters.items():
        where = f"{place}.inputDefinitions.parameters.{name}"
        if not declared.type:
            problems.append(Problem(where, "the parameter has no type", "add parameterType", blocks=False))
        if declared.default is not ABSENT:
            try:
                coerce(from_file(declared.default), declared.type, f"the default of {name!r}")
            except InvalidInput as exc:
                problems.append(Problem(f"{where}.defaultValue", str(exc), f"write a {declared.type}"))


def _check_nesting(pipeline: Pipeline, problems: list[Problem]) -> None:
    """A DAG that contains itself would never end."""
    inside = {
        name: {task.component for task in component.dag.tasks.values()} & set(pipeline.components)
        for name, component in pipeline.components.items()
        if component.dag
    }
    cycle = find_cycle({name: {child for child in children if child in inside} for name, children in inside.items()})
    if cycle:
        mend = "a pipeline cannot contain itself; remove the inner use"
        problems.append(Problem(f"components.{cycle[0]}", f"components contain each other: {' -> '.join(cycle)}", mend))


def _components(pipeline: Pipeline) -> list[tuple[str, Component]]:
    return [("root", pipeline.root), *((f"components.{name}", body) for name, body in pipeline.components.items())]
