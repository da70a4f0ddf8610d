"""Parameter values between steps: converted to their declared kfp type, with integers kept integers.

A pipeline file holds every number as a protobuf double (`3.0` for 3), so a whole number that comes from the file into
an integer, a list or a struct becomes an int again. A value that a step produced is JSON text and is kept as written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlfuncs.errors import InvalidInput
from mlfuncs_pipelines.ir import Parameter

_WORDS = {
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a list",
    "STRUCT": "a dict",
}


def coerce(value: Any, kind: str, what: str) -> Any:
    """`value` as the kfp parameter type `kind`; null and unknown kinds pass. Raises InvalidInput naming `what`.

    >>> coerce(3.0, "NUMBER_INTEGER", "n"), coerce([1], "STRING", "s"), coerce("[1]", "LIST", "xs")
    (3, '[1]', [1])
    """
    if value is None or (kind not in _WORDS and kind != "STRING"):
        return value
    if kind == "STRING":
        return value if isinstance(value, str) else json.dumps(value)
    parsed = _parse(value, kind) if isinstance(value, str) else value
    if kind == "BOOLEAN" and isinstance(parsed, bool):
        return parsed
    if kind == "NUMBER_INTEGER" and _is_number(parsed) and parsed == int(parsed):
        return int(parsed)
    if kind == "NUMBER_DOUBLE" and _is_number(parsed):
        return float(parsed)
    if (kind == "LIST" and isinstance(parsed, list)) or (kind == "STRUCT" and isinstance(parsed, dict | list)):
        return parsed
    message = f"{what} must be {_WORDS[kind]} ({kind}), not {value!r} ({type(value).__name__})"
    raise InvalidInput(message, [{"field": what, "message": f"must be {_WORDS[kind]}"}])


def from_file(value: Any) -> Any:
    """`value` of a pipeline file with the whole numbers in it as ints.

    >>> from_file({"layers": [64.0, 2.5]})
    {'layers': [64, 2.5]}
    """
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [from_file(item) for item in value]
    if isinstance(value, Mapping):
        return {key: from_file(item) for key, item in value.items()}
    return value


def check_literal(value: Any, parameter: Parameter, what: str) -> None:
    """Raise InvalidInput when `parameter` lists the values it takes and `value` is none of them."""
    if parameter.literals and value is not None and value not in parameter.literals:
        allowed = ", ".join(repr(from_file(item)) for item in parameter.literals)
        raise InvalidInput(f"{what} must be one of {allowed}, not {value!r}", [{"field": what, "message": allowed}])


def _parse(text: str, kind: str) -> Any:
    try:
        return json.loads(text.lower() if kind == "BOOLEAN" else text)
    except json.JSONDecodeError:
        return None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == value and value not in (float("inf"), float("-inf"))
