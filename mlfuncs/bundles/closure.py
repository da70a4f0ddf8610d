"""Everything that a function or class takes with it, walked once: its digest, its modules, its source text.

By value: what is defined in the function's own module, in `__main__` (scripts, notebooks), inside functions, or as a
lambda; only the parts that are used. By reference: what can be imported from any other module. Line numbers, file
names and comments do not count in the digest; code, constants, docstrings, defaults, hints, closure values and the
values of used globals do.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs.bundles.canonical import Encoder
from mlfuncs.bundles.code_encoders import CODE_ENCODERS, CODE_LIBRARY_ENCODERS
from mlfuncs.bundles.source import OWN_PACKAGES, Snippet, code_names, imported_modules, snippet_of
from mlfuncs.errors import BundleError


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
        from mlfuncs.bundles.siblings import locate

        found = locate(name)
        if found is None or found.source is not None:
            own.add(name)
    return frozenset(own)


def init_context_of(target: Any) -> Any:
    """The `init_context` beside a Nuclio handler, or None."""
    from mlfuncs.interface.signature import function_kind

    if isinstance(target, types.FunctionType) and function_kind(target) == "nuclio":
        return target.__globals__.get("init_context")
    return None


class Walker(Encoder):
    """The canonical encoder for code: follows functions and classes into what they use."""

    def __init__(self, by_value: frozenset[str], secrets: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(CODE_ENCODERS, CODE_LIBRARY_ENCODERS)
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
        if kind.__module__ not in ("builtins", "types") and kind.__module__ not in self.by_value:
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
