"""kfp's placeholders (`{{$.inputs.parameters['x']}}`, Concat, IfPresent, `{{$}}`) replaced by values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import SpecError

_PLACEHOLDER = re.compile(r"\{\{\$(?:\.((?:[^{}'\"]|'[^']*'|\"[^\"]*\")*))?\}\}")
_PART = re.compile(r"""\.?([A-Za-z_][A-Za-z0-9_]*)|\['([^']*)'\]|\["([^"]*)"\]""")
WORKSPACE_MOUNT = "/kfp-workspace"  # where Kubeflow mounts a pipeline's workspace
_REMOTE = {"gs://": "/gcs/", "s3://": "/s3/", "minio://": "/minio/"}


@dataclass(frozen=True)
class Context:
    """What placeholders can name: the executor input (camelCase JSON) and constants such as pipeline_job_name."""

    executor_input: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()  # inputs that are lists of artifacts


def resolve_command(parts: list[str], context: Context) -> list[str]:
    """`parts` of a command with every placeholder replaced; an absent IfPresent vanishes, a list is spliced in."""
    return [resolve_text(text, context) for part in parts for text in _flatten(_structure(part, context))]


def resolve_text(text: str, context: Context) -> str:
    """`text` with its placeholders replaced; values that are no strings appear as JSON."""
    if "{{$" not in text and WORKSPACE_MOUNT not in text:
        return text
    workspace = context.constants.get("workspace_path")
    if workspace:
        text = text.replace(WORKSPACE_MOUNT, workspace)

    def replace(match: re.Match[str]) -> str:
        found, value = _lookup(match[1], context)
        if not found:
            return match[0]
        return value if isinstance(value, str) else json.dumps(value)

    return _PLACEHOLDER.sub(replace, text)


def resolve_value(value: Any, context: Context) -> Any:
    """`value` (JSON) with the placeholders in its strings replaced; a string that is one placeholder keeps its type."""
    if isinstance(value, str):
        whole = _PLACEHOLDER.fullmatch(value)
        if whole and whole[1]:
            found, resolved = _lookup(whole[1], context)
            return resolved if found else value
        return resolve_text(value, context)
    if isinstance(value, list):
        return [resolve_value(item, context) for item in value]
    if isinstance(value, Mapping):
        return {resolve_text(key, context): resolve_value(item, context) for key, item in value.items()}
    return value


def mentions(part: str) -> list[tuple[str, str, str]]:
    """The inputs and outputs that a command part or constant names, as (side, kind, name).

    >>> mentions("{{$.inputs.parameters['x']}}-{{$.outputs.artifacts['m'].path}}")
    [('inputs', 'parameters', 'x'), ('outputs', 'artifacts', 'm')]
    """
    found = []
    for match in _PLACEHOLDER.finditer(part):
        path = _parts(match[1] or "")
        if len(path) >= 3 and path[0] in ("inputs", "outputs") and path[1] in ("parameters", "artifacts"):
            found.append((path[0], path[1], path[2]))
    if part.startswith(('{"IfPresent"', '{"Concat"')):
        found.extend(("inputs", "any", name) for name in re.findall(r'"InputName":\s*"([^"]+)"', part))
    return found


def uses(value: Any, name: str) -> bool:
    """Whether a JSON value has the placeholder `{{$.name}}` in one of its strings."""
    if isinstance(value, str):
        return "{{$." + name + "}}" in value or (name == "workspace_path" and WORKSPACE_MOUNT in value)
    if isinstance(value, list):
        return any(uses(item, name) for item in value)
    return isinstance(value, Mapping) and any(uses(item, name) for item in value.values())


def local_path(uri: str) -> str:
    """Where a step finds the artifact at `uri`: the path itself when local, kfp's mount path when remote."""
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    for scheme, mount in _REMOTE.items():
        if uri.startswith(scheme):
            return mount + uri.removeprefix(scheme)
    return uri


def _lookup(path: str | None, context: Context) -> tuple[bool, Any]:
    """(whether `path` is a placeholder that we know, its value)."""
    if not path:
        return True, context.executor_input
    if path in context.constants:
        return True, context.constants[path]
    outputs = context.executor_input.get("outputs", {})
    if path in ("outputs.output_file", "outputMetadataUri"):
        return True, outputs.get("outputFile", "")
    if "json_escape" in path:
        raise SpecError(
            f"the placeholder {{{{$.{path}}}}} (json_escape) exists on Vertex AI only; pass the value plainly"
        )
    parts = _parts(path)
    if len(parts) < 3 or parts[0] not in ("inputs", "outputs"):
        return False, None
    if parts[1] == "parameters":
        if parts[0] == "inputs":
            return True, _dig(context.executor_input.get("inputs", {}).get("parameterValues", {}), parts[2:])
        return True, outputs.get("parameters", {}).get(parts[2], {}).get("outputFile")
    if parts[1] == "artifacts":
        artifacts = context.executor_input.get(parts[0], {}).get("artifacts", {}).get(parts[2], {}).get("artifacts")
        if len(parts) == 3 and parts[0] == "inputs" and parts[2] in context.lists:
            return True, artifacts or []
        return True, _artifact_property(artifacts[0], parts[3:]) if artifacts else None
    return False, None


def _artifact_property(artifact: Mapping[str, Any], parts: list[str]) -> Any:
    if not parts:
        return artifact
    if parts[0] == "path":
        return artifact.get("customPath") or local_path(artifact.get("uri", ""))
    return _dig(artifact, parts)


def _dig(value: Any, parts: list[str]) -> Any:
    for part in parts:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _parts(path: str) -> list[str]:
    return [name or single or double for name, single, double in _PART.findall(path)]


def _structure(part: Any, context: Context) -> Any:
    """A Concat or IfPresent, given as JSON text or as its value, reduced to a string, a list, or None."""
    if isinstance(part, str):
        if not part.startswith(('{"Concat":', '{"IfPresent":')):
            return part
        part = json.loads(part)
    if "Concat" in part:
        pieces = [_structure(piece, context) for piece in part["Concat"]]
        return "".join(text for piece in pieces for text in _flatten(piece))
    body = part["IfPresent"]
    branch = body["Then"] if _is_given(body["InputName"], context) else body.get("Else")
    if isinstance(branch, list):
        return [_structure(item, context) for item in branch]
    return None if branch is None else _structure(branch, context)


def _is_given(name: str, context: Context) -> bool:
    inputs = context.executor_input.get("inputs", {})
    if inputs.get("parameterValues", {}).get(name) is not None:
        return True
    return bool(inputs.get("artifacts", {}).get(name, {}).get("artifacts"))


def _flatten(value: Any) -> list[str]:
    if value is None:
        return []
    return [text for item in value for text in _flatten(item)] if isinstance(value, list) else [value]
