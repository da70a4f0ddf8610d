"""How a decorated function shows in a notebook."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from mlfuncs.display import card_html, fold_html

if TYPE_CHECKING:
    from mlfuncs.decorator import Function


def function_html(function: Function[Any, Any]) -> str:
    """The function's name, kind and signature, what was declared beside its code, and its documentation, as HTML.

    Nothing is bundled or resolved for it: showing a function costs nothing and cannot fail.
    """
    from mlfuncs.interface.signature import function_kind

    spec, target = function.spec, function.target
    declared = {
        field.name: _shown(getattr(spec, field.name))
        for field in dataclasses.fields(spec)
        if field.name != "name" and getattr(spec, field.name) != _default(field)
    }
    name = getattr(target, "__name__", spec.name)
    facts = {"signature": f"{name}{inspect.signature(target)}".replace("__main__.", ""), **declared}
    doc = "" if inspect.isclass(target) and target.__doc__ is None else inspect.getdoc(target) or ""
    return card_html(spec.name, function_kind(target), facts, fold_html("documentation", doc))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "none"
    if dataclasses.is_dataclass(value):
        said = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        usual = {field.name: _default(field) for field in dataclasses.fields(value)}
        return ", ".join(f"{name}={one!r}" for name, one in said.items() if one != usual[name])
    return str(value)
