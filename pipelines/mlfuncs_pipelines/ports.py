"""A function's parameters and results as inputs and outputs of a kfp component.

int, float, str, bool, list[...], dict[...]       parameters of kfp's own types
Enum, Literal, datetime, dataclass, pydantic      parameters too: their JSON, as STRUCT, STRING or a number
tables and arrays                                 system.Dataset
estimators                                        system.Model
ml.Metrics, ml.ClassificationMetrics              system.Metrics, system.ClassificationMetrics
ml.HTML and figures, ml.Markdown                  system.HTML, system.Markdown
pathlib.Path (as a result), bytes, anything else  system.Artifact
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from mlfuncs.errors import InvalidInput, SignatureError
from mlfuncs.interface.signature import Parameter, Signature
from mlfuncs_pipelines.type_forms import Form, is_artifact_list
from mlfuncs_pipelines.type_forms import classify as classify
from mlfuncs_pipelines.type_forms import strip_optional as strip_optional

SCHEMA_VERSION = "0.0.1"


@dataclass(frozen=True)
class Port:
    """One input or output: how its value travels. `kind` is a kfp parameter type or an artifact's schema title."""

    name: str
    hint: Any
    form: Form
    kind: str
    is_list: bool = False
    optional: bool = False
    default: Any = None  # the default as JSON, for a parameter that has one

    @property
    def type_name(self) -> str:
        """The Python type as a user writes it."""
        return getattr(self.hint, "__name__", None) or str(self.hint).replace("typing.", "")


def input_ports(signature: Signature) -> dict[str, Port]:
    """The inputs of a component, in the order of the function's parameters."""
    if signature.kind == "nuclio":
        raise SignatureError(f"{signature.name} is a Nuclio handler, which has no parameters to make a step of")
    return {parameter.name: _input_port(parameter) for parameter in signature.parameters}


def output_ports(signature: Signature) -> dict[str, Port]:
    """The outputs of a component: the fields of a NamedTuple, else "Output"; none for a function that returns None."""
    returns = signature.returns
    if returns in (None, type(None)):
        return {}
    if inspect.isclass(returns) and issubclass(returns, tuple) and hasattr(returns, "_fields"):
        hints = typing.get_type_hints(returns)
        return {name: output_port(name, hints.get(name, Any)) for name in returns._fields}
    return {"Output": output_port("Output", returns)}


def output_port(name: str, hint: Any) -> Port:
    """The output `name` of type `hint`."""
    inner, optional = strip_optional(hint)
    form, kind = classify(inner)
    if inner is Path:
        form, kind = "artifact", "system.Artifact"
    return Port(name, hint, form, kind, optional=optional)


def artifact_port(port: Port, kind: str, is_list: bool) -> Port:
    """The input `port` when it is given an artifact of the schema title `kind`."""
    return dataclasses.replace(port, form="artifact", kind=kind, is_list=is_list, default=None)


def value_port(port: Port, kind: str) -> Port:
    """The input `port` when it is given a parameter of the kfp type `kind` as it is."""
    return dataclasses.replace(port, form="value", kind=kind, default=None)


def _input_port(parameter: Parameter) -> Port:
    inner, optional = strip_optional(parameter.annotation)
    form, kind = classify(inner)
    if inner is Any:
        form, kind = "json", "STRING"  # until it is known what it is given
    port = Port(parameter.name, parameter.annotation, form, kind)
    if inner is not Any and is_artifact_list(inner):
        element = classify(typing.get_args(inner)[0])[1]
        port = dataclasses.replace(port, form="artifact", kind=element, is_list=True)
    if parameter.required:
        return dataclasses.replace(port, optional=optional)
    default = None
    if port.form != "artifact" and parameter.default is not None:
        default = encode_constant(port, parameter.default)
    return dataclasses.replace(port, optional=True, default=default)


def encode_constant(port: Port, value: Any) -> Any:
    """`value` as it is written into the pipeline file. Raises InvalidInput when it does not fit the type."""
    if type(value) is port.hint and port.hint in (int, str, bool):
        return value
    checker, writer = _border(port.name, port.hint)
    try:
        checked = checker.check({port.name: value})[port.name]
    except InvalidInput:
        if not isinstance(value, dict | list | str):
            raise
        checked = _from_json(port, value)  # a record or choice written as its JSON
    text = _written(port, writer, checked)
    return text.decode() if port.form == "json" else json.loads(text)


def decode_value(port: Port, value: Any) -> Any:
    """The Python value of a parameter that a step received as JSON. Raises InvalidInput, naming the input."""
    if value is None and port.optional:
        return None
    if port.form == "value" and type(value) is port.hint and port.hint in (int, str, bool, float):
        return value
    text = value.encode() if port.form == "json" else json.dumps(value).encode()
    body = b'{"' + port.name.encode() + b'":' + text + b"}"
    return _reader(port).read(body)[port.name]


def _from_json(port: Port, value: Any) -> Any:
    try:
        body = json.dumps({port.name: value})
    except TypeError as exc:
        raise InvalidInput(f"{port.name}: {value!r} is no {port.type_name}, and has no JSON that could be one") from exc
    return _reader(port).read(body.encode())[port.name]


def encode_value(port: Port, value: Any) -> Any:
    """A result as the JSON value of an output parameter. Raises InvalidInput when it is not what was declared."""
    if type(value) is port.hint and port.hint in (int, str, bool):
        return value
    text = _written(port, _border(port.name, port.hint)[1], value)
    return text.decode() if port.form == "json" else json.loads(text)


def _written(port: Port, writer: Any, value: Any) -> bytes:
    """The JSON of `value`. Raises InvalidInput for NaN and infinity, which would be null there."""
    text: bytes = writer.write(value)
    if b"null" in text and _has_no_json(to_jsonable_python(value, inf_nan_mode="constants", fallback=str)):
        raise InvalidInput(
            f"{port.name}: {str(value)[:80]} is or holds NaN or infinity, which a pipeline's parameters cannot carry; "
            f"use None with a type like float | None, or an array or table",
            [{"field": port.name, "message": "NaN or infinity"}],
        )
    return text


def _has_no_json(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_no_json, value.values()))
    if isinstance(value, list):
        return any(map(_has_no_json, value))
    return isinstance(value, float) and not math.isfinite(value)


def build_borders(ports: list[Port]) -> None:
    """Build the validators of parameters ahead of their use."""
    for port in ports:
        if port.form != "artifact":
            _border(port.name, port.hint)
            _reader(port)


# validators by name and type; the type is kept beside them, so that its id stays its own
_BORDERS: dict[Any, Any] = {}


def _border(name: str, hint: Any) -> tuple[Any, Any]:
    from mlfuncs.interface.validation import Checker, Writer

    key = (name, id(hint))
    if key not in _BORDERS:
        _BORDERS[key] = Checker(name, (_required(name, hint),)), Writer(name, hint), hint
    checker, writer, _ = _BORDERS[key]
    return checker, writer


def _reader(port: Port) -> Any:
    from mlfuncs.interface.validation import Reader

    key = ("reader", port.name, id(port.hint))
    if key not in _BORDERS:
        _BORDERS[key] = Reader("the step", (_required(port.name, port.hint),), None), port.hint
    return _BORDERS[key][0]


def _required(name: str, hint: Any) -> Parameter:
    return Parameter(name, hint, Parameter.empty, "keyword")
