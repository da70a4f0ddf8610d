"""Code for machines: a callable as bytes that rebuild it in another process, through cloudpickle.

What cloudpickle leaves out is added here: hints as the types they name, `mlfuncs` functions by value, cached functions,
and NewType and TypedDict definitions of a script. What it would read from disk (open files) is refused earlier.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import sys
import threading
import types
import typing
from typing import Any, BinaryIO, Self

import cloudpickle

from mlfuncs.bundles.closure import init_context_of
from mlfuncs.bundles.source import is_by_value, is_single_dispatch
from mlfuncs.decorator import Function
from mlfuncs.errors import BundleError
from mlfuncs.interface.hints import known_hints
from mlfuncs.spec import FunctionSpec

_registering = threading.RLock()  # cloudpickle's list of by-value modules belongs to the whole process


def pack(target: Any, by_value: frozenset[str]) -> bytes:
    """`target` as pickle bytes; what `by_value` modules define goes in whole. Raises BundleError."""
    buffer = io.BytesIO()
    packed = {"target": target, "init_context": init_context_of(target)}
    try:
        with CodePickler(buffer, by_value) as pickler:
            pickler.dump(packed)
    except (TypeError, pickle.PicklingError, AttributeError, ValueError, NotImplementedError) as exc:
        name = getattr(target, "__name__", repr(target))
        raise BundleError(f"function {name!r} cannot be packed: {exc}") from exc
    return buffer.getvalue()


def unpack(code: bytes) -> Any:
    """The callable that `pack` wrote. Runs code: only for bytes whose signature was checked."""
    packed = pickle.loads(code)
    target, init = packed["target"], packed["init_context"]
    if init is not None:
        target.__globals__.setdefault("init_context", init)
    return target


class CodePickler(cloudpickle.Pickler):
    """cloudpickle's pickler, told how to treat hints, our functions, caches and named types. Used in a `with` block."""

    def __init__(self, file: BinaryIO, by_value: frozenset[str]) -> None:
        super().__init__(file)
        self.by_value = by_value
        self._registered: list[types.ModuleType] = []

    def __enter__(self) -> Self:
        """Tell cloudpickle, for the length of the block, which modules go by value."""
        _registering.acquire()
        # keyed by the module's own name: `__mp_main__` is `__main__` under a second one
        modules = {sys.modules[name].__name__: sys.modules[name] for name in self.by_value if name in sys.modules}
        before = cloudpickle.list_registry_pickle_by_value()
        for name, module in modules.items():
            if name not in before and name in sys.modules:
                cloudpickle.register_pickle_by_value(module)
                self._registered.append(module)
        return self

    def __exit__(self, *_: object) -> None:
        for module in self._registered:
            cloudpickle.unregister_pickle_by_value(module)
        _registering.release()

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is types.FunctionType:
            return self._reduce_function(obj)
        if kind is Function:
            if not is_by_value(obj, self.by_value):
                return NotImplemented
            return _new_function, (), (obj.target, obj.spec), None, None, _fill_function
        if kind in _SENTINELS:
            return _sentinel, (_SENTINELS[kind],)
        if kind is functools._lru_cache_wrapper:
            if not is_by_value(obj, self.by_value):
                return NotImplemented
            return _make_cached, (obj.__wrapped__, obj.cache_parameters())
        if kind.__name__ == "CPUDispatcher" and kind.__module__.startswith("numba."):
            return _make_jitted, (obj.py_func, obj.targetoptions)
        if kind is functools.cached_property:
            return _make_cached_property, (obj.func, obj.attrname)
        if kind is typing.NewType and obj.__module__ in self.by_value:
            return typing.NewType, (obj.__name__, obj.__supertype__)
        if kind is types.ModuleType and obj.__name__ in self.by_value:
            return cloudpickle.cloudpickle.subimport, (obj.__name__,)
        if isinstance(obj, type):
            return self._reduce_class(obj)
        return super().reducer_override(obj)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if is_single_dispatch(function) and is_by_value(function, self.by_value):
            return _make_single_dispatch, (dict(function.registry),)  # type: ignore[attr-defined]
        names = function.__globals__
        # the module's own facts without its path, which says nothing in another place unless the code reads it
        facts = {key: names[key] for key in ("__name__", "__package__", "__path__") if key in names}
        self.globals_ref.setdefault(id(names), facts)
        reduced = super().reducer_override(function)
        if isinstance(reduced, tuple):
            reduced[2][1]["__annotations__"] = known_hints(function)
        return reduced

    def _reduce_class(self, cls: type) -> Any:
        if typing.is_typeddict(cls) and is_by_value(cls, self.by_value):
            return _make_typed_dict, (cls.__name__, known_hints(cls), cls.__total__, cls.__module__)  # type: ignore[attr-defined]
        reduced = super().reducer_override(cls)
        if not isinstance(reduced, tuple) or len(reduced) < 3:
            return reduced
        attributes = reduced[2][0]
        hints = known_hints(cls)
        if hints:
            attributes["__annotations__"] = hints
        fields = attributes.get("__dataclass_fields__")
        if fields:
            attributes["__dataclass_fields__"] = {n: _with_type(f, hints.get(n, f.type)) for n, f in fields.items()}
        return reduced


# values of dataclasses that are compared by identity, and so must be the reader's own
_SENTINELS = {type(getattr(dataclasses, name)): name for name in ("MISSING", "KW_ONLY", "_HAS_DEFAULT_FACTORY")}


def _sentinel(name: str) -> Any:
    return getattr(dataclasses, name)


def _with_type(field: dataclasses.Field[Any], hint: Any) -> dataclasses.Field[Any]:
    if field.type is hint:
        return field
    field = copy.copy(field)
    field.type = hint
    return field


def _new_function() -> Function[Any, Any]:
    return Function.__new__(Function)


def _fill_function(made: Function[Any, Any], state: tuple[Any, FunctionSpec]) -> None:
    Function.__init__(made, *state)


def _make_cached(function: Any, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _make_jitted(function: Any, options: dict[str, Any]) -> Any:
    import numba

    return numba.jit(**options)(function)


def _make_cached_property(function: Any, name: str) -> Any:
    made = functools.cached_property(function)
    made.attrname = name
    return made


def _make_single_dispatch(registry: dict[type, Any]) -> Any:
    made = functools.singledispatch(registry[object])
    for kind, function in registry.items():
        made.register(kind, function)
    return made


def _make_typed_dict(name: str, hints: dict[str, Any], total: bool, module: str) -> Any:
    maker: Any = typing.TypedDict
    made = maker(name, hints, total=total)
    made.__module__ = module
    return made
