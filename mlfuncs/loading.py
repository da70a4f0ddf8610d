"""Functions named on a command line: `path/file.py:name`, `package.module:name` or `notebook.ipynb:name`.

A file runs as `python file.py` would find it (its folder first on the import path) but not as `__main__`: what stands
under `if __name__ == "__main__"` does not run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import json
import linecache
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from mlfuncs.decorator import Function, function_of
from mlfuncs.errors import BundleError, NotFound, SpecError
from mlfuncs.signing import sha256_hex


def load_target(target: str, cwd: Path | None = None) -> Function[Any, Any]:
    """The decorated function, plain function, class or Nuclio handler that "FILE:NAME" names, as a Function.

    FILE is a .py or .ipynb file, relative to `cwd`, or a module. Raises SpecError (not of that form), NotFound (no such
    file, module or name), BundleError (the user's code raised while it was loaded).
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise SpecError(f"{target!r} does not name a function: write FILE:NAME, e.g. train.py:predict")
    cwd = Path.cwd() if cwd is None else cwd
    if place.endswith((".py", ".ipynb")) or "/" in place:
        module = load_file((cwd / place).absolute(), place)
    else:
        module = _load_module(place, cwd)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise NotFound("function", name, _callables_of(module), hint=f"(in {place})")
        found = getattr(found, part)
    if not isinstance(found, Function) and not callable(found):
        raise SpecError(f"{target!r} is {type(found).__name__} {found!r}, not a function or class")
    return function_of(found)


def load_file(path: Path, shown: str = "") -> types.ModuleType:
    """A Python file or notebook as a module named after its file. Raises NotFound, SpecError or BundleError."""
    if not path.is_file():
        near = [p.name for p in path.parent.glob(f"*{path.suffix or '.py'}")] if path.parent.is_dir() else []
        raise NotFound("file", shown or str(path), near)
    package = _package_of(path)
    root = path.parents[package.count(".") + 1] if package else path.parent
    for folder in (str(root), str(path.parent)):  # the file's own folder comes first, as when it runs as a script
        if folder not in sys.path:
            sys.path.insert(0, folder)
    stem = re.sub(r"\W", "_", path.stem)
    name = f"{package}.{stem}" if package and stem == path.stem else stem
    known = sys.modules.get(name)
    if known is not None and _same_file(known, path):
        return known
    if known is not None or name in sys.stdlib_module_names:
        name = f"{stem}_{sha256_hex(str(path).encode())[:12]}"
    if path.suffix == ".ipynb":
        return _run_notebook(name, path)
    if name.startswith(f"{package}."):
        return _import(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=_SourceAsItIs(name, str(path)))
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise SpecError(f"{path.name!r} is not a Python file: give a .py or .ipynb file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _guarded(lambda: spec.loader.exec_module(module), name, path)
    return module


def _load_module(name: str, cwd: Path) -> types.ModuleType:
    if str(cwd) not in sys.path:
        sys.path.insert(0, str(cwd))
    importlib.invalidate_caches()
    top = name.partition(".")[0]
    if name not in sys.modules and importlib.util.find_spec(top) is None:
        near = [p.stem for p in cwd.glob("*.py")] + [p.parent.name for p in cwd.glob("*/__init__.py")]
        raise NotFound("module", name, near, hint="; to name a file, write path/file.py:name")
    return _import(name, None)


def _import(name: str, path: Path | None) -> types.ModuleType:
    module: list[types.ModuleType] = []
    _guarded(lambda: module.append(importlib.import_module(name)), name, path)
    return module[0]


class _SourceAsItIs(importlib.machinery.SourceFileLoader):
    """Compiles the file each time: cached bytecode of the same second and size may be that of the text before."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _guarded(run: Any, name: str, path: Path | None) -> None:
    """Run the user's code; whatever it raises becomes one message that says where."""
    try:
        run()
    except (KeyboardInterrupt, GeneratorExit):
        sys.modules.pop(name, None)
        raise
    except BaseException as exc:  # the user's code may raise anything, SystemExit included
        sys.modules.pop(name, None)
        if isinstance(exc, ModuleNotFoundError) and exc.name == name:
            raise NotFound("module", name) from exc
        raise BundleError(f"{path.name if path else name} cannot be loaded: {_describe(exc, path)}") from exc


def _describe(exc: BaseException, path: Path | None) -> str:
    what = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
    if isinstance(exc, SystemExit):
        what = f"it called sys.exit({exc.code!r}); put what should only run as a script under if __name__ == '__main__'"
    steps = traceback.extract_tb(exc.__traceback__)
    lines = [step.lineno for step in steps if path and step.filename.startswith(str(path))]
    if isinstance(exc, ModuleNotFoundError):
        what += f"; install it, or start in the folder that holds {exc.name}"
    return f"{what} (line {lines[-1]})" if lines else what


def _run_notebook(name: str, path: Path) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module

    def run() -> None:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells, 1):
            if cell["cell_type"] == "code":
                _run_cell(module, "".join(cell["source"]), f"{path}#{number}")

    _guarded(run, name, path)
    return module


def _run_cell(module: types.ModuleType, text: str, filename: str) -> None:
    """Run one cell. When it is not Python, lines of magics (`%`), shell (`!`) and help (`?`) are left out of it."""
    if text.lstrip().startswith("%%"):
        return
    try:
        tree = ast.parse(text, filename)
    except SyntaxError:
        text = "\n".join("" if line.lstrip().startswith(("%", "!", "?")) else line for line in text.splitlines())
        tree = ast.parse(text, filename)
    lines = [f"{line}\n" for line in text.splitlines()]
    linecache.cache[filename] = (len(text), None, lines, filename)
    exec(compile(tree, filename, "exec", dont_inherit=True), module.__dict__)


def _package_of(path: Path) -> str:
    parts: list[str] = []
    folder = path.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts)


def _same_file(module: types.ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()


def _callables_of(module: types.ModuleType) -> list[str]:
    """The names that could have been meant: functions and classes that the module defines itself."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, Function) or (callable(value) and getattr(value, "__module__", "") == module.__name__))
    ]
    return sorted(own)
