"""What is wrong with an input, told by the path of each field: pydantic's errors in our words."""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput

if TYPE_CHECKING:
    from pydantic import ValidationError

_MAX_SHOWN = 5  # fields named in the message itself; `fields` has them all
_MAX_VALUE = 60  # characters of an offending value


def invalid_input(what: str, error: ValidationError, schema: Mapping[str, Any], prefix: str = "") -> InvalidInput:
    """The InvalidInput for `error` of a value described by JSON Schema `schema`; paths start at `prefix`."""
    messages: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        names, known = _path(detail["loc"], schema)
        if detail["type"] == "json_invalid":
            messages.setdefault("body", []).append(f"is not JSON: {detail['ctx']['error']}")
            continue
        field = ".".join(([prefix] if prefix else []) + names) or "body"
        message = _message(detail, names[-1] if names else "", known)
        if message not in messages.setdefault(field, []):
            messages[field].append(message)
    fields = [{"field": field, "message": _either(found)} for field, found in messages.items()]
    return refuse(what, fields)


def refuse(what: str, fields: list[dict[str, str]]) -> InvalidInput:
    """InvalidInput with one sentence for `fields`, each {"field", "message"}."""
    shown = "; ".join(f"{entry['field']} {entry['message']}" for entry in fields[:_MAX_SHOWN])
    more = f"; and {len(fields) - _MAX_SHOWN} more" if len(fields) > _MAX_SHOWN else ""
    return InvalidInput(f"{what} is not valid: {shown}{more}", fields)


def _message(detail: Any, name: str, known: list[str]) -> str:
    kind, message = detail["type"], detail["msg"]
    if kind in ("missing", "missing_argument"):
        return "is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown(name, known)
    if kind in ("border", "no_json_form"):
        return str(message)
    if kind == "dict_type" and not detail["loc"]:
        return f"should be an object of the named parameters, not {_show(detail['input'])}"
    message = message.removeprefix("Input ")
    noun = message.removeprefix("should be a valid ").removeprefix("should be an instance of ")
    if noun != message:
        message = f"should be {_article(noun)}"
    message = message[:1].lower() + message[1:]
    return f"{message}, not {_show(detail['input'])}"


def _either(messages: list[str]) -> str:
    """One sentence for what each member of a union said of the same value."""
    if len(messages) == 1:
        return messages[0]
    parts = [message.rpartition(", not ") for message in messages]
    if len({value for _, _, value in parts}) == 1 and all(head.startswith("should be ") for head, _, _ in parts):
        heads = [parts[0][0], *(head.removeprefix("should be ") for head, _, _ in parts[1:])]
        return f"{' or '.join(heads)}, not {parts[0][2]}"
    return "; or ".join(messages)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def _show(value: Any) -> str:
    import json

    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def _path(loc: tuple[int | str, ...], schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The field's path without pydantic's labels for union members, and the names known where it ends."""
    names: list[str] = []
    nodes = _expand(schema, schema)
    for step in loc:
        children = [child for node in nodes for child in _child(node, step)]
        if not children and _is_label(step, nodes):
            continue
        names.append(str(step))
        parents, nodes = nodes, [leaf for child in children for leaf in _expand(child, schema)]
        if not children:
            return names, sorted({name for node in parents for name in node.get("properties", ())})
    return names, sorted({name for node in nodes for name in node.get("properties", ())})


def _expand(node: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> list[Mapping[str, Any]]:
    """The alternatives that `node` stands for, with references followed."""
    if depth > 32:
        return []
    if "$ref" in node:
        target: Any = root
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target.get(part, {})
        return _expand(target, root, depth + 1)
    members = [member for key in ("anyOf", "oneOf", "allOf") for member in node.get(key, ())]
    return [leaf for member in members for leaf in _expand(member, root, depth + 1)] if members else [node]


def _child(node: Mapping[str, Any], step: int | str) -> list[Mapping[str, Any]]:
    if isinstance(step, int):
        prefix = node.get("prefixItems", [])
        if step < len(prefix):
            return [prefix[step]]
        items = node.get("items")
        return [items] if isinstance(items, dict) else [{}] if node.get("type") == "array" else []
    if step in node.get("properties", {}):
        return [node["properties"][step]]
    extra = node.get("additionalProperties")
    return [extra] if isinstance(extra, dict) else [{}] if extra is True else []


def _is_label(step: int | str, nodes: list[Mapping[str, Any]]) -> bool:
    """Whether `step` names a union member (`int`, `list[float]`, a model) rather than a member of the value."""
    if isinstance(step, int):
        return False
    return step == "[key]" or len(nodes) > 1 or not any("properties" in node for node in nodes)


def unknown_and_missing(what: str, values: Mapping[str, Any], names: Sequence[str], optional: Container[str]) -> None:
    """Raise InvalidInput when `values` has a name that is not in `names`, or lacks one that is not `optional`."""
    fields = [{"field": name, "message": _unknown(name, list(names))} for name in values if name not in names]
    fields += [
        {"field": name, "message": "is missing"} for name in names if name not in values and name not in optional
    ]
    if fields:
        raise refuse(what, fields)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}" if known else "it takes no fields"
    return f"is unknown; {hint}"
