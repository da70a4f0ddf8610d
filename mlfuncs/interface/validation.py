"""The compiled validators and encoders behind a signature: one pydantic-core call each way."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import orjson
import typing_extensions
from pydantic import BaseModel, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from mlfuncs.errors import SignatureError
from mlfuncs.interface.borders import adapt, object_type, python_only
from mlfuncs.interface.frames import fallback, plain
from mlfuncs.interface.violations import invalid_input, refuse, unknown_and_missing

if TYPE_CHECKING:
    from mlfuncs.interface.signature import Parameter

_ORJSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS


class Reader:
    """Reads JSON bodies into keyword arguments."""

    def __init__(self, name: str, parameters: Sequence[Parameter], body_model: Parameter | None) -> None:
        self._what = f"the input of {name}"
        shape = {p.name: _adapted(p, f"parameter {p.name!r} of {name}") for p in parameters}
        _refuse_python_only(name, parameters, shape)
        for parameter in parameters:
            if not parameter.required:
                shape[parameter.name] = typing_extensions.NotRequired[shape[parameter.name]]
        self._named = _build(object_type("Input", shape), self._what)
        self._validate = self._named.validator.validate_json
        self._extra = _extra_rule([p.annotation for p in parameters])
        self._parameters = parameters
        self._model = body_model
        if body_model is not None:
            self._whole = _build(shape[body_model.name], self._what)
            self._name_in_body = None if body_model.name in _field_names(body_model.annotation) else body_model.name

    def read(self, body: bytes) -> dict[str, Any]:
        """The values in `body`; an empty body is an empty object. Raises InvalidInput."""
        body = body or b"{}"
        if b"NaN" in body or b"Infinity" in body:
            self._refuse_nan(body)
        if self._model is not None and not self._is_named(body):
            return {self._model.name: self._read_whole(body)}
        try:
            return self._validate(body, strict=True, extra=self._extra)
        except ValidationError as exc:
            raise invalid_input(self._what, exc, self._named_schema) from None

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the body, defaults included."""
        return _schema(self._whole, "validation") if self._model is not None else self._named_schema

    @cached_property
    def _named_schema(self) -> dict[str, Any]:
        schema = _schema(self._named, "validation")
        for parameter in self._parameters:
            if not parameter.required:
                try:
                    default = to_jsonable_python(parameter.default, inf_nan_mode="null", fallback=fallback)
                except (TypeError, ValueError, PydanticSerializationError):
                    continue  # a default that JSON cannot say is left out of the description
                properties = schema["properties"]
                properties[parameter.name] = {**properties[parameter.name], "default": default}
        return schema

    def _read_whole(self, body: bytes) -> Any:
        assert self._model is not None
        try:
            return self._whole.validator.validate_json(body, strict=True, extra=self._extra)
        except ValidationError as exc:
            raise invalid_input(self._what, exc, self.schema, self._model.name) from None

    def _is_named(self, body: bytes) -> bool:
        name = self._name_in_body
        if name is None or f'"{name}"'.encode() not in body:
            return False
        try:
            value = from_json(body)
        except ValueError:
            return False
        return isinstance(value, dict) and name in value

    def _refuse_nan(self, body: bytes) -> None:
        """Raise InvalidInput when NaN or Infinity stand in `body` as literals, not inside a string."""
        try:
            from_json(body)
        except ValueError:
            return  # not JSON for another reason, which the validator tells
        try:
            from_json(body, allow_inf_nan=False)
        except ValueError as exc:
            message = f"has NaN or Infinity, which JSON does not have; send null where it is allowed ({exc})"
            raise refuse(self._what, [{"field": "body", "message": message}]) from exc


class Checker:
    """Checks values that a Python caller gives, and hands on the very objects."""

    def __init__(self, name: str, parameters: Sequence[Parameter]) -> None:
        self._what = f"the input of {name}"
        self._names = [p.name for p in parameters]
        self._optional = {p.name for p in parameters if not p.required}
        self._numpy = {p.name for p in parameters if "numpy" in getattr(p.annotation, "__module__", "")}
        self._adapters = {p.name: _build(_adapted(p, f"parameter {p.name!r} of {name}"), name) for p in parameters}

    def check(self, values: typing.Mapping[str, Any]) -> dict[str, Any]:
        """`values` as they are, but for numpy scalars, which become Python's. Raises InvalidInput."""
        unknown_and_missing(self._what, values, self._names, self._optional)
        checked: dict[str, Any] = {}
        fields: list[dict[str, str]] = []
        for name, value in values.items():
            if _is_numpy_scalar(value) and name not in self._numpy:
                value = plain(value)
            try:
                taken = self._adapters[name].validator.validate_python(value, strict=True)
            except ValidationError as exc:
                fields += invalid_input(self._what, exc, _schema_or_any(self._adapters[name]), name).fields
                continue
            checked[name] = value if taken is value or taken == value else taken  # a dict given for a pydantic model
        if fields:
            raise refuse(self._what, fields)
        return checked


