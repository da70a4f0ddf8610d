"""Values as one canonical stream of bytes, hashed: equal values give equal digests in every process.

Pickle bytes differ between processes (string interning, set order, object identity), so bundles are not named by them.
This encoding follows pickle's own description of an object (`__reduce_ex__`), but writes every part in a fixed form:

- text, numbers, bytes, tuples and frozensets by value, wherever they appear; floats exactly, NaN as one value;
- sets sorted by the digest of each element; dicts in their order, which a program can see; attributes sorted by name;
- numpy arrays by dtype, shape and elements (padding left out), pandas tables by index, columns and values;
- any other object by its class and what `__reduce_ex__` gives; an object met again by the number of its first visit.

An object that cannot be described so raises BundleError, which names the variable that holds it.
"""

from __future__ import annotations

import collections
import copyreg
import datetime
import decimal
import fractions
import functools
import hashlib
import marshal
import pathlib
import pickle
import re
import types
import typing
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlfuncs.bundles.canonical_libraries import LIBRARY_ENCODERS
from mlfuncs.errors import BundleError

_SCALARS = {type(None), bool, int, float, str, bytes}
# met again, these are written again: whether two equal ones are one object depends on caches, not on the program
_IMMUTABLE: set[type] = {
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal,
    fractions.Fraction, uuid.UUID, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath,
    pathlib.PureWindowsPath, re.Pattern, types.GenericAlias, types.UnionType,
}  # fmt: skip
_REDUCE_ERRORS = (TypeError, pickle.PicklingError, AttributeError, ValueError, RuntimeError, NotImplementedError)
MENDING = "create it inside the function, or in the __init__ of a class decorated with @ml.function"


class Encoder:
    """Writes values to a running SHA-256. `encoders` and `libraries` map a type, exact or as
    (top-level module, class name), to its writer, which comes before the general rules."""

    def __init__(
        self,
        encoders: Mapping[type, Callable[[Any, Any], None]] | None = None,
        libraries: Mapping[tuple[str, str], Callable[[Any, Any], None]] | None = None,
    ) -> None:
        self.encoders = {**VALUE_ENCODERS, **(encoders or {})}
        self.libraries = {**LIBRARY_ENCODERS, **(libraries or {})}
        self.trail: list[tuple[str, str, Any]] = []  # (what, name, value) from the function to the value at hand
        self._hash = hashlib.sha256()
        self._memo: dict[int, int] = {}
        self._alive: list[Any] = []  # ids stay unique while the objects live

    def hexdigest(self) -> str:
        """The digest of everything encoded so far."""
        return self._hash.hexdigest()

    def fork(self) -> Encoder:
        """An encoder like this one with nothing encoded yet."""
        child = Encoder(self.encoders, self.libraries)
        child.trail = self.trail
        return child

    def emit(self, tag: str, payload: bytes | str = b"") -> None:
        """Write one tagged, length-prefixed field."""
        raw = payload.encode("utf-8", "surrogatepass") if isinstance(payload, str) else payload
        self._hash.update(f"{tag}:{len(raw)}:".encode())
        self._hash.update(raw)

    @contextmanager
    def within(self, what: str, name: str, value: Any) -> Iterator[None]:
        """Errors raised inside name this step, e.g. within("global variable", "conn", conn)."""
        self.trail.append((what, name, value))
        yield
        self.trail.pop()  # kept when an error passes: it tells where

    def encode(self, value: Any) -> None:
        """Write `value`. Raises BundleError when it has no canonical form."""
        kind = type(value)
        if kind in _SCALARS or kind in _INLINE:
            VALUE_ENCODERS[kind](self, value)
            return
        if kind not in _IMMUTABLE and kind.__module__ != "typing" and not _is_numpy_scalar(kind):
            seen = self._memo.get(id(value))
            if seen is not None:
                self.emit("ref", str(seen))
                return
            self._memo[id(value)] = len(self._memo)
            self._alive.append(value)
        try:
            self._encode_new(value)
        except RecursionError:
            raise BundleError(f"{self.where()} is nested too deeply to be packed") from None

    def _encode_new(self, value: Any) -> None:
        """Write a value that was not met before, by the writer of its exact type, its library, or its reduction."""
        kind = type(value)
        writer = self.encoders.get(kind) or (self.encoders.get(type) if isinstance(value, type) else None)
        if writer is None:
            writer = self.libraries.get((kind.__module__.partition(".")[0], kind.__name__))
        self.note(kind)
        if writer is not None:
            writer(self, value)
        else:
            self._encode_reduced(value)

    def note(self, kind: type) -> None:
        """Called with the type of every object that is written: a hook for what must be imported to read it back."""

    def _encode_reduced(self, value: Any) -> None:
        """Write an object as its class and state, as pickle would take it apart."""
        try:
            reducer = copyreg.dispatch_table.get(type(value))
            reduced = reducer(value) if reducer else value.__reduce_ex__(4)
        except _REDUCE_ERRORS as exc:
            raise self.refuse(value, str(exc)) from exc
        if isinstance(reduced, str):
            self.encode_named(value, reduced)
            return
        function, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        self.emit("object")
        self.encode(function)
        self.encode(tuple(arguments))
        self._encode_state(state)
        self.encode(list(items) if items is not None else None)
        self.encode([tuple(pair) for pair in pairs] if pairs is not None else None)
        self.encode(setter)

    def encode_named(self, value: Any, name: str) -> None:
        """Write an object that pickle finds again by its module and name."""
        module = getattr(value, "__module__", None) or pickle.whichmodule(value, name)  # type: ignore[attr-defined]
        self.emit("named", f"{module}:{name}")

    def _encode_state(self, state: Any) -> None:
        """Write an object's state; attributes are sorted by name."""
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            self.emit("slots")
            self._encode_state(state[0])
            self._encode_state(state[1])
        elif type(state) is dict and all(type(key) is str for key in state):
            self.encode_attributes(state, "attribute")
        else:
            self.encode(state)

    def encode_attributes(self, values: Mapping[str, Any], what: str) -> None:
        """Write named values sorted by name."""
        self.emit("attributes", str(len(values)))
        for name in sorted(values):
            self.emit("name", name)
            with self.within(what, name, values[name]):
                self.encode(values[name])

    def refuse(self, value: Any, reason: str) -> BundleError:
        """The error for a value that cannot be packed, naming the function and the variable."""
        return BundleError(f"{self.where()} holds {_type_name(value)}, which cannot be packed ({reason}); {MENDING}")

    def where(self) -> str:
        """The steps from the function to the value at hand, for messages."""
        owners = [(what, name) for what, name, _ in self.trail if what in ("function", "class")]
        steps: list[str] = []
        last = None
        for what, name, value in self.trail:
            if what in ("function", "class"):
                steps = []
            else:
                steps.append(f".{name}" if what == "attribute" and steps else f"{what} {name!r}")
                last = last if len(steps) > 1 else value
        owner = f"{owners[-1][0]} {owners[-1][1]!r}" if owners else "the value"
        if len(owners) > 1:
            owner += f" (used by {owners[0][1]!r})"
        text = "".join(step if step.startswith(".") else f": {step}" for step in steps)
        if len(steps) > 1:
            text += f" (in {_type_name(last)})"
        return owner + text


