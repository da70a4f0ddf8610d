"""Which step runs next: a pipeline's control flow as a state machine with no processes, clock or files.

Events go in (`start`, a step that succeeded or failed), instructions come out. The semantics are Kubeflow Pipelines':
a task waits for its dependencies; after a failure what depends on it does not run and everything else goes on; what
depends on a task that a condition skipped is skipped; a task with ALL_UPSTREAM_TASKS_COMPLETED runs in any case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs_pipelines import conditions
from mlfuncs_pipelines.inputs import Surroundings, Values, complete, loop_items, resolve_inputs, with_item
from mlfuncs_pipelines.instructions import Instruction, NodeEnded, RunEnded, RunStep, State, Step
from mlfuncs_pipelines.ir import Component, Dag, Pipeline, Task

_KFP_STATE = {"succeeded": "SUCCEEDED", "failed": "FAILED", "skipped": "SKIPPED", "upstream_failed": "FAILED"}


@dataclass
class _Node:
    """One task in flight, or one iteration of a loop."""

    id: str
    task: Task
    component: Component
    scope: _Scope
    inputs: Values
    index: int | None = None
    attempt: int = 0


@dataclass
class _Loop:
    """The iterations of one task: `started` so far, `results` by index as they end."""

    items: list[Any]
    given: Values
    started: int = 0
    ended: int = 0
    results: dict[int, Values] = field(default_factory=dict)
    reason: str = ""


@dataclass
class _Scope:
    """One instance of a DAG: its inputs and what became of its tasks."""

    id: str
    component: Component
    inputs: Values
    node: _Node | None  # the task this DAG is the body of; None for the root
    delay_s: float = 0.0
    states: dict[str, State] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Values] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)  # task -> dependencies that are not over
    dependents: dict[str, list[str]] = field(default_factory=dict)
    loops: dict[str, _Loop] = field(default_factory=dict)

    @property
    def dag(self) -> Dag:
        assert self.component.dag is not None
        return self.component.dag

    def child_id(self, name: str) -> str:
        return f"{self.id}/{name}" if self.id else name


class Scheduler:
    """The state of one run of `pipeline`. `constants` are values of placeholders such as pipeline_job_name."""

    def __init__(self, pipeline: Pipeline, parameters: Mapping[str, Any], constants: Mapping[str, str]) -> None:
        self._pipeline = pipeline
        self._constants = dict(constants)
        self._given = Values(dict(parameters))
        self._running: dict[str, _Node] = {}
        self._work: deque[Callable[[], None]] = deque()
        self._instructions: list[Instruction] = []

    def start(self) -> list[Instruction]:
        """The first steps. Raises InvalidInput when the run's parameters do not fit the pipeline's inputs."""
        root = self._pipeline.root
        unknown = sorted(set(self._given.parameters) - set(root.input_parameters))
        if unknown:
            known = ", ".join(root.input_parameters) or "none"
            raise InvalidInput(f"the pipeline has no parameter {unknown[0]!r}; its parameters: {known}")
        inputs = complete(self._given, root, f"pipeline {self._pipeline.name}")
        self._open(_Scope("", root, inputs, None))
        return self._drain()

    def succeed(self, step_id: str, outputs: Values) -> list[Instruction]:
        """The step ended well with `outputs`; what to do next."""
        node = self._running.pop(step_id)
        self._work.append(lambda: self._end(node, "succeeded", outputs))
        return self._drain()

    def fail(self, step_id: str, reason: str, retriable: bool = True) -> list[Instruction]:
        """The step failed; what to do next, which may be to run it again."""
        node = self._running.pop(step_id)
        self._work.append(lambda: self._end(node, "failed", Values(), reason, retriable))
        return self._drain()

    def _drain(self) -> list[Instruction]:
        while self._work:
            self._work.popleft()()
        made, self._instructions = self._instructions, []
        return made

    def _open(self, scope: _Scope) -> None:
        tasks = scope.dag.tasks
        scope.dependents = {name: [] for name in tasks}
        for name, task in tasks.items():
            scope.waiting[name] = len(task.dependencies)
            for dependency in task.dependencies:
                scope.dependents[dependency].append(name)
        if not tasks:
            self._work.append(lambda: self._close(scope))
        for task in tasks.values():
            if not task.dependencies:
                self._work.append(lambda task=task: self._consider(scope, task))  # type: ignore[misc]

    def _consider(self, scope: _Scope, task: Task) -> None:
        """All dependencies of `task` are over: run it, or settle why it does not run."""
        states = {name: scope.states[name] for name in sorted(task.dependencies)}
        bad = [name for name, state in states.items() if state in ("failed", "upstream_failed")]
        skipped = [name for name, state in states.items() if state == "skipped"]
        if bad and not task.on_completion:
            self._settle(scope, task, "upstream_failed", reason=f"upstream task {bad[0]} failed")
            return
        if skipped and not task.on_completion:
            self._settle(scope, task, "skipped", reason=f"upstream task {skipped[0]} was skipped")
            return
        try:
            component = self._pipeline.component_of(task)
            inputs = resolve_inputs(task, component, self._surroundings(scope, task))
            if task.condition and not conditions.evaluate(task.condition, inputs.parameters):
                self._settle(scope, task, "skipped", reason=f"the condition {task.condition} does not hold")
                return
            if task.iterator:
                self._start_loop(scope, task, component, inputs)
                return
        except (InvalidInput, SpecError) as exc:
            self._settle(scope, task, "failed", reason=str(exc))
            return
        self._launch(_Node(scope.child_id(task.name), task, component, scope, inputs))

    def _surroundings(self, scope: _Scope, task: Task) -> Surroundings:
        asked = {
            source["taskFinalStatus"]["producerTask"]
            for source in task.parameters.values()
            if "taskFinalStatus" in source
        }
        final = {name: self._final_status(scope, name) for name in asked if name in scope.states}
        return Surroundings(scope.inputs, scope.outputs, final, self._constants)

    def _final_status(self, scope: _Scope, name: str) -> dict[str, Any]:
        """kfp's PipelineTaskFinalStatus of a task that is over."""
        failed = scope.states[name] in ("failed", "upstream_failed")
        return {
            "state": _KFP_STATE[scope.states[name]],
            "pipelineJobResourceName": self._constants.get("pipeline_job_resource_name", ""),
            "pipelineTaskName": name,
            "error": {"code": 9, "message": scope.reasons.get(name, "")} if failed else {},
        }

    def _launch(self, node: _Node, delay_s: float = 0.0) -> None:
        if node.component.dag is None:
            self._running[node.id] = node
            delay_s = max(delay_s, node.scope.delay_s if not node.task.dependencies else 0.0)
            step = Step(node.id, node.task, node.component, node.inputs, node.attempt, delay_s)
            self._instructions.append(RunStep(step))
            return
        # another attempt at a group gets its own place, so that the steps in it are told apart
        scope_id = node.id if node.attempt == 0 else f"{node.id}~{node.attempt}"
        self._open(_Scope(scope_id, node.component, node.inputs, node, delay_s))

    def _end(self, node: _Node, state: State, outputs: Values, reason: str = "", retriable: bool = True) -> None:
        if state == "failed" and retriable and node.attempt < node.task.retry.count:
            node.attempt += 1
            self._launch(node, node.task.retry.delay_s(node.attempt))
        elif node.index is None:
            self._settle(node.scope, node.task, state, outputs, reason)
        else:
            self._end_iteration(node, state, outputs, reason)

    def _settle(self, scope: _Scope, task: Task, state: State, outputs: Values | None = None, reason: str = "") -> None:
        """Record the end of `task`, and look at what waited for it."""
        scope.states[task.name] = state
        scope.reasons[task.name] = reason
        if outputs is not None and state == "succeeded":
            scope.outputs[task.name] = outputs
        is_group = self._pipeline.component_of(task).dag is not None or task.iterator is not None
        self._instructions.append(NodeEnded(scope.child_id(task.name), state, is_group, reason))
        for name in scope.dependents[task.name]:
            scope.waiting[name] -= 1
            if scope.waiting[name] == 0:
                self._work.append(lambda name=name: self._consider(scope, scope.dag.tasks[name]))  # type: ignore[misc]
        if len(scope.states) == len(scope.dag.tasks):
            self._work.append(lambda: self._close(scope))

    def _close(self, scope: _Scope) -> None:
        """All tasks of `scope` are over: pass its outcome to the task it is the body of."""
        failed = [name for name in scope.dag.tasks if scope.states[name] == "failed"]
        failed = failed or [name for name in scope.dag.tasks if scope.states[name] == "upstream_failed"]
        state: State = "failed" if failed else "succeeded"
        reason = f"{scope.child_id(failed[0])}: {scope.reasons[failed[0]]}" if failed else ""
        if failed and self._pipeline.component_of(scope.dag.tasks[failed[0]]).dag is not None:
            reason = scope.reasons[failed[0]]  # already names the step inside
        outputs = Values() if failed else self._collect(scope)
        node = scope.node
        if node is None:
            self._instructions.append(RunEnded(state, outputs, reason))
        else:
            self._end(node, state, outputs, reason)

    def _collect(self, scope: _Scope) -> Values:
        """The outputs of a DAG: of several producers (OneOf) the first that has the value."""
        parameters: dict[str, Any] = {}
        artifacts: dict[str, list[dict[str, Any]]] = {}
        for name, selectors in scope.dag.parameter_outputs.items():
            for producer, key in selectors:
                found = scope.outputs.get(producer, Values()).parameters
                if key in found:
                    parameters[name] = found[key]
                    break
        for name, selectors in scope.dag.artifact_outputs.items():
            for producer, key in selectors:
                produced = scope.outputs.get(producer, Values()).artifacts
                if key in produced:
                    artifacts[name] = produced[key]
                    break
        return Values(parameters, artifacts)

    def _start_loop(self, scope: _Scope, task: Task, component: Component, inputs: Values) -> None:
        assert task.iterator is not None
        loop = _Loop(loop_items(task.iterator, inputs, f"task {task.name}"), inputs)
        scope.loops[task.name] = loop
        if not loop.items:
            self._end_loop(scope, task, loop)
        limit = task.iterator.parallelism or len(loop.items)
        for _ in range(min(limit, len(loop.items))):
            self._start_iteration(scope, task, component, loop)

    def _start_iteration(self, scope: _Scope, task: Task, component: Component, loop: _Loop) -> None:
        assert task.iterator is not None
        index = loop.started
        loop.started += 1
        node_id = f"{scope.child_id(task.name)}/{index}"
        node = _Node(node_id, task, component, scope, loop.given, index)
        try:
            node.inputs = with_item(loop.given, component, task.iterator, loop.items[index])
        except InvalidInput as exc:
            reason = str(exc)
            self._work.append(lambda: self._end_iteration(node, "failed", Values(), reason))
            return
        self._launch(node)

    def _end_iteration(self, node: _Node, state: State, outputs: Values, reason: str) -> None:
        loop = node.scope.loops[node.task.name]
        loop.ended += 1
        if state == "succeeded":
            loop.results[node.index or 0] = outputs
        elif not loop.reason:
            loop.reason = reason or "an iteration failed"
        self._instructions.append(NodeEnded(node.id, state, node.component.dag is not None, reason))
        if loop.started < len(loop.items):
            self._start_iteration(node.scope, node.task, node.component, loop)
        elif loop.ended == len(loop.items):
            self._end_loop(node.scope, node.task, loop)

    def _end_loop(self, scope: _Scope, task: Task, loop: _Loop) -> None:
        """All iterations are over: their outputs, in the order of the items, are what dsl.Collected reads."""
        if loop.reason:
            self._settle(scope, task, "failed", reason=loop.reason)
            return
        component = self._pipeline.component_of(task)
        ordered = [loop.results[index] for index in range(len(loop.items))]
        parameters = {
            name: [result.parameters[name] for result in ordered if name in result.parameters]
            for name in component.output_parameters
        }
        artifacts = {
            name: [artifact for result in ordered for artifact in result.artifacts.get(name, [])]
            for name in component.output_artifacts
        }
        self._settle(scope, task, "succeeded", Values(parameters, artifacts))
