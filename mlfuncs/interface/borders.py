"""How Python types look at the JSON border: pydantic for what it knows, a `Border` for the types of data science.

What is read and written for each type that pydantic does not know:

    numpy array              nested lists of numbers, strings or booleans; null is NaN in an array of floats
    numpy scalar             a JSON number, boolean or string
    pandas, polars, pyarrow  {"column": [values]}; a list of row objects is read too; the index does not travel
    pandas Series            a list of values
    bytes                    base64 text (RFC 4648, section 4)
    NamedTuple               an object with one member per field
    matplotlib figure        "data:image/png;base64,..." (written only)
    estimators, other types  none: Python callers and artifacts only

JSON has no NaN: a float that is NaN or infinite is written as null, as JSON.stringify and pandas do, and the literals
NaN and Infinity are refused when read.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import typing_extensions
from pydantic import BeforeValidator, TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import PydanticCustomError, core_schema

from mlfuncs.errors import SignatureError
from mlfuncs.interface import frames
from mlfuncs.interface.hints import unaliased, with_args
from mlfuncs.results import data_url


@dataclass(frozen=True, eq=False)  # by identity: typing hashes what annotates a type
class Border:
    """A type pydantic does not know: its instance check, its JSON Schema, and how JSON is read and written.

    `read` takes parsed JSON and raises ValueError with what is wrong; `write` gives JSON values. None for either means
    that there is no such direction.
    """

    kind: type
    name: str
    schema: Mapping[str, Any]
    read: Callable[[Any], Any] | None
    write: Callable[[Any], Any] | None
    check: Callable[[Any], None] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        read = core_schema.no_info_after_validator_function(self._from_json, core_schema.any_schema())
        return core_schema.json_or_python_schema(
            json_schema=read,
            python_schema=core_schema.no_info_plain_validator_function(self._from_python),
            serialization=core_schema.plain_serializer_function_ser_schema(self._to_json),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        if self.read is None and self.write is None:
            raise SignatureError(self.advice())
        return dict(self.schema)

    def advice(self) -> str:
        """What to do about a type that has no JSON form."""
        return (
            f"{self.name} has no JSON form and cannot come or go over HTTP; bind it when deploying (a class with "
            "__init__(self, model) and .deploy(model=...)), or use a dataclass, a pydantic model or plain values"
        )

    def _from_json(self, value: Any) -> Any:
        if self.read is None:
            raise PydanticCustomError("no_json_form", "{advice}", {"advice": self.advice()})
        try:
            return self.read(value)
        except (ValueError, TypeError, OverflowError) as exc:
            message = f"should be {self.name}: {exc}"
            raise PydanticCustomError("border", "{message}", {"message": message}) from exc

    def _from_python(self, value: Any) -> Any:
        if not isinstance(value, self.kind):
            message = f"should be {self.name}, not {type(value).__name__}"
            raise PydanticCustomError("border", "{message}", {"message": message})
        if self.check is not None:
            try:
                self.check(value)
            except ValueError as exc:
                raise PydanticCustomError("border", "{message}", {"message": str(exc)}) from exc
        return value

    def _to_json(self, value: Any) -> Any:
        if self.write is None:
            raise SignatureError(self.advice())
        if not isinstance(value, self.kind):
            raise ValueError(f"expected {self.name}, got {type(value).__name__}")
        return self.write(value)


def adapt(annotation: Any) -> Any:
    """`annotation` with each type that pydantic does not know, at any depth, annotated by its `Border`."""
    return _Adapter().adapt(annotation)


def python_only(annotation: Any) -> list[Border]:
    """The borders in an adapted annotation that have no JSON form at all."""
    if isinstance(annotation, Border):
        return [annotation] if annotation.read is None and annotation.write is None else []
    if typing.get_origin(annotation) is typing.Annotated:
        parts: tuple[Any, ...] = (annotation.__origin__, *annotation.__metadata__)
    else:
        parts = typing.get_args(annotation)
    return [border for part in parts for border in python_only(part)]


class _Adapter:
    """One walk over an annotation; remembers the classes it is inside of, so that recursive types end."""

    def __init__(self) -> None:
        self._inside: set[type] = set()

    def adapt(self, annotation: Any) -> Any:
        if annotation is inspect.Parameter.empty or annotation is object:
            return Any
        annotation = unaliased(annotation)
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            inner = self.adapt(args[0])
            return annotation if inner is args[0] else typing.Annotated[(inner, *annotation.__metadata__)]
        if origin is typing.Literal:
            return _without_bools(annotation, args)
        border = _border_of(origin or annotation, args)
        if border is not None:
            return typing.Annotated[annotation, border]
        if args:
            return self._generic(annotation, args)
        return self._class(annotation) if inspect.isclass(annotation) else annotation

    def _generic(self, annotation: Any, args: tuple[Any, ...]) -> Any:
        changed = tuple(self.adapt(arg) if arg is not Ellipsis and not isinstance(arg, list) else arg for arg in args)
        if all(new is old for new, old in zip(changed, args, strict=True)):
            return annotation
        return with_args(annotation, changed)

    def _class(self, cls: type) -> Any:
        if cls in self._inside or hasattr(cls, "__get_pydantic_core_schema__") or cls.__module__ == "builtins":
            return cls
        if issubclass(cls, enum.Enum):
            return _without_bools(cls, [member.value for member in cls])
        self._inside.add(cls)
        try:
            if issubclass(cls, tuple) and hasattr(cls, "_fields"):
                return self._record(cls, cls._fields, getattr(cls, "_field_defaults", {}))
            if typing_extensions.is_typeddict(cls):
                return self._typed_dict(cls)
            if dataclasses.is_dataclass(cls):
                return self._dataclass(cls)
            return cls if _known(cls) else typing.Annotated[cls, _unknown(cls)]
        finally:
            self._inside.discard(cls)

    def _dataclass(self, cls: type) -> Any:
        fields = [field for field in dataclasses.fields(cls) if field.init]
        hints = typing.get_type_hints(cls, include_extras=True)
        if all(self.adapt(hints[field.name]) is hints[field.name] for field in fields):
            return cls
        missing = dataclasses.MISSING
        optional = [f.name for f in fields if f.default is not missing or f.default_factory is not missing]
        return self._record(cls, [field.name for field in fields], optional)

    def _record(self, cls: Any, names: Any, optional: Any) -> Any:
        """A class of named fields as a JSON object, built by calling the class with what was sent."""
        hints = typing.get_type_hints(cls, include_extras=True)
        shape = {name: self.adapt(hints.get(name, Any)) for name in names}
        for name in optional:
            shape[name] = typing_extensions.NotRequired[shape[name]]
        return typing.Annotated[cls, _Record(cls, tuple(names), object_type(cls.__name__, shape))]

    def _typed_dict(self, cls: Any) -> Any:
        shape = {name: self.adapt(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}
        for name in cls.__optional_keys__:
            shape[name] = typing_extensions.NotRequired[shape[name]]
        return object_type(cls.__name__, shape)


@dataclass(frozen=True, eq=False)
class _Record:
    """A NamedTuple, or a dataclass with fields that pydantic does not know, as an object with one member a field."""

    cls: Any
    names: tuple[str, ...]
    shape: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        inner = handler.generate_schema(self.shape)
        build = core_schema.no_info_after_validator_function(lambda values: self.cls(**values), inner)
        return core_schema.json_or_python_schema(
            json_schema=build,
            python_schema=core_schema.is_instance_schema(self.cls),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: {name: getattr(value, name) for name in self.names}, return_schema=inner
            ),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return handler(schema["json_schema"]["schema"])


def object_type(name: str, shape: Mapping[str, Any]) -> Any:
    """A TypedDict that refuses members it does not name, and floats that are not finite."""
    make: Any = typing_extensions.TypedDict
    made = make(name, dict(shape))
    made.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
    return made


def _without_bools(annotation: Any, values: Iterable[Any]) -> Any:
    """A Literal or Enum of numbers that does not take true for 1, as Python's equality does."""
    values = list(values)
    if any(isinstance(value, bool) for value in values) or not any(isinstance(value, int) for value in values):
        return annotation

    def refuse_bool(value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticCustomError("border", "should be one of {values}, not a boolean", {"values": str(values)})
        return value

    return typing.Annotated[annotation, BeforeValidator(refuse_bool)]


def _border_of(cls: Any, args: tuple[Any, ...]) -> Border | None:
    if cls is bytes:
        return Border(
            bytes, "base64 text", {"type": "string", "contentEncoding": "base64"}, _read_base64, _write_base64
        )
    if not inspect.isclass(cls):
        return None
    border = frames.describe(cls, args)
    if border is not None:
        return Border(*border)
    figure = sys.modules.get("matplotlib.figure")
    if figure is not None and issubclass(cls, figure.Figure):
        return Border(cls, "a matplotlib figure", {"type": "string", "format": "data-url"}, None, data_url)
    if hasattr(cls, "fit") and hasattr(cls, "get_params"):
        return Border(cls, f"a {cls.__name__} (an estimator)", {}, None, None)
    return None


def _known(cls: type) -> bool:
    """Whether pydantic can make a schema of `cls` by itself."""
    try:
        TypeAdapter(cls)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return False
    except NameError:  # a model whose own forward references are not ready is pydantic's all the same
        return True
    return True


def _unknown(cls: type) -> Border:
    return Border(cls, f"a {cls.__name__} object", {}, None, None)


def _read_base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"got {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error as exc:
        raise ValueError(str(exc)) from exc


def _write_base64(value: bytes) -> str:
    return base64.b64encode(value).decode()
