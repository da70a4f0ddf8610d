"""A signature as an OpenAPI 3.1 document: one POST that takes the input schema and answers the output schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlfuncs.interface.signature import Signature

_COMPONENTS = "#/components/schemas/"
_PROBLEM = {
    "title": "Problem",
    "description": "A problem document (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What happened, with which value, and how to mend it."},
        "request_id": {"type": "string", "description": "Finds the request in the endpoint's log."},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
# status -> what it means here, and whether Retry-After comes with it
_PROBLEMS = {
    "413": ("The body is too large.", False),
    "422": ("The body does not fit the schema; `errors` names each field.", False),
    "429": ("Too many requests.", True),
    "500": ("The function raised; the log has the traceback under the request id.", False),
    "503": ("No worker is ready.", True),
    "504": ("The function took longer than its timeout.", False),
}


def openapi(signature: Signature, name: str, version: str, doc: str | None = None) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an endpoint called `name`, served beside the endpoint as openapi.json.

    `version` is the function's or revision's. `doc` defaults to the function's docstring; its first line sums up the
    operation. Raises SignatureError when a type has no JSON form.
    """
    doc = (signature.doc if doc is None else doc).strip()
    components: dict[str, Any] = {"Problem": _PROBLEM}
    body = _hoist(signature.input_schema(), components, "")
    result = _hoist(signature.output_schema(), components, "Result")
    responses: dict[str, Any] = {"200": {"description": _result_note(result), "content": _content(signature, result)}}
    for status, (meaning, retry) in _PROBLEMS.items():
        responses[status] = _problem(meaning, retry)
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": doc.splitlines()[0] if doc else name,
        "requestBody": {"required": _needs_body(body), "content": _content(signature, body)},
        "responses": responses,
    }
    if signature.body_model is not None:
        wrapped = f'{{"{signature.body_model.name}": {{...}}}}'
        operation["requestBody"]["description"] = f"The object itself; {wrapped} is taken as well."
    info = {"title": name, "version": version, **({"description": doc} if doc else {})}
    return {
        "openapi": "3.1.0",
        "info": info,
        "servers": [{"url": "."}],  # relative to this document, so that it holds behind any prefix
        "paths": {"/": {"post": operation}},
        "components": {"schemas": components},
    }


def _content(signature: Signature, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"*/*": {}} if signature.kind == "nuclio" else {"application/json": {"schema": schema}}


def _needs_body(body: Mapping[str, Any]) -> bool:
    return "$ref" in body or bool(body.get("required"))


def _result_note(result: Mapping[str, Any]) -> str:
    note = "The function's result."
    return f"{note} A number that is NaN or infinite is null." if "number" in str(result) else note


def _problem(meaning: str, retry: bool) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": meaning,
        "content": {"application/problem+json": {"schema": {"$ref": f"{_COMPONENTS}Problem"}}},
    }
    if retry:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}
    return response


def _hoist(schema: Mapping[str, Any], components: dict[str, Any], suffix: str) -> dict[str, Any]:
    """`schema` with its $defs moved into `components`; a name that is taken by another schema gets `suffix`."""
    definitions = schema.get("$defs", {})
    names = dict(zip(definitions, definitions, strict=True))
    moved = {name: _renamed(definition, names) for name, definition in definitions.items()}
    for name, definition in moved.items():
        if components.get(name, definition) != definition:
            names[name] = f"{name}{suffix or 'Input'}"
    for name, definition in definitions.items():
        components[names[name]] = _renamed(definition, names)
    return dict(_renamed({key: value for key, value in schema.items() if key != "$defs"}, names))


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    changed = {key: _renamed(value, names) for key, value in node.items()}
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/$defs/"):
        changed["$ref"] = _COMPONENTS + names[reference.removeprefix("#/$defs/")]
    return changed