def _type_name(value: Any) -> str:
    kind = type(value)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


def _is_numpy_scalar(kind: type) -> bool:
    return kind.__module__ == "numpy" and kind.__name__ not in ("ndarray", "matrix")


def _encode_float(out: Encoder, value: float) -> None:
    out.emit("float", "nan" if value != value else value.hex())


def _encode_tuple(out: Encoder, value: Iterable[Any]) -> None:
    items = list(value)
    if {type(item) for item in items} <= _SCALARS:
        out.emit(type(value).__name__, marshal.dumps(items, 2))  # version 2 keeps no references: same bytes anywhere
        return
    out.emit(type(value).__name__ + "s", str(len(items)))
    for item in items:
        out.encode(item)


def _encode_dict(out: Encoder, value: Mapping[Any, Any]) -> None:
    out.emit("dict", str(len(value)))
    for key, item in value.items():
        out.encode(key)
        out.encode(item)


def _encode_set(out: Encoder, value: Iterable[Any]) -> None:
    digests = []
    for item in value:
        child = out.fork()
        child.encode(item)
        digests.append(child.hexdigest())
    out.emit(type(value).__name__, "".join(sorted(digests)))


def _encode_property(out: Encoder, value: property) -> None:
    out.emit("property")
    out.encode((value.fget, value.fset, value.fdel, value.__doc__))


def _encode_wrapped(out: Encoder, value: Any) -> None:
    out.emit(type(value).__name__)
    out.encode(value.__func__)


def _encode_method(out: Encoder, value: types.MethodType) -> None:
    out.emit("method")
    out.encode(value.__func__)
    out.encode(value.__self__)


def _encode_cached(out: Encoder, value: Any) -> None:
    out.emit("lru_cache", str(value.cache_parameters()))
    out.encode(value.__wrapped__)


def _encode_type_variable(out: Encoder, value: Any) -> None:
    out.emit("type-variable", f"{type(value).__name__}:{value.__name__}")
    out.encode((getattr(value, "__bound__", None), getattr(value, "__constraints__", ())))


def _encode_new_type(out: Encoder, value: Any) -> None:
    out.emit("new-type", value.__name__)
    out.encode(value.__supertype__)


_INLINE: set[type] = {complex, tuple, frozenset, range, slice, type(...), type(NotImplemented)}
VALUE_ENCODERS: dict[type, Callable[[Encoder, Any], None]] = {
    type(None): lambda out, value: out.emit("none"),
    bool: lambda out, value: out.emit("bool", str(value)),
    int: lambda out, value: out.emit("int", hex(value)),
    float: _encode_float,
    complex: lambda out, value: out.emit("complex", f"{value.real.hex()},{value.imag.hex()}"),
    str: lambda out, value: out.emit("str", value),
    bytes: lambda out, value: out.emit("bytes", value),
    bytearray: lambda out, value: out.emit("bytearray", bytes(value)),
    memoryview: lambda out, value: out.emit("memoryview", value.tobytes()),
    tuple: _encode_tuple,
    list: _encode_tuple,
    dict: _encode_dict,
    collections.OrderedDict: _encode_dict,
    types.MappingProxyType: _encode_dict,
    set: _encode_set,
    frozenset: _encode_set,
    weakref.WeakSet: _encode_set,
    range: lambda out, value: out.emit("range", str(value)),
    slice: lambda out, value: out.encode((value.start, value.stop, value.step)),
    type(...): lambda out, value: out.emit("ellipsis"),
    type(NotImplemented): lambda out, value: out.emit("not-implemented"),
    property: _encode_property,
    staticmethod: _encode_wrapped,
    classmethod: _encode_wrapped,
    types.MethodType: _encode_method,
    functools._lru_cache_wrapper: _encode_cached,
    functools.cached_property: lambda out, value: out.encode((value.func, value.attrname)),
    typing.TypeVar: _encode_type_variable,
    typing.ParamSpec: _encode_type_variable,
    typing.NewType: _encode_new_type,
}
