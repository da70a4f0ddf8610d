"""A kfp v2 pipeline file (the IR) as frozen values.

`Pipeline.of` makes the values of what `validate.check` accepted; use `validate.load_pipeline` to have it checked first.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COMPLETED = "ALL_UPSTREAM_TASKS_COMPLETED"
_OLD_TYPES = {"INT": "NUMBER_INTEGER", "DOUBLE": "NUMBER_DOUBLE", "STRING": "STRING"}
_OLD_CONSTANTS = ("intValue", "doubleValue", "stringValue")


class _Absent:
    """There is no value: different from a value that is null."""

    def __repr__(self) -> str:
        return "ABSENT"

    def __bool__(self) -> bool:
        return False


ABSENT = _Absent()


@dataclass(frozen=True)
class Parameter:
    """A declared input or output parameter; `type` is a ParameterTypeEnum name or "" when the file names none."""

    type: str
    optional: bool = False
    default: Any = ABSENT
    literals: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A declared input or output artifact."""

    schema_title: str
    schema_version: str = "0.0.1"
    is_list: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Iterator:
    """A loop over items; `items` is the JSON list itself, or the name of the task input that holds it."""

    item_input: str
    kind: str  # "parameter" or "artifact"
    raw: str | None = None
    source_input: str = ""
    parallelism: int = 0  # 0: no limit


@dataclass(frozen=True)
class Retry:
    """How often a failed task runs again and how long it waits: `backoff_s * factor**n`, at most `max_backoff_s`."""

    count: int = 0
    backoff_s: float = 0.0
    factor: float = 2.0
    max_backoff_s: float = 3600.0

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait before attempt number `attempt` (the first run is attempt 0)."""
        return min(self.backoff_s * self.factor ** (attempt - 1), self.max_backoff_s) if attempt else 0.0


@dataclass(frozen=True)
class Task:
    """One node of a DAG; `parameters` and `artifacts` are the IR's input specs by input name."""

    name: str
    display_name: str
    component: str
    parameters: Mapping[str, Mapping[str, Any]]
    artifacts: Mapping[str, Mapping[str, Any]]
    dependencies: frozenset[str]
    condition: str = ""
    on_completion: bool = False  # runs when its dependencies are over, however they ended
    iterator: Iterator | None = None
    retry: Retry = Retry()
    cache: bool = False
    cache_key: str = ""


