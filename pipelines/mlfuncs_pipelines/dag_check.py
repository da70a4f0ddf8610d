"""The checks of one DAG of a pipeline: its tasks' inputs, conditions, loops and outputs. Part of `references`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs_pipelines import conditions
from mlfuncs_pipelines.cycles import find_cycle
from mlfuncs_pipelines.ir import ABSENT, Artifact, Component, Dag, Parameter, Pipeline, Task, constant_of
from mlfuncs_pipelines.ir_shape import Problem, nearest
from mlfuncs_pipelines.placeholders import mentions
from mlfuncs_pipelines.values import coerce, from_file

_SIMPLE = {"STRING", "NUMBER_INTEGER", "NUMBER_DOUBLE", "BOOLEAN"}
_CHANNEL = "pipelinechannel--"  # inputs that kfp adds to a task for the placeholders in its constants
# inputs that kfp 2.14 adds to a task, not to its component, for limits that are only known when it runs
_LIMITS = {"cpu_limit", "cpu_request", "memory_limit", "memory_request", "accelerator_count", "accelerator_type"}
_OBJECTS = {"STRUCT", "TASK_FINAL_STATUS"}  # the second is handed to a nested pipeline as the first


class DagCheck:
    """The checks of one DAG."""

    def __init__(
        self, pipeline: Pipeline, component: Component, place: str, problems: list[Problem], looped: bool
    ) -> None:
        self.pipeline, self.component, self.place, self.looped = pipeline, component, place, looped
        self.problems = problems
        assert component.dag is not None
        self.tasks = component.dag.tasks
        self.dag = component.dag
        self.free_inputs = _loop_items(pipeline)  # kfp guesses the type of a loop's item

    def run(self) -> None:
        if not self.tasks and self.component.name == "root":
            self._add("tasks", "the pipeline has no tasks", "add a task to root.dag.tasks")
        for name, task in self.tasks.items():
            self._check_task(f"tasks.{name}", task)
        self._check_cycle()
        self._check_outputs()

    def _add(self, place: str, message: str, mend: str, blocks: bool = True) -> None:
        self.problems.append(Problem(f"{self.place}.{place}", message, mend, blocks))

    def _check_task(self, place: str, task: Task) -> None:
        for name in sorted(task.dependencies - set(self.tasks)):
            mend = nearest(name, self.tasks, "tasks of this DAG are")
            self._add(f"{place}.dependentTasks", f"there is no task {name!r} in this DAG", mend)
        component = self.pipeline.components.get(task.component)
        if component is None:
            mend = nearest(task.component, self.pipeline.components, "components are")
            self._add(f"{place}.componentRef.name", f"there is no component {task.component!r}", mend)
            return
        for name, source in task.parameters.items():
            self._check_parameter(f"{place}.inputs.parameters.{name}", task, component, name, source)
        for name, source in task.artifacts.items():
            self._check_artifact(f"{place}.inputs.artifacts.{name}", component, name, source)
        self._check_given(place, task, component)
        self._check_condition(place, task)
        if task.iterator:
            self._check_iterator(place, task, component)
        if task.retry.count < 0:
            self._add(f"{place}.retryPolicy.maxRetryCount", f"{task.retry.count} is below 0", "use 0 or more")

    def _check_given(self, place: str, task: Task, component: Component) -> None:
        item = task.iterator.item_input if task.iterator else None
        for name, declared in component.input_parameters.items():
            if not declared.optional and name not in task.parameters and name != item:
                mend = f"give it under inputs.parameters.{name}"
                self._add(place, f"the required input {name!r} of {component.name} is not given", mend)
        for name, artifact in component.input_artifacts.items():
            if not artifact.optional and name not in task.artifacts and name != item:
                mend = f"give it under inputs.artifacts.{name}"
                self._add(place, f"the required input artifact {name!r} of {component.name} is not given", mend)

    def _check_parameter(
        self, place: str, task: Task, component: Component, name: str, source: Mapping[str, Any]
    ) -> None:
        declared = component.input_parameters.get(name)
        if declared is None and name in _LIMITS and "runtimeValue" in source:
            return
        if declared is None and not name.startswith(_CHANNEL):
            if name in component.input_artifacts:
                self._add(place, f"{name!r} of {component.name} is an artifact", "move it to inputs.artifacts")
            else:
                mend = nearest(name, component.input_parameters, "its parameters are")
                self._add(place, f"{component.name} has no input parameter {name!r}", mend)
            return
        if "runtimeValue" in source:
            self._check_constant(place, task, declared, source["runtimeValue"])
            return
        found = self._source_parameter(place, source)
        if declared and found and "parameterExpressionSelector" not in source:
            self._check_types(place, found.type, declared.type, name)

    def _check_constant(self, place: str, task: Task, declared: Parameter | None, runtime: Mapping[str, Any]) -> None:
        if "runtimeParameter" in runtime:
            self._component_input(place, runtime["runtimeParameter"])
            return
        value = constant_of(runtime)
        if value is ABSENT:
            self._add(place, "the runtimeValue has no constant", "add runtimeValue.constant")
            return
        text = value if isinstance(value, str) else json.dumps(value)
        for side, kind, name in mentions(text):
            if side == "inputs" and name not in (task.parameters if kind == "parameters" else task.artifacts):
                mend = f"add {name!r} to the inputs of this task"
                self._add(place, f"the placeholder of {name!r} names no input of this task", mend)
        if declared and "{{$" not in text:
            try:
                coerce(from_file(value), declared.type, "the constant")
            except InvalidInput as exc:
                self._add(place, str(exc), f"write a {declared.type} constant")

    def _source_parameter(self, place: str, source: Mapping[str, Any]) -> Parameter | None:
        """The declaration that a parameter source refers to; adds a problem when there is none."""
        if "componentInputParameter" in source:
            name = source["componentInputParameter"]
            found = self._component_input(f"{place}.componentInputParameter", name)
            return None if name in self.free_inputs else found
        if "taskFinalStatus" in source:
            self._check_producer(f"{place}.taskFinalStatus", source["taskFinalStatus"])
            return None
        if "taskOutputParameter" not in source:
            self._add(place, "the input has no source", "give a constant, a task's output or an input of this DAG")
            return None
        reference = source["taskOutputParameter"]
        place = f"{place}.taskOutputParameter"
        producer = self._check_producer(place, reference)
        return self._output_parameter(place, producer, reference.get("outputParameterKey", "")) if producer else None

    def _component_input(self, place: str, name: str) -> Parameter | None:
        if name not in self.component.input_parameters:
            mend = nearest(name, self.component.input_parameters, "inputs of the enclosing DAG are")
            self._add(place, f"the enclosing DAG has no input parameter {name!r}", mend)
        return self.component.input_parameters.get(name)

    def _check_producer(self, place: str, reference: Mapping[str, Any]) -> Component | None:
        name = reference.get("producerTask") or reference.get("producerSubtask") or ""
        if name not in self.tasks:
            if "producerTask" not in reference or name not in self._known_missing():
                mend = nearest(name, self.tasks, "tasks of this DAG are")
                self._add(place, f"there is no task {name!r} in this DAG", mend)
            return None
        return self.pipeline.components.get(self.tasks[name].component)

    def _known_missing(self) -> set[str]:
        """Producers already reported as dangling dependencies."""
        return {name for task in self.tasks.values() for name in task.dependencies} - set(self.tasks)

    def _output_parameter(self, place: str, producer: Component, key: str) -> Parameter | None:
        if key not in producer.output_parameters:
            if key in producer.output_artifacts:
                self._add(place, f"{key!r} of {producer.name} is an artifact", "refer to it as an artifact")
            else:
                mend = nearest(key, producer.output_parameters, "its output parameters are")
                if "-loop-item" in key:
                    mend = "kfp loses a loop's item inside a longer text: give the item to the step as an argument"
                self._add(place, f"{producer.name} has no output parameter {key!r}", mend)
        return producer.output_parameters.get(key)

    def _output_artifact(self, place: str, producer: Component, key: str) -> Artifact | None:
        if key not in producer.output_artifacts:
            if key in producer.output_parameters:
                self._add(place, f"{key!r} of {producer.name} is a parameter", "refer to it as a parameter")
            else:
                mend = nearest(key, producer.output_artifacts, "its output artifacts are")
                self._add(place, f"{producer.name} has no output artifact {key!r}", mend)
        return producer.output_artifacts.get(key)

    def _check_artifact(self, place: str, component: Component, name: str, source: Mapping[str, Any]) -> None:
        declared = component.input_artifacts.get(name)
        if declared is None and not name.startswith(_CHANNEL):
            mend = nearest(name, component.input_artifacts, "its artifacts are")
            self._add(place, f"{component.name} has no input artifact {name!r}", mend)
            return
        found: Artifact | None = None
        if "componentInputArtifact" in source:
            key = source["componentInputArtifact"]
            found = self.component.input_artifacts.get(key)
            if found is None:
                mend = nearest(key, self.component.input_artifacts, "input artifacts of the enclosing DAG are")
                self._add(place, f"the enclosing DAG has no input artifact {key!r}", mend)
            elif key in self.free_inputs:
                return
        elif "taskOutputArtifact" in source:
            producer = self._check_producer(f"{place}.taskOutputArtifact", source["taskOutputArtifact"])
            key = source["taskOutputArtifact"].get("outputArtifactKey", "")
            found = self._output_artifact(f"{place}.taskOutputArtifact", producer, key) if producer else None
        else:
            self._add(place, "the input has no source", "give a task's output or an input of this DAG")
        if declared and found:
            self._check_artifact_types(place, found, declared)

    def _check_artifact_types(self, place: str, found: Artifact, declared: Artifact) -> None:
        titles = {found.schema_title, declared.schema_title}
        if len(titles) > 1 and "system.Artifact" not in titles:
            message = f"a {found.schema_title} is given where a {declared.schema_title} is expected"
            self._add(place, message, "change one of the two types", blocks=False)
        if found.is_list and not declared.is_list:
            message = "a list of artifacts is given where one artifact is expected"
            self._add(place, message, "make the input a list, or loop over the list", blocks=False)

    def _check_types(self, place: str, found: str, declared: str, name: str) -> None:
        if not found or not declared or found == declared:
            return
        if (found, declared) == ("NUMBER_INTEGER", "NUMBER_DOUBLE") or {found, declared} == _OBJECTS:
            return
        never = (found in _SIMPLE - {"STRING"} and declared in ("LIST", "STRUCT")) or (
            found in ("LIST", "STRUCT") and declared in _SIMPLE - {"STRING"}
        )
        mend = "change one of the two types, or convert the value in a step"
        self._add(place, f"a {found} is given where {name!r} expects a {declared}", mend, blocks=never)

    def _check_condition(self, place: str, task: Task) -> None:
        if not task.condition:
            return
        place = f"{place}.triggerPolicy.condition"
        try:
            conditions.compile_condition(task.condition)
        except SpecError as exc:
            self._add(place, str(exc), "write CEL")
        component = self.pipeline.components[task.component]
        for name in sorted(conditions.referenced(task.condition)):
            if name not in task.parameters and name not in component.input_parameters:
                mend = nearest(name, task.parameters, "inputs of this task are")
                self._add(place, f"the condition reads {name!r}, which is no input of this task", mend)

    def _check_iterator(self, place: str, task: Task, component: Component) -> None:
        assert task.iterator is not None
        iterator = task.iterator
        place = f"{place}.{iterator.kind}Iterator"
        parameters = iterator.kind == "parameter"
        known: Iterable[str] = component.input_parameters if parameters else component.input_artifacts
        if iterator.item_input not in known:
            mend = nearest(iterator.item_input, known, "its inputs are")
            self._add(f"{place}.itemInput", f"{component.name} has no input {iterator.item_input!r}", mend)
        if iterator.raw is not None:
            try:
                good = isinstance(json.loads(iterator.raw), list)
            except json.JSONDecodeError:
                good = False
            if not good:
                self._add(f"{place}.items.raw", f"{iterator.raw[:60]!r} is not a JSON list", "write a JSON list")
            return
        given = task.parameters if parameters else task.artifacts
        if iterator.source_input not in given and iterator.source_input not in known:
            mend = nearest(iterator.source_input, given, "inputs of this task are")
            self._add(f"{place}.items", f"the loop goes over {iterator.source_input!r}, which is no input", mend)

    def _check_cycle(self) -> None:
        cycle = find_cycle({name: set(task.dependencies) & set(self.tasks) for name, task in self.tasks.items()})
        if cycle:
            mend = f"remove one of the dependencies between {' and '.join(sorted(set(cycle)))}"
            self._add("tasks", f"the tasks wait for each other: {' -> '.join(cycle)}", mend)

    def _check_outputs(self) -> None:
        for name, selectors in self.dag.parameter_outputs.items():
            declared = self.component.output_parameters.get(name)
            place = f"outputs.parameters.{name}"
            if declared is None:
                self._add(place, f"the output {name!r} is not declared", "declare it in outputDefinitions.parameters")
            for task, key in selectors:
                producer = self._check_producer(place, {"producerSubtask": task})
                found = self._output_parameter(place, producer, key) if producer else None
                collected = name.startswith(_CHANNEL) and declared is not None and declared.type == "LIST"
                if found and declared and not self.looped and not collected:  # kfp says LIST along the way of Collected
                    self._check_types(place, found.type, declared.type, name)
        for name, selectors in self.dag.artifact_outputs.items():
            place = f"outputs.artifacts.{name}"
            if name not in self.component.output_artifacts:
                self._add(place, f"the output {name!r} is not declared", "declare it in outputDefinitions.artifacts")
            for task, key in selectors:
                producer = self._check_producer(place, {"producerSubtask": task})
                if producer:
                    self._output_artifact(place, producer, key)
        produced = {*self.dag.parameter_outputs, *self.dag.artifact_outputs}
        for name in [*self.component.output_parameters, *self.component.output_artifacts]:
            if name not in produced:
                self._add("outputs", f"the declared output {name!r} comes from no task", f"add {name!r} to dag.outputs")


def _loop_items(pipeline: Pipeline) -> set[str]:
    """The inputs that loops fill; kfp names each after its loop, so the names are unique in a file."""
    return {task.iterator.item_input for dag in dags_of(pipeline) for task in dag.tasks.values() if task.iterator}


def dags_of(pipeline: Pipeline) -> list[Dag]:
    """The root's graph and those of all components that have one."""
    return [component.dag for component in (pipeline.root, *pipeline.components.values()) if component.dag]