class Writer:
    """Encodes results as JSON."""

    def __init__(self, name: str, returns: Any) -> None:
        self._what = f"the result of {name}"
        self._any = returns is Any
        self._adapted = Any if self._any else _adapted_type(returns, self._what)
        self._adapter = _build(self._adapted, self._what)
        self._to_json = self._adapter.serializer.to_json

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the result."""
        return _schema(self._adapter, "serialization")

    def write(self, value: Any) -> bytes:
        """`value` as JSON. Raises InvalidInput when it is not what was declared or has no JSON form."""
        if self._any:
            return self._write_any(value)
        try:
            return self._to_json(value, warnings="error", fallback=fallback)
        except (PydanticSerializationError, ValueError, TypeError, AttributeError):
            return self._write_plain(value)

    def _write_any(self, value: Any) -> bytes:
        try:
            return orjson.dumps(value, fallback, _ORJSON)
        except TypeError:  # an integer beyond 64 bits, or a value that nothing can encode
            pass
        try:
            return to_json(value, fallback=fallback, inf_nan_mode="null")
        except (PydanticSerializationError, TypeError, ValueError) as exc:
            raise refuse(self._what, [{"field": "result", "message": str(exc)}]) from exc

    def _write_plain(self, value: Any) -> bytes:
        """The slow path: numpy values become Python's, then the value is validated as declared and encoded."""
        for border in python_only(self._adapted):
            raise SignatureError(f"{self._what}: {border.advice()}")
        try:
            checked = self._adapter.validator.validate_python(plain(value), strict=True)
            return self._to_json(checked, warnings="error", fallback=fallback)
        except ValidationError as exc:
            raise invalid_input(self._what, exc, _schema_or_any(self._adapter), "result") from None
        except (PydanticSerializationError, ValueError, TypeError, AttributeError) as exc:
            raise refuse(self._what, [{"field": "result", "message": str(exc)}]) from exc


def _is_numpy_scalar(value: Any) -> bool:
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item")


def _adapted(parameter: Parameter, what: str) -> Any:
    return _adapted_type(parameter.annotation, what)


def _adapted_type(annotation: Any, what: str) -> Any:
    try:
        return adapt(annotation)
    except (TypeError, NameError) as exc:
        raise SignatureError(f"the type of {what} cannot be used: {exc}") from exc


def _build(annotation: Any, what: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError) as exc:
        reason = str(exc).splitlines()[0]
        raise SignatureError(f"{what} has a type that cannot be validated: {reason}") from exc


def _schema(adapter: TypeAdapter[Any], mode: typing.Literal["validation", "serialization"]) -> dict[str, Any]:
    try:
        return adapter.json_schema(mode=mode)
    except PydanticUserError as exc:
        raise SignatureError(f"a type has no JSON Schema: {str(exc).splitlines()[0]}") from exc


def _schema_or_any(adapter: TypeAdapter[Any]) -> dict[str, Any]:
    try:
        return _schema(adapter, "validation")
    except SignatureError:
        return {}


def _refuse_python_only(name: str, parameters: Sequence[Parameter], shape: dict[str, Any]) -> None:
    for parameter in parameters:
        for border in python_only(shape[parameter.name]):
            if parameter.required:
                raise SignatureError(f"parameter {parameter.name!r} of {name}: {border.advice()}")


def _field_names(model: Any) -> set[str]:
    fields = getattr(model, "model_fields", None)
    if fields is None:
        return {field.name for field in dataclasses.fields(model)}
    aliases = {str(info.alias) for info in fields.values() if info.alias}
    return set(fields) | aliases | {str(i.validation_alias) for i in fields.values() if i.validation_alias}


def _extra_rule(annotations: Sequence[Any]) -> typing.Literal["forbid"] | None:
    """Unknown members are refused at every depth, unless a model among the types says by itself what to do."""
    seen: set[int] = set()

    def keeps_its_word(annotation: Any) -> bool:
        if id(annotation) in seen:
            return False
        seen.add(id(annotation))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation.model_config.get("extra") is not None:
                return True
            return any(keeps_its_word(field.annotation) for field in annotation.model_fields.values())
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return any(keeps_its_word(field.type) for field in dataclasses.fields(annotation))
        return any(keeps_its_word(arg) for arg in typing.get_args(annotation))

    return None if any(keeps_its_word(annotation) for annotation in annotations) else "forbid"
