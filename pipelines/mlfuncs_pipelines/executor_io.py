"""The files between the engine and one step: kfp's executor input out, executor output back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlfuncs.errors import ArtifactError, InvalidInput
from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.ir import Component
from mlfuncs_pipelines.placeholders import local_path
from mlfuncs_pipelines.values import coerce


def executor_input(component: Component, inputs: Values, folder: Path) -> dict[str, Any]:
    """kfp's ExecutorInput as camelCase JSON; outputs go to files below `folder`."""
    place = f"{folder}{os.sep}"
    return {
        "inputs": {
            "parameterValues": dict(inputs.parameters),
            "artifacts": {name: {"artifacts": artifacts} for name, artifacts in inputs.artifacts.items()},
        },
        "outputs": {
            "parameters": {name: {"outputFile": place + name} for name in component.output_parameters},
            "artifacts": {
                name: {
                    "artifacts": [
                        {
                            "name": name,
                            "type": {
                                "schemaTitle": declared.schema_title,
                                "schemaVersion": declared.schema_version,
                            },
                            "uri": place + name,
                            "metadata": {},
                        }
                    ]
                }
                for name, declared in component.output_artifacts.items()
            },
            "outputFile": place + "executor_output.json",
        },
    }


def read_outputs(
    component: Component, given: Mapping[str, Any], reported: Mapping[str, Any] | None = None, complete: bool = False
) -> Values:
    """What the step wrote, or `reported` to the engine, typed as declared.

    Raises InvalidInput or ArtifactError for what cannot be read, and with `complete` for a parameter that is not there.
    """
    written = reported if reported is not None else _read_json(Path(given["outputs"]["outputFile"]))
    parameters = dict(written.get("parameterValues", {}))
    for name, place in given["outputs"]["parameters"].items() if reported is None else ():
        if os.path.isfile(place["outputFile"]):
            parameters[name] = _read_parameter(Path(place["outputFile"]), component.output_parameters[name].type, name)
    missing = [name for name in component.output_parameters if name not in parameters]
    if missing and complete:  # Kubeflow fails such a step as well
        raise ArtifactError(f"the step ended without a value for its output {', '.join(missing)}")
    typed = {
        name: coerce(value, component.output_parameters[name].type, f"output {name}")
        for name, value in parameters.items()
        if name in component.output_parameters
    }
    return Values(typed, _artifacts(given, written))


def _artifacts(given: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, planned in given["outputs"]["artifacts"].items():
        reported = written.get("artifacts", {}).get(name, {}).get("artifacts") or planned["artifacts"]
        found[name] = [_artifact(planned["artifacts"][0], one) for one in reported]
    return found


def _artifact(planned: Mapping[str, Any], reported: Mapping[str, Any]) -> dict[str, Any]:
    """A runtime artifact with its declared type; content at a custom path is put where the artifact's URI points."""
    artifact = {
        "name": reported.get("name") or planned["name"],
        "type": planned["type"],
        "uri": reported.get("uri") or planned["uri"],
        "metadata": dict(reported.get("metadata") or {}),
    }
    custom = reported.get("custom_path") or reported.get("customPath")
    if custom and Path(custom).exists() and artifact["uri"] == planned["uri"]:
        _place(Path(custom), Path(local_path(artifact["uri"])))
    return artifact


def _place(source: Path, target: Path) -> None:
    """Put the file or directory `source` at `target`, without a copy of the bytes where the disk allows it."""
    if target.exists() and source.samefile(target):
        return
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_or_copy)
    else:
        _link_or_copy(str(source), str(target))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as exc:
        raise ArtifactError(f"the step's output file {path} cannot be read: {exc}") from exc
    if not isinstance(body, dict):
        raise ArtifactError(f"the step's output file {path} holds {type(body).__name__}, not an object")
    return body


def _read_parameter(path: Path, kind: str, name: str) -> Any:
    """A parameter that the step wrote to its own file: text for a string, else JSON (True and False as well)."""
    text = path.read_text(encoding="utf-8")
    if kind in ("STRING", ""):
        return text
    try:
        return json.loads(text.strip().lower() if kind == "BOOLEAN" else text)
    except json.JSONDecodeError:
        message = f"output {name} is declared {kind}, and the step wrote {text[:80]!r} to its file, which is not JSON"
        raise InvalidInput(message, [{"field": name, "message": "not JSON"}]) from None
