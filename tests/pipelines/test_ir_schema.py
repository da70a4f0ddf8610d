"""Our table of the pipeline file's fields is the protobuf schema that kfp ships."""

from __future__ import annotations

from typing import Any

from mlfuncs_pipelines.ir_schema import MESSAGES, ONE_OF

_SCALARS = {1: "number", 3: "integer", 5: "integer", 8: "boolean", 9: "string"}
_WELL_KNOWN = {
    "google.protobuf.Struct": "struct",
    "google.protobuf.Value": "any",
    "google.protobuf.Duration": "duration",
}


def _kind(field: Any) -> str:
    if field.message_type is not None:
        known = _WELL_KNOWN.get(field.message_type.full_name)
        return known or _name(field.message_type)
    if field.enum_type is not None:
        return "enum:" + "|".join(value.name for value in field.enum_type.values)
    return _SCALARS[field.type]


def _name(message: Any) -> str:
    parts = message.full_name.removeprefix("ml_pipelines.").split(".")
    return "".join(parts) if parts[-1] in ("ArtifactSpec", "ParameterSpec", "ItemsSpec") else parts[-1]


def _walk(message: Any, seen: dict[str, dict[str, str]], groups: dict[str, list[list[str]]]) -> None:
    if message.full_name in _WELL_KNOWN or _name(message) in seen:
        return
    fields: dict[str, str] = {}
    seen[_name(message)] = fields
    for field in message.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            fields[field.json_name] = "{" + _kind(value) + "}"
            if value.message_type is not None:
                _walk(value.message_type, seen, groups)
            continue
        fields[field.json_name] = f"[{_kind(field)}]" if field.is_repeated else _kind(field)
        if field.message_type is not None:
            _walk(field.message_type, seen, groups)
    alternatives: dict[str, list[str]] = {}
    for field in message.fields:
        if field.containing_oneof is not None and not field.containing_oneof.name.startswith("_"):
            alternatives.setdefault(field.containing_oneof.name, []).append(field.json_name)
    if alternatives:
        groups[_name(message)] = list(alternatives.values())


def test_table_equals_the_descriptor_of_kfp() -> None:
    from kfp.pipeline_spec import pipeline_spec_pb2 as pb

    seen: dict[str, dict[str, str]] = {}
    groups: dict[str, list[list[str]]] = {}
    for root in (pb.PipelineSpec, pb.PipelineDeploymentConfig, pb.PlatformSpec):
        _walk(root.DESCRIPTOR, seen, groups)
    seen["PipelineSpec"]["deploymentSpec"] = "PipelineDeploymentConfig"  # a Struct there, this message by agreement
    assert seen == MESSAGES
    assert groups == ONE_OF
