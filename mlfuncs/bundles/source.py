"""What a callable's code says about itself: the names, imports and source text that it uses.

Facts only: what to pack by value is decided in closure.py, and the user's own modules are found in siblings.py.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import os
import site
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs.interface.hints import own_methods

OWN_PACKAGES = frozenset({"mlfuncs", "mlfuncs_runtime", "mlfuncs_pipelines", "mlfuncs_featurestore"})
_GLOBAL_OPS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"})
# a module's own facts, which differ between a script and its import; `__file__` counts when the code reads it
_MODULE_FACTS = frozenset({"__name__", "__doc__", "__package__", "__loader__", "__spec__", "__path__", "__builtins__"})


@dataclass(frozen=True)
class CodeNames:
    """What a code object and the ones inside it name: globals, and imports as (module, names, level)."""

    globals: tuple[str, ...]
    imports: tuple[tuple[str, tuple[str, ...], int], ...]
    names: frozenset[str]  # every name and attribute, to find submodules used as `package.module.thing`


@dataclass(frozen=True)
class Snippet:
    """The text of one function or class as written: the file it is from and its first line, counted from 1."""

    filename: str
    first_line: int
    text: str


@functools.lru_cache(maxsize=4096)
def code_names(code: types.CodeType) -> CodeNames:
    """The global names and imports of `code`, nested functions included, in a fixed order."""
    names: dict[str, None] = {}
    imports: dict[tuple[str, tuple[str, ...], int], None] = {}
    everything: set[str] = set()
    for part in walk_code(code):
        everything.update(part.co_names)
        constants: list[Any] = []
        for step in dis.get_instructions(part):
            if step.opname in _GLOBAL_OPS:
                names[step.argval] = None
            elif step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
                constants.append(step.argval)
            elif step.opname == "IMPORT_NAME":
                level, wanted = constants[-2:]
                imports[(step.argval, tuple(wanted or ()), level)] = None
    return CodeNames(tuple(sorted(names)), tuple(sorted(imports)), frozenset(everything))


def walk_code(code: types.CodeType) -> Iterator[types.CodeType]:
    """`code` and every code object inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from walk_code(constant)


def imported_modules(code: types.CodeType, package: str) -> set[str]:
    """The modules that `code` may import, absolute; `from a import b` gives both `a` and `a.b`."""
    found: set[str] = set()
    for name, wanted, level in code_names(code).imports:
        found |= absolute_imports(name, wanted, level, package)
    return found


def absolute_imports(name: str, wanted: tuple[str, ...], level: int, package: str) -> set[str]:
    """Absolute module names of one import statement inside `package`.

    >>> sorted(absolute_imports("", ("clean",), 1, "shop"))
    ['shop', 'shop.clean']
    """
    if level:
        base = package.rsplit(".", level - 1)[0] if level > 1 else package
        name = f"{base}.{name}".strip(".") if name else base
    return {name} | {f"{name}.{item}" for item in wanted if item != "*"} if name else set()


@functools.cache
def installed_folders() -> tuple[str, ...]:
    """The folders of the standard library and of installed packages; code elsewhere is the user's own."""
    paths = sysconfig.get_paths()
    folders = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.update(site.getsitepackages() if hasattr(site, "getsitepackages") else ())
    folders.add(site.getusersitepackages())
    both = {Path(folder) for folder in folders} | {Path(folder).resolve() for folder in folders}
    return tuple(sorted(f"{folder}{os.sep}" for folder in both))


def is_installed_path(path: str) -> bool:
    """Whether a file belongs to the standard library or to an installed package."""
    parts = Path(path).parts
    return "site-packages" in parts or "dist-packages" in parts or path.startswith(installed_folders())


def is_by_value(item: Any, by_value: frozenset[str]) -> bool:
    """Whether a function or class is packed whole rather than imported by name in the worker."""
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", "")
    if module is None or module in by_value or module not in sys.modules:
        return module != "builtins"
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not item


def is_single_dispatch(function: types.FunctionType) -> bool:
    """Whether a function was made by `functools.singledispatch`: its table of types is what counts, not its cache."""
    return function.__globals__ is vars(functools) and hasattr(function, "registry")


def used_globals(function: types.FunctionType) -> dict[str, Any]:
    """The global variables that a function and the code inside it name, as they are now."""
    names = (name for name in code_names(function.__code__).globals if name not in _MODULE_FACTS)
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def snippet_of(target: Any) -> Snippet | None:
    """The source of a function or class as its file or cell has it, or None when nobody kept it."""
    if isinstance(target, type):
        return _class_snippet(target)
    code = target.__code__
    lines = linecache.getlines(code.co_filename)
    if not 0 < code.co_firstlineno <= len(lines):
        return None
    try:
        block = inspect.getblock(lines[code.co_firstlineno - 1 :])
    except (SyntaxError, IndentationError):
        return None
    return Snippet(code.co_filename, code.co_firstlineno, "".join(block))


def _class_snippet(target: type) -> Snippet | None:
    module = sys.modules.get(target.__module__)
    files = [method.__code__.co_filename for method in own_methods(target)] + [getattr(module, "__file__", None) or ""]
    for filename in dict.fromkeys(files):
        lines = linecache.getlines(filename)
        node = _find_class("".join(lines), target.__qualname__) if lines else None
        if node is not None:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return Snippet(filename, first, "".join(lines[first - 1 : node.end_lineno]))
    return None


def _find_class(text: str, qualname: str) -> ast.ClassDef | None:
    tree = _parse(text)
    found: ast.AST | None = tree
    for name in qualname.split("."):
        if name == "<locals>" or found is None:
            continue
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = next((n for n in ast.walk(found) if isinstance(n, kinds) and n.name == name and n is not found), None)
    return found if isinstance(found, ast.ClassDef) else None


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def git_commit(folder: Path) -> str:
    """The commit that a checkout around `folder` is at, or "" outside git. Reads files; runs nothing."""
    for place in (folder, *folder.parents):
        git = place / ".git"
        if git.exists():
            return _read_head(git)
    return ""


def _read_head(git: Path) -> str:
    try:
        if git.is_file():  # a worktree or submodule
            git = (git.parent / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        if (common / name).exists():
            return (common / name).read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    return next((line.split()[0] for line in packed if line.endswith(" " + name)), "")
