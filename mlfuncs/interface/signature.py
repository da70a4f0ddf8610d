"""A callable's typed interface: JSON Schemas, strict validation at the border, encoding of results.

The border is strict: true is not 1, "1" is not 1, 1.0 is not an int, while 1 is a float; an unknown field is refused
and a missing one named. JSON has no NaN: the literals NaN and Infinity are refused, null is NaN only inside arrays and
tables, and a float result that is not finite is written as null.

A body is a JSON object with one member per parameter. A function whose only parameter is a pydantic model or a
dataclass without a default takes the model itself as the body too. Which of the two was sent is never guessed: an
object that has the parameter's name as a member is the named form, unless the model has a field of that name; then
only the model itself is taken.

Nothing here imports pydantic until a schema is needed.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mlfuncs.errors import InvalidInput, SignatureError
from mlfuncs.interface.hints import callable_of, remember_surroundings, resolved_hints

FunctionKind = Literal["function", "class", "nuclio"]
_EMPTY = inspect.Parameter.empty
_CACHE: weakref.WeakKeyDictionary[Any, Signature] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Parameter:
    """One named parameter: its type (Any when not annotated) and its default (`Parameter.empty` when required)."""

    name: str
    annotation: Any
    default: Any
    kind: str  # "positional" or "keyword"

    empty = _EMPTY

    @property
    def required(self) -> bool:
        """Whether a caller must give the parameter."""
        return self.default is _EMPTY


def check_signature(target: Any) -> None:
    """Raise SignatureError, saying what to write instead, when no interface can be made of `target`.

    >>> check_signature(lambda *rows: rows)
    Traceback (most recent call last):
    mlfuncs.errors.SignatureError: <lambda>(*rows) cannot be an interface: ...
    """
    function = callable_of(target)
    name = getattr(target, "__qualname__", type(target).__name__)
    for parameter in _parameters(target):
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise SignatureError(
                f"{name}(*{parameter.name}) cannot be an interface: callers send named values; "
                f"write one list instead, like {parameter.name}: list[float]"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            raise SignatureError(
                f"{name}(**{parameter.name}) cannot be an interface: each value needs a name and a type; "
                f"name the parameters, or take one dict, like {parameter.name}: dict[str, float]"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise SignatureError(
                f"{name}: parameter {parameter.name!r} is positional-only, but callers send names; remove the '/'"
            )
    remember_surroundings(function)


def function_kind(target: Any) -> FunctionKind:
    """What `target` is: a function, a class called per request, or a Nuclio handler (exactly `context, event`)."""
    target = getattr(target, "target", target) if type(target).__name__ == "Function" else target
    if inspect.isclass(target):
        return "class"
    return "nuclio" if [parameter.name for parameter in _parameters(target)] == ["context", "event"] else "function"


class Signature:
    """The interface of one callable. Schemas and validators are built on first use and then kept."""

    def __init__(self, target: Any) -> None:
        check_signature(target)
        self.kind: FunctionKind = function_kind(target)
        self.name = str(getattr(target, "__name__", type(target).__name__))
        self.doc = inspect.getdoc(target) or ""
        self._target = target
        self._names = tuple(parameter.name for parameter in _parameters(target))

    @classmethod
    def of(cls, target: Any) -> Signature:
        """The signature of a function, of a class's `__call__` without self, or of a Nuclio handler (no schema).

        Raises SignatureError when `target` has no interface.
        """
        target = getattr(target, "target", target) if type(target).__name__ == "Function" else target
        try:
            if target not in _CACHE:
                _CACHE[target] = cls(target)
            return _CACHE[target]
        except TypeError:  # not hashable, or not weakly referenceable
            return cls(target)

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return resolved_hints(self._target)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters in order, with their resolved types."""
        return tuple(
            Parameter(
                parameter.name,
                self._hints.get(parameter.name, Any),
                parameter.default,
                "keyword" if parameter.kind is parameter.KEYWORD_ONLY else "positional",
            )
            for parameter in _parameters(self._target)
        )

    @cached_property
    def returns(self) -> Any:
        """The resolved return type; Any when it is not annotated."""
        return self._hints.get("return", Any)

    @cached_property
    def body_model(self) -> Parameter | None:
        """The only parameter, when it is a required pydantic model or dataclass that may be the whole body."""
        if len(self.parameters) != 1 or not self.parameters[0].required:
            return None
        model = self.parameters[0].annotation
        is_model = inspect.isclass(model) and (hasattr(model, "model_fields") or dataclasses.is_dataclass(model))
        return self.parameters[0] if is_model else None

    def input_schema(self) -> dict[str, Any]:
        """The JSON Schema (2020-12) of the body: of the named parameters, or of the one body model itself.

        Raises SignatureError for a parameter whose type has no JSON form.
        """
        if self.kind == "nuclio":
            return {}
        return dict(self._reader.schema)

    def output_schema(self) -> dict[str, Any]:
        """The JSON Schema of the result. Raises SignatureError for a type that has no JSON form."""
        if self.kind == "nuclio":
            return {}
        return dict(self._writer.schema)

    def validate_json(self, body: bytes) -> dict[str, Any]:
        """The keyword arguments in a JSON body, with defaults filled in. Raises InvalidInput, naming each field."""
        values = self._reader.read(body)
        return {**self._defaults, **values} if self._defaults else values

    def validate_python(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` from a Python caller, checked as strictly but handed on as they are, with defaults filled in.

        A numpy scalar given for an int, float, bool or str becomes that Python value. Raises InvalidInput.
        """
        if self.kind == "nuclio":
            return dict(values)
        return {**self._defaults, **self._checker.check(values)}

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The named values of a Python call, defaults included. Raises InvalidInput where Python raises TypeError."""
        positional = [p.name for p in _parameters(self._target) if p.kind is not p.KEYWORD_ONLY]
        if len(args) > len(positional):
            raise InvalidInput(f"{self.name} takes {len(positional)} positional arguments, and {len(args)} were given")
        values = dict(zip(positional, args, strict=False))
        twice = sorted(set(values) & set(kwargs))
        if twice:
            raise InvalidInput(f"{self.name} got two values for {twice[0]!r}")
        values.update(kwargs)
        from mlfuncs.interface.violations import unknown_and_missing

        unknown_and_missing(f"the call of {self.name}", values, self._names, self._defaults)
        return {name: values[name] if name in values else self._defaults[name] for name in self._names}

    def dump_json(self, value: Any) -> bytes:
        """`value` as JSON, checked against the return type. Raises InvalidInput when it is of another type."""
        return self._writer.write(value)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return {p.name: p.default for p in _parameters(self._target) if p.default is not _EMPTY}

    @cached_property
    def _reader(self) -> Any:
        from mlfuncs.interface.validation import Reader

        self._refuse_nuclio()
        return Reader(self.name, self.parameters, self.body_model)

    @cached_property
    def _checker(self) -> Any:
        from mlfuncs.interface.validation import Checker

        return Checker(self.name, self.parameters)

    @cached_property
    def _writer(self) -> Any:
        from mlfuncs.interface.validation import Writer

        return Writer(self.name, self.returns)

    def _refuse_nuclio(self) -> None:
        if self.kind == "nuclio":
            raise SignatureError(f"{self.name} is a Nuclio handler: it takes the event as it came, not named values")


def _parameters(target: Any) -> list[inspect.Parameter]:
    function = callable_of(target)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as exc:
        raise SignatureError(f"{function!r} does not tell its parameters; wrap it in a Python function") from exc
    is_method = inspect.isclass(target) or inspect.isclass(getattr(target, "target", None))
    return parameters[1:] if is_method and not isinstance(_static(target), staticmethod) else parameters


def _static(target: Any) -> Any:
    return inspect.getattr_static(getattr(target, "target", target), "__call__", None)
