"""Is a parsed document shaped like a kfp v2 pipeline file? The walk that answers, with the place of each problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlfuncs_pipelines.ir_schema import MESSAGES, ONE_OF

_DURATION = re.compile(r"\d+(\.\d+)?s")
_INTEGER = re.compile(r"-?[0-9]+")
_SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "integer": (int, float, str),
    "number": (int, float),
    "struct": (dict,),
}
_FIELD_BY_SNAKE = {
    message: {re.sub(r"([A-Z])", lambda m: "_" + m[1].lower(), field): field for field in fields}
    for message, fields in MESSAGES.items()
}


@dataclass(frozen=True)
class Problem:
    """One fault of a pipeline file: where it is, what it is, and how to mend it.

    `blocks` is false for a fault that a backend refuses but that does not keep the pipeline from running here.
    """

    place: str
    message: str
    mend: str
    blocks: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.message}; {self.mend}"

    def to_dict(self) -> dict[str, Any]:
        """The problem as JSON-ready values."""
        return {"place": self.place, "message": self.message, "mend": self.mend, "blocks": self.blocks}


def canonical(value: Any, kind: str, place: str, problems: list[Problem]) -> Any:
    """`value` with snake_case field names made camelCase; every misfit with `kind` is appended to `problems`."""
    if kind in MESSAGES:
        return _message(value, kind, place, problems)
    if kind[0] == "[":
        return _list(value, kind[1:-1], place, problems)
    if kind[0] == "{":
        return _map(value, kind[1:-1], place, problems)
    if kind.startswith("enum:"):
        _check_enum(value, kind[5:].split("|"), place, problems)
    elif kind == "duration":
        if not isinstance(value, str) or not _DURATION.fullmatch(value):
            problems.append(Problem(place, f"{value!r} is not a duration", "write it like 30s"))
    elif kind == "integer" and not _is_integer(value):
        problems.append(Problem(place, f"{_short(value)} is not a whole number", "give a whole number"))
    elif kind != "any" and (not isinstance(value, _SCALARS[kind]) or (kind != "boolean" and isinstance(value, bool))):
        problems.append(Problem(place, f"{_short(value)} is not of type {kind}", f"give a {kind}"))
    return value


def _is_integer(value: Any) -> bool:
    """Protobuf's JSON writes large integers as text, and takes 3.0 for 3."""
    if isinstance(value, str):
        return bool(_INTEGER.fullmatch(value))
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def join(place: str, key: str) -> str:
    """The dotted place of `key` below `place`; the document itself has the empty place."""
    return f"{place}.{key}" if place else key


def _message(value: Any, kind: str, place: str, problems: list[Problem]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(Problem(place, f"{_short(value)} is not an object", f"write the fields of a {kind} here"))
        return {}
    fields, snake = MESSAGES[kind], _FIELD_BY_SNAKE[kind]
    made: dict[str, Any] = {}
    for key, item in value.items():
        name = key if key in fields else snake.get(str(key), "")
        if not name:
            near = difflib.get_close_matches(str(key), fields, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"remove it; fields here are {', '.join(fields)}"
            problems.append(Problem(join(place, str(key)), f"unknown field {key!r} of {kind}", mend, blocks=False))
        elif item is not None or fields[name] == "any":
            made[name] = canonical(item, fields[name], join(place, name), problems)
    for group in ONE_OF.get(kind, []):
        given = [name for name in group if name in made]
        if len(given) > 1:
            mend = f"keep only one of {', '.join(given)}"
            problems.append(Problem(place, f"{' and '.join(given)} exclude each other", mend))
    return made


def _list(value: Any, kind: str, place: str, problems: list[Problem]) -> list[Any]:
    if not isinstance(value, list):
        problems.append(Problem(place, f"{_short(value)} is not a list", "write a list"))
        return []
    return [canonical(item, kind, f"{place}[{index}]", problems) for index, item in enumerate(value)]


def _map(value: Any, kind: str, place: str, problems: list[Problem]) -> dict[str, Any]:
    if not isinstance(value, dict):
        problems.append(Problem(place, f"{_short(value)} is not an object", "write names and their values"))
        return {}
    return {str(key): canonical(item, kind, join(place, str(key)), problems) for key, item in value.items()}


def _check_enum(value: Any, allowed: list[str], place: str, problems: list[Problem]) -> None:
    if not (isinstance(value, str) and value in allowed) and not (type(value) is int and 0 <= value < len(allowed)):
        problems.append(Problem(place, f"{_short(value)} is not a known value", f"use one of {', '.join(allowed)}"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, known: Iterable[str], intro: str) -> str:
    """How to mend a wrong name: the near one that is known, else `intro` and the first of those known."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return (
        f"{intro} {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "there is none to refer to"
    )