@dataclass(frozen=True)
class Dag:
    """The tasks of a pipeline or sub-pipeline and where its outputs come from."""

    tasks: Mapping[str, Task]
    parameter_outputs: Mapping[str, tuple[tuple[str, str], ...]]  # output -> ((producer task, its output), ...)
    artifact_outputs: Mapping[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class Component:
    """An interface with either a DAG or the label of an executor behind it."""

    name: str
    input_parameters: Mapping[str, Parameter]
    input_artifacts: Mapping[str, Artifact]
    output_parameters: Mapping[str, Parameter]
    output_artifacts: Mapping[str, Artifact]
    dag: Dag | None = None
    executor: str = ""


@dataclass(frozen=True)
class Pipeline:
    """A whole pipeline file. `spec` and `platform` are the canonical documents it was made from."""

    name: str
    root: Component
    components: Mapping[str, Component]
    executors: Mapping[str, Mapping[str, Any]]
    spec: Mapping[str, Any] = field(repr=False)
    platform: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, spec: Mapping[str, Any], platform: Mapping[str, Any] | None = None) -> Pipeline:
        """The pipeline that canonical documents (camelCase, checked) describe."""
        return cls(
            name=spec.get("pipelineInfo", {}).get("name", ""),
            root=_component("root", spec.get("root", {})),
            components={name: _component(name, body) for name, body in spec.get("components", {}).items()},
            executors=spec.get("deploymentSpec", {}).get("executors", {}),
            spec=spec,
            platform=platform or {},
        )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical documents, independent of the order of keys."""
        body = json.dumps([self.spec, self.platform], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(body.encode()).hexdigest()

    def component_of(self, task: Task) -> Component:
        """The component that `task` runs."""
        return self.components[task.component]

    def executor_platform(self, label: str) -> Mapping[str, Any]:
        """What the platform document says of the executor `label` for Kubernetes; empty when nothing."""
        kubernetes = self.platform.get("platforms", {}).get("kubernetes", {})
        return kubernetes.get("deploymentSpec", {}).get("executors", {}).get(label, {})


def _component(name: str, body: Mapping[str, Any]) -> Component:
    inputs, outputs = body.get("inputDefinitions", {}), body.get("outputDefinitions", {})
    return Component(
        name=name,
        input_parameters={key: _parameter(spec) for key, spec in inputs.get("parameters", {}).items()},
        input_artifacts={key: _artifact(spec) for key, spec in inputs.get("artifacts", {}).items()},
        output_parameters={key: _parameter(spec) for key, spec in outputs.get("parameters", {}).items()},
        output_artifacts={key: _artifact(spec) for key, spec in outputs.get("artifacts", {}).items()},
        dag=_dag(body["dag"]) if "dag" in body else None,
        executor=body.get("executorLabel", ""),
    )


def _parameter(spec: Mapping[str, Any]) -> Parameter:
    kind = spec.get("parameterType") or _OLD_TYPES.get(spec.get("type", ""), "")
    return Parameter(
        type="" if kind == "PARAMETER_TYPE_ENUM_UNSPECIFIED" else kind,
        optional=bool(spec.get("isOptional")) or "defaultValue" in spec,
        default=spec.get("defaultValue", ABSENT),
        literals=tuple(spec.get("literals", ())),
    )


def _artifact(spec: Mapping[str, Any]) -> Artifact:
    schema = spec.get("artifactType", {})
    return Artifact(
        schema_title=schema.get("schemaTitle", "system.Artifact"),
        schema_version=schema.get("schemaVersion", "0.0.1"),
        is_list=bool(spec.get("isArtifactList")),
        optional=bool(spec.get("isOptional")),
    )


def _dag(body: Mapping[str, Any]) -> Dag:
    outputs = body.get("outputs", {})
    return Dag(
        tasks={name: _task(name, spec) for name, spec in body.get("tasks", {}).items()},
        parameter_outputs={
            name: _selectors(
                [spec["valueFromParameter"]]
                if "valueFromParameter" in spec
                else spec.get("valueFromOneof", {}).get("parameterSelectors", []),
                "outputParameterKey",
            )
            for name, spec in outputs.get("parameters", {}).items()
        },
        artifact_outputs={
            name: _selectors(spec.get("artifactSelectors", []), "outputArtifactKey")
            for name, spec in outputs.get("artifacts", {}).items()
        },
    )


def _selectors(specs: list[Mapping[str, Any]], key: str) -> tuple[tuple[str, str], ...]:
    return tuple((spec.get("producerSubtask", ""), spec.get(key, "")) for spec in specs)


def _task(name: str, spec: Mapping[str, Any]) -> Task:
    inputs, trigger, caching = spec.get("inputs", {}), spec.get("triggerPolicy", {}), spec.get("cachingOptions", {})
    parameters, artifacts = inputs.get("parameters", {}), inputs.get("artifacts", {})
    return Task(
        name=name,
        display_name=spec.get("taskInfo", {}).get("name") or name,
        component=spec.get("componentRef", {}).get("name", ""),
        parameters=parameters,
        artifacts=artifacts,
        dependencies=frozenset(spec.get("dependentTasks", [])) | _producers(parameters, artifacts),
        condition=trigger.get("condition", ""),
        on_completion=trigger.get("strategy") in (COMPLETED, 2),
        iterator=_iterator(spec),
        retry=_retry(spec.get("retryPolicy")),
        cache=bool(caching.get("enableCache")),
        cache_key=caching.get("cacheKey", ""),
    )


def _producers(parameters: Mapping[str, Any], artifacts: Mapping[str, Any]) -> frozenset[str]:
    """The tasks whose outputs or final status a task takes: dependencies even where the file does not list them."""
    kinds = ("taskOutputParameter", "taskOutputArtifact", "taskFinalStatus")
    return frozenset(
        source[kind]["producerTask"]
        for source in (*parameters.values(), *artifacts.values())
        for kind in kinds
        if source.get(kind, {}).get("producerTask")
    )


def _iterator(spec: Mapping[str, Any]) -> Iterator | None:
    limit = int(spec.get("iteratorPolicy", {}).get("parallelismLimit", 0))
    if "parameterIterator" in spec:
        body = spec["parameterIterator"]
        items = body.get("items", {})
        return Iterator(
            body.get("itemInput", ""), "parameter", items.get("raw"), items.get("inputParameter", ""), limit
        )
    if "artifactIterator" in spec:
        body = spec["artifactIterator"]
        source = body.get("items", {}).get("inputArtifact", "")
        return Iterator(body.get("itemInput", ""), "artifact", None, source, limit)
    return None


def _retry(spec: Mapping[str, Any] | None) -> Retry:
    if not spec:
        return Retry()
    return Retry(
        count=int(spec.get("maxRetryCount", 0)),
        backoff_s=duration_s(spec.get("backoffDuration"), 0.0),
        factor=float(spec.get("backoffFactor", 2.0)) or 2.0,
        max_backoff_s=duration_s(spec.get("backoffMaxDuration"), 3600.0),
    )


def duration_s(text: str | None, default: float) -> float:
    """Seconds in a protobuf JSON duration such as "1.5s"; `default` for None.

    >>> duration_s("60s", 0)
    60.0
    """
    return float(text[:-1]) if text else default


def constant_of(value: Mapping[str, Any]) -> Any:
    """The constant of a ValueOrRuntimeParameter, in its new or its old form; ABSENT when it is none."""
    if "constant" in value:
        return value["constant"]
    for key in _OLD_CONSTANTS:
        if key in value.get("constantValue", {}):
            raw = value["constantValue"][key]
            return int(raw) if key == "intValue" else raw
    return ABSENT
