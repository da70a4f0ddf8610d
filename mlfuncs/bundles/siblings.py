"""The user's own modules that a function needs: found, read as source, and followed through their imports.

Modules of the standard library and of installed packages are named, never packed. A user's module is packed as source
files under the bundle's import path, not as live objects: its module-level code runs once in the worker, imports
inside its functions work, and models pickled with its classes load there by their usual names.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs.bundles.source import OWN_PACKAGES, absolute_imports, is_installed_path
from mlfuncs.errors import BundleError


@dataclass(frozen=True)
class PackedModule:
    """One of the user's modules: its dotted name, its place under the import path, and its source."""

    name: str
    path: str  # e.g. "shop/features.py" or "shop/__init__.py"
    source: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the module's syntax tree: comments and layout do not count, docstrings do."""
        return _syntax_digest(self.source, self.path)


@dataclass(frozen=True)
class Siblings:
    """The user's modules that are packed, by name, and the third-party modules that they and the function import."""

    packed: tuple[PackedModule, ...]
    external: frozenset[str]  # dotted names outside the standard library, as imported


def collect_siblings(names: Iterable[str]) -> Siblings:
    """Everything that importing `names` needs. Raises BundleError for a user's module that is compiled code."""
    packed: dict[str, PackedModule] = {}
    external: set[str] = set()
    waiting, seen = sorted(set(names)), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = locate(name)
        if found is None:
            continue
        if found.source is None:
            external.add(name)
            continue
        path = _archive_path(name, found.is_package)
        packed[name] = PackedModule(name, path, found.source)
        waiting.extend(_imports_of(found.source, name if found.is_package else name.rpartition(".")[0]))
        waiting.extend(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
    return Siblings(tuple(packed[name] for name in sorted(packed)), frozenset(external))


@dataclass(frozen=True)
class Located:
    """Where a module's code is: its source when it is the user's own, None when it is installed."""

    source: bytes | None
    is_package: bool


def locate(name: str) -> Located | None:
    """The module `name` without importing it: None when it is built in, of the standard library, ours, or no module."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top in OWN_PACKAGES or top in ("__main__", "__mp_main__", "builtins"):
        return None
    spec = _find_spec(name)
    if spec is None:
        return None
    is_package = spec.submodule_search_locations is not None
    origin = spec.origin if spec.origin not in (None, "namespace") else None
    if origin is None:
        places = list(spec.submodule_search_locations or ())
        if not places or all(is_installed_path(str(place)) for place in places):
            return Located(None, True) if places else None
        return Located(b"", True)  # a namespace package of the user's: an empty __init__ takes its place
    if origin in ("built-in", "frozen") or is_installed_path(origin):
        return Located(None, is_package)
    return Located(_read_source(name, spec), is_package)


def _find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    module = sys.modules.get(name)
    spec: importlib.machinery.ModuleSpec | None = getattr(module, "__spec__", None)
    if spec is not None:
        return spec
    file = getattr(module, "__file__", None)
    if file:
        return importlib.util.spec_from_file_location(name, file)
    parent, _, _ = name.rpartition(".")
    if not parent:
        return _find_top(name)
    above = _find_spec(parent)
    if above is None or above.submodule_search_locations is None:
        return None
    return importlib.machinery.PathFinder.find_spec(name, list(above.submodule_search_locations))


def _find_top(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def _read_source(name: str, spec: importlib.machinery.ModuleSpec) -> bytes:
    if spec.origin and spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
        raise BundleError(
            f"module {name!r} is compiled code ({spec.origin}) and cannot be packed: "
            "make it an installable package and name it in requirements"
        )
    loader: Any = spec.loader
    try:
        if spec.origin and Path(spec.origin).is_file():
            return Path(spec.origin).read_bytes()
        text: str | None = loader.get_source(name)
    except (OSError, ImportError, AttributeError, UnicodeDecodeError) as exc:
        raise BundleError(f"the source of module {name!r} cannot be read from {spec.origin}: {exc}") from exc
    if text is None:
        raise BundleError(f"module {name!r} ({spec.origin}) has no source; keep its .py file beside it")
    return text.encode()


def _archive_path(name: str, is_package: bool) -> str:
    return name.replace(".", "/") + ("/__init__.py" if is_package else ".py")


def _imports_of(source: bytes, package: str) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= absolute_imports(alias.name, (), 0, package)
        elif isinstance(node, ast.ImportFrom):
            wanted = tuple(alias.name for alias in node.names)
            found |= absolute_imports(node.module or "", wanted, node.level, package)
    return found


@functools.lru_cache(maxsize=256)
def _parse(source: bytes) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as exc:
        raise BundleError(f"a module that the function imports is not valid Python: {exc}") from exc


@functools.lru_cache(maxsize=256)
def _syntax_digest(source: bytes, path: str) -> str:
    return hashlib.sha256(f"{path}\n{ast.dump(_parse(source))}".encode()).hexdigest()
