"""How a decorated function or class, and instances of such a class, go through pickle, cloudpickle and joblib.

One that can be imported by its name goes as that name. One of a script, a notebook or a function body goes by value, as
cloudpickle bytes inside the pickle, so that worker processes that never saw its `__main__` can read it; the process
that wrote it (and its forks) gets the very same object back.
"""

from __future__ import annotations

import copyreg
import itertools
import os
import pickle
import sys
import threading
import uuid
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfuncs.decorator import Function
    from mlfuncs.spec import FunctionSpec

_PROCESS = uuid.uuid4().hex
_count = itertools.count()
_live: weakref.WeakValueDictionary[str, Function[Any, Any]] = weakref.WeakValueDictionary()
_owners: weakref.WeakKeyDictionary[type, weakref.ref[Function[Any, Any]]] = weakref.WeakKeyDictionary()


class _Progress(threading.local):
    """Functions that are being written or read in this thread: a recursive one refers to itself by its token."""

    def __init__(self) -> None:
        self.writing: set[str] = set()
        self.reading: dict[str, Function[Any, Any]] = {}


_progress = _Progress()


def is_importable(item: Any) -> bool:
    """Whether importing an object's module and following its name gives that very object in another process."""
    module = getattr(item, "__module__", None)
    if module in (None, "__main__", "__mp_main__") or module not in sys.modules:
        return False
    found: Any = sys.modules[module]
    for part in item.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is item


def reduce_function(function: Function[Any, Any]) -> Any:
    """What `Function.__reduce__` returns: its name, or how to rebuild it from its value."""
    if is_importable(function):
        return function.__qualname__
    token = _token_of(function)
    if token in _progress.writing:
        return _restore, (token, b"", None)
    import cloudpickle

    _progress.writing.add(token)
    try:
        return _restore, (token, cloudpickle.dumps(function.target), function.spec)
    finally:
        _progress.writing.discard(token)


def register_class(function: Function[Any, Any]) -> None:
    """Let instances of a decorated class be pickled, although the class's name now holds the Function."""
    cls: Any = function.target
    _owners.setdefault(cls, weakref.ref(function))
    copyreg.pickle(cls, _reduce_instance)


def _reduce_instance(instance: Any) -> Any:
    reduced = instance.__reduce_ex__(4)
    cls = type(instance)
    owner = _owners.get(cls)
    function = owner() if owner else None
    newobj = copyreg.__newobj__  # type: ignore[attr-defined]
    if function is None or not isinstance(reduced, tuple) or reduced[0] is not newobj or is_importable(cls):
        return reduced
    return _new_instance, (function, *reduced[1][1:]), *reduced[2:]


def _new_instance(function: Function[Any, Any], *args: Any) -> Any:
    cls: Any = function.target
    return cls.__new__(cls, *args)


def _token_of(function: Function[Any, Any]) -> str:
    token = function.__dict__.get("_token")
    if token is None:
        token = function.__dict__["_token"] = f"{_PROCESS}-{os.getpid()}-{next(_count)}"
        _live[token] = function
    return token


def _restore(token: str, payload: bytes, spec: FunctionSpec) -> Function[Any, Any]:
    from mlfuncs.decorator import Function

    known = _live.get(token) or _progress.reading.get(token)
    if known is not None:
        return known
    made: Function[Any, Any] = Function.__new__(Function)
    _progress.reading[token] = made
    try:
        made.__init__(pickle.loads(payload), spec)  # type: ignore[misc]
    finally:
        del _progress.reading[token]
    made.__dict__["_token"] = token
    _live[token] = made
    return made
