"""Everything that a function or class takes with it, walked once: its digest, its modules, its source text.

By value: what is defined in the function's own module, in `__main__` (scripts, notebooks), inside functions, or as a
lambda; only the parts that are used. By reference: what can be imported from any other module. Line numbers, file
names and comments do not count in the digest; code, constants, docstrings, defaults, hints, closure values and the
values of used globals do.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs.canonical import Encoder
from mlfuncs.decorator import Function
from mlfuncs.errors import BundleError
from mlfuncs.source import (
    EMPTY,
    OWN_PACKAGES,
    Snippet,
    cell_value,
    code_names,
    imported_modules,
    resolved_hints,
    snippet_of,
    walk_code,
)

# a module's own facts, which differ between a script and its import; `__file__` counts when the code reads it
_MODULE_FACTS = frozenset({"__name__", "__doc__", "__package__", "__loader__", "__spec__", "__path__", "__builtins__"})
_CLASS_FACTS = frozenset(
    {"__module__", "__qualname__", "__dict__", "__weakref__", "__annotations__", "__annotate_func__", "__slotnames__"}
    | {"__annotations_cache__", "__firstlineno__", "__static_attributes__", "_abc_impl", "__abstractmethods__"}
    | {"_member_names_", "_member_map_", "_value2member_map_", "_unhashable_values_", "_hashable_values_"}
    | {"__match_args__", "__parameters__", "__signature__"}
)
_PYDANTIC_KEPT = frozenset({"__pydantic_fields__", "__pydantic_decorators__", "__pydantic_root_model__"})
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)


@dataclass(frozen=True)
class Closure:
    """What a target is made of. `modules` are the dotted names it refers to; `texts` the code packed by value."""

    digest: str
    by_value: frozenset[str]  # modules whose functions and classes are packed by value
    modules: frozenset[str]
    texts: tuple[Snippet, ...]
    facade: frozenset[str]  # names used of `mlfuncs` itself, which may need one of its extras


def walk_closure(target: Any, secrets: Sequence[tuple[str, str]] = ()) -> Closure:
    """Walk `target` (function, class, callable). `secrets` are (name, value) pairs that must not be found in it.

    Raises BundleError, naming the function and the variable, for a value that cannot be packed.
    """
    walker = Walker(own_modules(target), secrets)
    walker.encode(target)
    init = init_context_of(target)
    if init is not None:
        walker.emit("init_context")
        walker.encode(init)
    texts = tuple(snippet for item in walker.found if (snippet := snippet_of(item)) is not None)
    return Closure(walker.hexdigest(), walker.by_value, frozenset(walker.modules), texts, frozenset(walker.facade))


def digest_of(value: Any) -> str:
    """The canonical SHA-256 digest of any value, functions and classes included, as 64 hex digits.

    >>> digest_of({"a", "b"}) == digest_of({"b", "a"})
    True

    Raises BundleError for a value that has none, such as a lock or an open file.
    """
    walker = Walker(frozenset({"__main__", "__mp_main__"}))
    walker.encode(value)
    return walker.hexdigest()


def own_modules(target: Any) -> frozenset[str]:
    """The modules whose contents are packed by value: `__main__` and the one that defines `target`."""
    target = getattr(target, "func", target)
    names = getattr(target, "__globals__", {})
    name = names.get("__name__") if isinstance(target, types.FunctionType) else getattr(target, "__module__", None)
    own = {"__main__", "__mp_main__"}
    if name and name.partition(".")[0] not in OWN_PACKAGES:
        from mlfuncs.siblings import locate

        found = locate(name)
        if found is None or found.source is not None:
            own.add(name)
    return frozenset(own)


def init_context_of(target: Any) -> Any:
    """The `init_context` beside a Nuclio handler, or None."""
    from mlfuncs.signature import function_kind

    if isinstance(target, types.FunctionType) and function_kind(target) == "nuclio":
        return target.__globals__.get("init_context")
    return None


def is_by_value(item: Any, by_value: frozenset[str]) -> bool:
    """Whether a function or class is packed whole rather than imported by name in the worker."""
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", "")
    if module is None or module in by_value or module not in sys.modules:
        return module != "builtins"
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not item


class Walker(Encoder):
    """The canonical encoder for code: follows functions and classes into what they use."""

    def __init__(self, by_value: frozenset[str], secrets: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(CODE_ENCODERS)
        self.by_value, self.secrets = by_value, secrets
        self.modules: set[str] = set()
        self.facade: set[str] = set()
        self.found: list[Any] = []

    def fork(self) -> Walker:
        child = Walker(self.by_value, self.secrets)
        child.trail, child.modules, child.facade, child.found = self.trail, self.modules, self.facade, self.found
        return child

    def emit(self, tag: str, payload: bytes | str = b"") -> None:
        for name, value in self.secrets:
            if (value in payload) if isinstance(payload, str) else (value.encode() in payload):
                raise BundleError(
                    f"{self.where()} holds the value of the secret {name!r}: a secret never goes into a bundle. "
                    f"Read it inside the function with ml.secret({name!r})"
                )
        super().emit(tag, payload)

    def note(self, kind: type) -> None:
        if kind.__module__ not in ("builtins", "types"):
            self.modules.add(kind.__module__)

    def encode_named(self, value: Any, name: str) -> None:
        module = getattr(value, "__module__", None)
        if module in self.by_value:
            raise self.refuse(value, f"it can only be found by its name {name!r} in {module}")
        self.modules.add(module or "")
        super().encode_named(value, name)

    def refer(self, item: Any) -> None:
        """Write a function or class that the worker imports by name."""
        if item.__module__ != "builtins":
            self.modules.add(item.__module__)
        self.emit("import", f"{item.__module__}:{item.__qualname__}")

    def use_modules(self, used: dict[str, Any], code: types.CodeType, package: str) -> None:
        """Note the modules that `code` imports, and the submodules it reaches as `package.module`."""
        self.modules |= imported_modules(code, package)
        names = code_names(code).names
        for value in used.values():
            if not isinstance(value, types.ModuleType):
                continue
            if value.__name__ == "mlfuncs":
                self.facade |= names
            prefix = value.__name__ + "."
            for name in list(sys.modules):
                if name.startswith(prefix) and names.issuperset(name[len(prefix) :].split(".")):
                    self.modules.add(name)


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
    out.found.append(function)
    with out.within("function", function.__name__, function):
        out.emit("function", function.__qualname__)
        out.encode(function.__code__)
        out.encode_attributes(_defaults(function), "the default of")
        out.encode_attributes(resolved_hints(function), "the hint of")
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        out.encode_attributes({n: v for n, c in cells if (v := cell_value(c)) is not EMPTY}, "the closure variable")
        used = used_globals(function)
        out.encode_attributes(used, "the global variable")
        out.encode_attributes(vars(function), "the function attribute")
        out.use_modules(used, function.__code__, function.__globals__.get("__package__") or "")


def used_globals(function: types.FunctionType) -> dict[str, Any]:
    """The global variables that a function and the code inside it name, as they are now."""
    names = (name for name in code_names(function.__code__).globals if name not in _MODULE_FACTS)
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


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
        out.encode(tuple(resolved_hints(cls).items()))
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


def _encode_target(out: Walker, function: Function[Any, Any]) -> None:
    if not is_by_value(function, out.by_value):
        out.refer(function)
        return
    out.emit("mlfuncs-function", repr(sorted(function.spec.to_dict().items(), key=lambda item: item[0])))
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

__all__ = [
    "Closure",
    "Walker",
    "init_context_of",
    "is_by_value",
    "own_modules",
    "used_globals",
    "walk_closure",
    "walk_code",
]
