"""Pickles that another process can read without the user's own files.

A class or function of an installed package goes by its name, as always. One of the user's own modules goes by its name
and by its value: a reader that can import the name gets its own class, so that `isinstance` holds there; a worker that
has only a bundle gets the packed one. What a script or notebook defines goes by value.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import sys
import types
from collections.abc import Iterable
from typing import Any, BinaryIO

from mlfuncs.bundles.packing import CodePickler
from mlfuncs.bundles.source import OWN_PACKAGES, is_by_value, is_installed_path
from mlfuncs.decorator import Function

_SCRIPT = frozenset({"__main__", "__mp_main__"})


def dump_portable(value: Any, sink: BinaryIO) -> None:
    """Pickle `value` into `sink`. Raises what pickling raises: PicklingError, TypeError, AttributeError..."""
    with PortablePickler(sink, _SCRIPT) as pickler:
        pickler.dump(value)


class PortablePickler(CodePickler):
    """The pickler for code, with a second way for what the user's own modules define."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | types.FunctionType | Function):
            module = getattr(obj, "__module__", None)
            if module not in _SCRIPT and is_users(module) and not is_by_value(obj, _SCRIPT):
                definition = _definition(obj)
                if definition is not None:
                    return _import_or_build, (module, obj.__qualname__, definition)
        return super().reducer_override(obj)


@functools.cache
def is_users(module: str | None) -> bool:
    """Whether a loaded module is the user's own: not of the standard library, installed, or ours."""
    top = (module or "").partition(".")[0]
    if not top or top in sys.stdlib_module_names or top in OWN_PACKAGES:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return bool(file) and not is_installed_path(str(file))


def users_modules(names: Iterable[str]) -> frozenset[str]:
    """Those of the loaded modules `names` that are the user's own."""
    return frozenset(name for name in names if is_users(name))


def _definition(obj: Any) -> bytes | None:
    """A class or function by value, with all it uses of the user's modules; None when that cannot be pickled.

    A module that keeps a lock or a connection in a global, say: its classes go by name alone then.
    """
    buffer = io.BytesIO()
    try:
        with CodePickler(buffer, _SCRIPT | users_modules(list(sys.modules))) as pickler:
            pickler.dump(obj)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError, NotImplementedError):
        return None
    return buffer.getvalue()


def _import_or_build(module: str, name: str, definition: bytes) -> Any:
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return pickle.loads(definition)
    return found
