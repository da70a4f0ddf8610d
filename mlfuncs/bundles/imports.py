"""Imports in a bundled function's code that its environment cannot satisfy, found by reading the code alone.

An import that the code is ready to do without (`try: import x except ImportError`), and one for type checkers only,
does not count.
"""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlfuncs.bundles.siblings import locate
from mlfuncs.bundles.source import OWN_PACKAGES
from mlfuncs.environments.installed import canonicalize_name, installed

if TYPE_CHECKING:
    from mlfuncs.bundles.bundle import Manifest, OpenBundle
    from mlfuncs.settings import Settings

_FORGIVING = ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")


def needed_imports(source: str) -> set[str]:
    """The top-level names of the modules that `source` imports and cannot do without; none when it cannot be parsed.

    >>> sorted(needed_imports("import a.b\\ntry:\\n    import c\\nexcept ImportError:\\n    c = None"))
    ['a']
    """
    try:
        tree = ast.parse(textwrap.dedent(source))
    except (SyntaxError, ValueError):
        return set()
    return set(_needed(tree))


def missing_imports(bundle: OpenBundle, python: Path | None) -> dict[str, str]:
    """Module name -> what to add to `requirements`, for each import that will fail where the bundle runs.

    `python` is the interpreter of its environment, None when there is none on this machine.
    """
    manifest, settings = bundle.manifest, bundle.settings
    sources = [snippet["text"] for snippet in json.loads(bundle.read("sources.json"))]
    for name in manifest.modules:
        found = locate(name)
        if found is not None and found.source is not None:
            sources.append(found.source.decode("utf-8", "replace"))
    packed = {name.partition(".")[0] for name in manifest.modules}
    known = {*sys.stdlib_module_names, *OWN_PACKAGES, *packed}
    wanted = sorted({name for source in sources for name in needed_imports(source)} - known)
    return {name: hint for name in wanted if (hint := _hint(name, manifest, python, settings))}


def _hint(module: str, manifest: Manifest, python: Path | None, settings: Settings) -> str:
    """What to add so that `module` is there; empty when it is."""
    providing = installed(settings.home).providing(module)
    if python is not None and python != Path(sys.executable):
        if _is_in(python, module):
            return ""
    else:
        pinned = {canonicalize_name(line.partition("==")[0].partition("[")[0].strip()) for line in manifest.lock}
        if canonicalize_name(module) in pinned or any(canonicalize_name(d.name) in pinned for d in providing):
            return ""
        if not providing and locate(module) is not None:  # on the path without being installed
            return ""
    return providing[0].pin if providing else module


def _is_in(python: Path, module: str) -> bool:
    """Whether the environment of that interpreter has the module among its packages."""
    folders = python.parent.parent.glob("lib/python*/site-packages")
    return any((folder / module).is_dir() or any(folder.glob(f"{module}.*")) for folder in folders)


def _needed(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
        yield node.module.partition(".")[0]
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Try) and any(_forgives(handler) for handler in node.handlers):
        children = [*node.orelse, *node.finalbody]
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        children = [*node.orelse]
    for child in children:
        yield from _needed(child)


def _forgives(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or any(f"'{name}'" in ast.dump(handler.type) for name in _FORGIVING)
