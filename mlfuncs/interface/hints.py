"""The types that a callable's annotations mean, wherever they were written.

`from __future__ import annotations` turns every annotation into text. The text is evaluated in the callable's module,
then in its closure, then among the names that stood around it when it was decorated (types local to a function).
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import sys
import types
import typing
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from mlfuncs.errors import SignatureError

# names of types local to a function, seen when the function inside was decorated
_SURROUNDINGS: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_MAX_FRAMES = 32  # how far up the stack a decorator's caller is looked for
_UNKNOWN = (NameError, TypeError, AttributeError, SyntaxError, ValueError, KeyError, IndexError)


def callable_of(target: Any) -> Callable[..., Any]:
    """The plain function (or method) that a call of `target` reaches; for a class, its `__call__`.

    Raises SignatureError when a class has no `__call__`, or `target` cannot be called.
    """
    target = getattr(target, "target", target) if type(target).__name__ == "Function" else target
    if inspect.isclass(target):
        method = target.__dict__.get("__call__") or getattr(target, "__call__", None)  # noqa: B004
        if not inspect.isroutine(method) or isinstance(method, types.MethodWrapperType):
            raise SignatureError(
                f"class {target.__qualname__} cannot be called per request; write def __call__(self, ...) in it"
            )
        return typing.cast("Callable[..., Any]", method)
    if not callable(target):
        raise SignatureError(f"{target!r} cannot be called; give a function or a class with __call__")
    return typing.cast("Callable[..., Any]", target)


def remember_surroundings(target: Any) -> None:
    """Keep the local types that `target`'s text annotations name, while the caller's frame still has them."""
    function = _innermost(callable_of(target))
    texts = [note for note in getattr(function, "__annotations__", {}).values() if isinstance(note, str)]
    if not texts or "<locals>" not in getattr(function, "__qualname__", ""):
        return
    known = _namespace(function)
    wanted = {name for text in texts for name in _names_in(text)} - set(known) - set(vars(builtins))
    found: dict[str, Any] = {}
    frame = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        found.update({name: frame.f_locals[name] for name in wanted - set(found) if name in frame.f_locals})
        if frame.f_back is None or not wanted - set(found):
            break
        frame = frame.f_back
    if found:
        _SURROUNDINGS[function] = found


def resolved_hints(target: Any) -> dict[str, Any]:
    """Parameter name (and "return") to its type, with every text annotation evaluated.

    A pickle of a function keeps its annotations but not the names that their text needs: whoever ships a function by
    value ships this dict too and puts it back as `__annotations__`. Raises SignatureError, naming the parameter.
    """
    function = _innermost(callable_of(target))
    if inspect.isclass(function):
        return {}
    namespace = _namespace(function)
    hints: dict[str, Any] = {}
    for name, note in getattr(function, "__annotations__", {}).items():
        hints[name] = _resolve(name, note, namespace)
    return hints


def known_hints(owner: Any) -> dict[str, Any]:
    """The own annotations of a function or class, text turned into the types it names where it can be.

    For shipping code by value: what names nothing here stays the text that it is.
    """
    notes = inspect.get_annotations(owner)
    if not notes:
        return {}
    names, local = _class_namespace(owner) if isinstance(owner, type) else (_namespace(owner), {})
    hints: dict[str, Any] = {}
    for name, note in notes.items():
        try:
            hints[name] = None if note is None else _evaluate(name, note, names, local)
        except _UNKNOWN:
            hints[name] = note
    return hints


def _evaluate(name: str, note: Any, names: dict[str, Any], local: dict[str, Any] | None = None) -> Any:
    holder = type("Hints", (), {"__annotations__": {name: note}})
    return unaliased(typing.get_type_hints(holder, names, local, include_extras=True)[name])


def unaliased(hint: Any) -> Any:
    """The type with every `type X = ...` alias (PEP 695; NumPy's NDArray is one) replaced by what it stands for.

    A recursive alias stays: pydantic knows what it means.
    """
    try:
        return _unaliased(hint, ())
    except RecursionError:
        return hint


def _unaliased(hint: Any, inside: tuple[Any, ...]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    alias = next((item for item in (hint, origin) if type(item).__name__ == "TypeAliasType"), None)
    if alias is not None:
        if alias in inside:
            raise RecursionError
        return _unaliased(alias.__value__[args] if args else alias.__value__, (*inside, alias))
    if not args or origin is typing.Literal:
        return hint
    if origin is typing.Annotated:
        inner = _unaliased(args[0], inside)
        return hint if inner is args[0] else typing.Annotated[(inner, *args[1:])]
    changed = tuple(_unaliased(arg, inside) for arg in args)
    return hint if all(new is old for new, old in zip(changed, args, strict=True)) else with_args(hint, changed)


def with_args(hint: Any, args: tuple[Any, ...]) -> Any:
    """The generic type or union `hint` with other arguments."""
    origin: Any = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[args]  # noqa: UP007  (the members are only known here)
    return hint.copy_with(args) if hasattr(hint, "copy_with") else origin[args]


def _resolve(name: str, note: Any, namespace: dict[str, Any]) -> Any:
    try:
        return _evaluate(name, note, namespace)
    except NameError as exc:
        raise SignatureError(
            f"the annotation {note!r} of {name!r} names {exc.name!r}, which is not defined when the function runs; "
            "import it at the top of the module, outside `if TYPE_CHECKING`"
        ) from exc
    except (TypeError, SyntaxError, AttributeError) as exc:
        raise SignatureError(f"the annotation {note!r} of {name!r} is not a type: {exc}") from exc


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function) and not inspect.isclass(function):
        function = type(function).__call__
    return getattr(function, "__func__", function)


def _namespace(function: Any) -> dict[str, Any]:
    names = dict(getattr(function, "__globals__", {}))
    code = getattr(function, "__code__", None)
    cells = zip(getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=False)
    names.update({name: value for name, cell in cells if (value := cell_value(cell)) is not EMPTY})
    with contextlib.suppress(TypeError):  # a builtin that cannot be referenced weakly has no surroundings
        names.update(_SURROUNDINGS.get(function, {}))
    return names


def _class_namespace(owner: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The global and local names in which the annotations of a class's body are written."""
    names: Mapping[str, Any] = getattr(sys.modules.get(owner.__module__), "__dict__", {})
    local: dict[str, Any] = {owner.__name__: owner}
    for method in own_methods(owner):
        names = method.__globals__
        pairs = zip(method.__code__.co_freevars, method.__closure__ or (), strict=True)
        local |= {name: v for name, cell in pairs if name != "__class__" and (v := cell_value(cell)) is not EMPTY}
    return dict(names), local


def own_methods(owner: type) -> list[types.FunctionType]:
    """The functions written in a class's body, not the ones that a library generated into it."""
    functions = [getattr(value, "__func__", value) for value in vars(owner).values()]
    return [
        function
        for function in functions
        if isinstance(function, types.FunctionType)
        and function.__globals__.get("__name__") == owner.__module__
        and not function.__code__.co_filename.startswith("<string>")
    ]


EMPTY = object()


def cell_value(cell: types.CellType) -> Any:
    """What a closure cell holds, or EMPTY."""
    try:
        return cell.cell_contents
    except ValueError:  # the enclosing function has not bound the name yet
        return EMPTY


def _names_in(text: str) -> set[str]:
    try:
        return set(compile(text, "<annotation>", "eval").co_names)
    except SyntaxError:
        return set()
