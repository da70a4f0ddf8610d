"""How values of a Python type travel between steps: as a parameter, as JSON in a text, or as an artifact."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mlfuncs.errors import SignatureError

Form = Literal["value", "json", "artifact"]  # "json": the value's JSON as the text of a STRING
_NATIVE = {
    int: "NUMBER_INTEGER",
    float: "NUMBER_DOUBLE",
    str: "STRING",
    bool: "BOOLEAN",
    list: "LIST",
    dict: "STRUCT",
}
_SEQUENCES = (list, set, frozenset, tuple)


def classify(hint: Any) -> tuple[Form, str]:
    """How a value of type `hint` travels, and as what."""
    if hint is Any:
        return "artifact", "system.Artifact"
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return classify(typing.get_args(hint)[0])
    if origin is Literal:
        return _of_values(typing.get_args(hint))
    if hint in _NATIVE and hint not in (list, dict):
        return "value", _NATIVE[hint]
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return _of_values([member.value for member in hint])
    title = _artifact_title(hint)
    if title:
        return "artifact", title
    if not _is_json(hint):
        return "artifact", "system.Artifact"
    if hint in _SEQUENCES or origin in _SEQUENCES:
        return "value", "LIST"
    if hint is dict or origin is dict or _is_record(hint):
        return "value", "STRUCT"
    return ("value", "STRING") if _is_text(hint) else ("json", "STRING")


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """(X, True) for X | None, else (hint, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(inner) < len(typing.get_args(hint)):
            return (inner[0] if len(inner) == 1 else typing.Union[tuple(inner)]), True  # noqa: UP007 - built here
    return hint, False


def is_artifact_list(hint: Any) -> bool:
    """Whether it is a list of values that travel as artifacts."""
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) is list and bool(arguments) and any(map(_artifact_title, _leaves(arguments[0])))


def _of_values(values: Any) -> tuple[Form, str]:
    """The port of a choice among `values`."""
    for kind, name in ((str, "STRING"), (int, "NUMBER_INTEGER"), (float, "NUMBER_DOUBLE")):
        if all(type(value) is kind for value in values):
            return "value", name
    return "json", "STRING"


def _artifact_title(hint: Any) -> str:
    """The system.* type of a class whose values have one; "" for others."""
    from mlfuncs import results
    from mlfuncs.codecs.tables import library_of

    if not inspect.isclass(hint):
        return ""
    if hint is results.Metrics:
        return "system.Metrics"
    if hint is results.ClassificationMetrics:
        return "system.ClassificationMetrics"
    if hint in (results.HTML, results.FigureImage) or _is_class_of("matplotlib.figure", "Figure", hint):
        return "system.HTML"
    if hint is results.Markdown:
        return "system.Markdown"
    if library_of(hint) or _is_class_of("numpy", "ndarray", hint):
        return "system.Dataset"
    if hasattr(hint, "fit") and (hasattr(hint, "get_params") or hasattr(hint, "predict")):
        return "system.Model"
    return "system.Artifact" if hint is bytes else ""


def _is_class_of(module: str, name: str, hint: type) -> bool:
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and issubclass(hint, found)


def _is_record(hint: Any) -> bool:
    return inspect.isclass(hint) and (
        dataclasses.is_dataclass(hint) or hasattr(hint, "model_fields") or typing.is_typeddict(hint)
    )


def _is_json(hint: Any) -> bool:
    """Whether every value of the type can be written as JSON and read back by its border."""
    if hint is Path:
        return True
    if any(_artifact_title(leaf) for leaf in _leaves(hint)):
        return False
    from mlfuncs.interface.validation import Writer

    try:
        return bool(Writer("value", hint).schema is not None)
    except SignatureError:
        return False


def _leaves(hint: Any) -> Iterator[Any]:
    """The classes that a type is made of."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
    if not arguments or typing.get_origin(hint) is Literal:
        yield hint
    for argument in arguments:
        yield from _leaves(argument)


def _is_text(hint: Any) -> bool:
    """Whether the type's JSON is always a string: datetime, date, UUID, Path, Decimal and the like."""
    from mlfuncs.interface.validation import Writer

    return Writer("value", hint).schema.get("type") == "string"
