"""kfp's importer: an artifact that is already there, given a type and metadata. Runs inside the engine."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlfuncs.errors import ArtifactError
from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.ir import ABSENT, Component, Pipeline, Task, constant_of
from mlfuncs_pipelines.ir_shape import Problem
from mlfuncs_pipelines.placeholders import Context, local_path, resolve_value
from mlfuncs_pipelines.values import from_file


def run_importer(spec: Mapping[str, Any], component: Component, inputs: Values, constants: Mapping[str, str]) -> Values:
    """The imported artifact under the component's one output. Raises ArtifactError when a local file is not there."""
    name = next(iter(component.output_artifacts), "artifact")
    uri = _uri(spec, inputs)
    context = Context({"inputs": {"parameterValues": dict(inputs.parameters)}}, constants)
    metadata = resolve_value(from_file(spec.get("metadata", {})), context)
    if spec.get("downloadToWorkspace"):
        uri = _to_workspace(uri, constants)
    schema = spec.get("typeSchema", {})
    artifact = {
        "name": name,
        "type": {
            "schemaTitle": schema.get("schemaTitle", "system.Artifact"),
            "schemaVersion": schema.get("schemaVersion", "0.0.1"),
        },
        "uri": uri,
        "metadata": metadata,
    }
    return Values({}, {name: [artifact]})


def missing_imports(pipeline: Pipeline, params: Mapping[str, Any]) -> list[Problem]:
    """The importers that surely run and whose local file or folder is not there; what a step may make is left out."""
    problems = []
    for task in pipeline.root.dag.tasks.values() if pipeline.root.dag else ():
        executor = pipeline.executors.get(pipeline.component_of(task).executor or "", {})
        if "importer" not in executor or task.dependencies or task.condition or task.iterator:
            continue
        uri = _known_uri(task, executor["importer"], pipeline.root, params)
        is_local = uri and ("://" not in uri or uri.startswith("file://"))
        if is_local and not Path(local_path(uri)).exists():
            message = f"the importer finds nothing at {uri!r}"
            problems.append(Problem(f"root.dag.tasks.{task.name}", message, "give the path of a file or folder"))
    return problems


def _known_uri(task: Task, spec: Mapping[str, Any], root: Component, params: Mapping[str, Any]) -> str:
    """The URI as far as it is known before the run; "" when it is not."""
    source = task.parameters.get("uri", {})
    if "componentInputParameter" in source:
        declared = root.input_parameters.get(source["componentInputParameter"])
        value = params.get(source["componentInputParameter"], declared.default if declared else ABSENT)
    else:
        value = constant_of(source.get("runtimeValue", spec.get("artifactUri", {})))
    return value if isinstance(value, str) and "{{$" not in value else ""


def _uri(spec: Mapping[str, Any], inputs: Values) -> str:
    source = spec.get("artifactUri", {})
    if "runtimeParameter" in source:
        value = inputs.parameters.get(source["runtimeParameter"], inputs.parameters.get("uri"))
    else:
        value = inputs.parameters.get("uri", constant_of(source))
    if value is ABSENT or not isinstance(value, str) or not value:
        raise ArtifactError(f"the importer has no URI: {value!r}; give artifact_uri a text")
    return value


def _to_workspace(uri: str, constants: Mapping[str, str]) -> str:
    """A copy of a local file or folder in the workspace; a remote one is left to the step."""
    if "://" in uri and not uri.startswith("file://"):
        return uri
    workspace = constants.get("workspace_path")
    if not workspace:
        raise ArtifactError("the importer downloads to a workspace and the pipeline has none; add dsl.WorkspaceConfig")
    source = Path(local_path(uri))
    if not source.exists():
        raise ArtifactError(f"the importer finds nothing at {uri!r}")
    target = Path(workspace) / ".artifacts" / uuid.uuid4().hex / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)
    return str(target)
