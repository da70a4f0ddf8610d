"""The canonical form of code: functions, classes, modules, and what libraries make of them."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from typing import TYPE_CHECKING, Any

from mlfuncs.bundles.source import is_by_value, is_single_dispatch, used_globals
from mlfuncs.decorator import Function
from mlfuncs.interface.hints import EMPTY, cell_value, known_hints

if TYPE_CHECKING:
    from mlfuncs.bundles.closure import Walker

_CLASS_FACTS = frozenset(
    {"__module__", "__qualname__", "__dict__", "__weakref__", "__annotations__", "__annotate_func__", "__slotnames__"}
    | {"__annotations_cache__", "__firstlineno__", "__static_attributes__", "_abc_impl", "__abstractmethods__"}
    | {"_member_names_", "_member_map_", "_value2member_map_", "_unhashable_values_", "_hashable_values_"}
    | {"__match_args__", "__parameters__", "__signature__"}
)
_PYDANTIC_KEPT = frozenset({"__pydantic_fields__", "__pydantic_decorators__", "__pydantic_root_model__"})
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def _encode_code(out: Walker, code: types.CodeType) -> None:
    out.emit("code", code.co_name)
    out.emit("shape", f"{code.co_argcount},{code.co_posonlyargcount},{code.co_kwonlyargcount},{code.co_flags}")
    out.emit("bytecode", code.co_code)
    out.emit("exceptions", getattr(code, "co_exceptiontable", b""))
    for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
        out.encode(names)
    for constant in code.co_consts:
        if "__firstlineno__" in code.co_names and constant == code.co_firstlineno:  # a class body since Python 3.13
            constant = None
        out.encode(constant)


def _encode_function(out: Walker, function: types.FunctionType) -> None:
    if not is_by_value(function, out.by_value):
        out.refer(function)
        return
    if is_single_dispatch(function):
        out.emit("single-dispatch", function.__qualname__)
        out.encode(tuple(function.registry.items()))  # type: ignore[attr-defined]
        return
    out.found.append(function)
    with out.within("function", function.__name__, function):
        out.emit("function", function.__qualname__)
        out.encode(function.__code__)
        out.encode_attributes(_defaults(function), "the default of")
        out.encode_attributes(known_hints(function), "the hint of")
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        out.encode_attributes({n: v for n, c in cells if (v := cell_value(c)) is not EMPTY}, "the closure variable")
        used = used_globals(function)
        out.encode_attributes(used, "the global variable")
        out.encode_attributes(vars(function), "the function attribute")
        out.use_modules(used, function.__code__, function.__globals__.get("__package__") or "")


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return dict(zip(names, values, strict=True)) | (function.__kwdefaults__ or {})


def _encode_class(out: Walker, cls: type) -> None:
    if not is_by_value(cls, out.by_value):
        out.refer(cls)
        return
    out.found.append(cls)
    with out.within("class", cls.__name__, cls):
        out.emit("class", cls.__qualname__)
        out.encode(type(cls))
        out.encode(cls.__bases__)
        out.encode(tuple(known_hints(cls).items()))
        members = getattr(cls, "__members__", None)
        if isinstance(members, types.MappingProxyType):
            out.encode(tuple((name, member.value) for name, member in members.items()))
        values = {name: value for name, value in vars(cls).items() if _counts(name, value, members)}
        if dataclasses.is_dataclass(cls) and str(cls.__doc__).startswith(f"{cls.__name__}("):
            values.pop("__doc__", None)  # made from the fields; shows sets in hash order
        for value in values.values():
            if isinstance(value, types.FunctionType):
                out.use_modules(used_globals(value), value.__code__, value.__globals__.get("__package__") or "")
        out.encode_attributes(values, "the class attribute")


def _counts(name: str, value: Any, members: Any) -> bool:
    if name in _CLASS_FACTS or isinstance(value, _DESCRIPTORS) or (members and name in members):
        return False
    return not name.startswith("__pydantic_") or name in _PYDANTIC_KEPT


def _encode_module(out: Walker, module: types.ModuleType) -> None:
    if module.__name__ == "__main__" or module.__name__ not in sys.modules:
        raise out.refuse(module, "only a module that can be imported by name goes into a bundle")
    out.modules.add(module.__name__)
    out.emit("module", module.__name__)


def _encode_jitted(out: Walker, dispatcher: Any) -> None:
    if not is_by_value(dispatcher, out.by_value):
        out.refer(dispatcher)
        return
    out.emit("numba", json.dumps(dispatcher.targetoptions, sort_keys=True, default=str))
    out.encode(dispatcher.py_func)


def _encode_target(out: Walker, function: Function[Any, Any]) -> None:
    if not is_by_value(function, out.by_value):
        out.refer(function)
        return
    out.emit("mlfuncs-function", json.dumps(function.spec.to_dict(), sort_keys=True))
    out.encode(function.target)


def _encode_field(out: Walker, field: dataclasses.Field[Any]) -> None:
    """A dataclass field without its type, which is among the class's hints."""
    out.emit("field", f"{field.init},{field.repr},{field.hash},{field.compare},{field.kw_only}")
    out.encode(str(field._field_type))  # type: ignore[attr-defined]
    for value in (field.default, field.default_factory):
        out.encode("missing" if value is dataclasses.MISSING else (value,))
    out.encode(dict(field.metadata))


CODE_ENCODERS: dict[type, Any] = {
    types.CodeType: _encode_code,
    types.FunctionType: _encode_function,
    types.ModuleType: _encode_module,
    Function: _encode_target,
    dataclasses.Field: _encode_field,
    type: _encode_class,  # and every class, whatever its metaclass
}
# by top-level module and class name
CODE_LIBRARY_ENCODERS: dict[tuple[str, str], Any] = {
    ("numba", "CPUDispatcher"): _encode_jitted,  # its own reduction holds an id made per process
}
