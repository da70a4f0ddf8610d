"""Reading tagged JSON (see tagged.py): data only, no code is imported and no constructor of the user's is run."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import io
import json
import pathlib
import sys
import typing
import uuid
import zoneinfo
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mlfuncs.errors import ArtifactError


def loads(text: bytes | str, hint: Any = None) -> Any:
    """The value that `tagged.dumps` wrote. `hint` is a type whose classes are used where the text names one.

    A class that is neither in `hint` nor in a module that is loaded already raises ArtifactError: reading data never
    imports code.
    """
    known = known_classes(hint)
    try:
        return _untag(json.loads(text), known)
    except (KeyError, ValueError, TypeError, IndexError) as exc:
        raise ArtifactError(f"this is not a value that mlfuncs wrote: {exc}") from exc


def known_classes(hint: Any) -> dict[str, type]:
    """The classes that a type hint reaches, by the names that stand for them in tagged JSON."""
    return {class_name(cls): cls for cls in _classes_in(hint, set())}


def class_name(cls: type) -> str:
    """The name that stands for a class in tagged JSON: "module:Qualified.name"."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _untag(value: Any, known: Mapping[str, type]) -> Any:
    if type(value) is list:
        return [_untag(item, known) for item in value]
    if type(value) is not dict:
        return value
    if len(value) == 1:
        ((tag, body),) = value.items()
        if tag in _READERS:
            return _READERS[tag](body)
        if tag in _NESTED:
            return _NESTED[tag](body, known)
        if tag.startswith("$"):
            raise ArtifactError(f"unknown tag {tag!r}: a newer mlfuncs wrote this value")
    return {key: _untag(item, known) for key, item in value.items()}


def _read_array(text: str) -> Any:
    from mlfuncs.codecs import arrays

    return arrays.read(io.BytesIO(base64.b64decode(text)))


def _read_table(body: list[Any]) -> Any:
    from mlfuncs.codecs import tables

    return tables.read(io.BytesIO(base64.b64decode(body[0])), body[1])


def _read_zoned(body: list[Any]) -> datetime.datetime:
    local = datetime.datetime.fromisoformat(body[0])
    return local.replace(tzinfo=zoneinfo.ZoneInfo(body[1]), fold=body[2])


def _read_timestamp(body: list[Any]) -> Any:
    """A pandas Timestamp or Timedelta from [class, count since the epoch, unit, zone name]."""
    pandas = _pandas()
    name, count, unit, zone = body
    if name == "Timedelta":
        return pandas.Timedelta(count, unit=unit).as_unit(unit)
    made = pandas.Timestamp(count, unit=unit).as_unit(unit)
    return made if zone is None else made.tz_localize("UTC").tz_convert(_zone(zone))


def _zone(name: str) -> datetime.tzinfo:
    return datetime.UTC if name == "+00:00" else zoneinfo.ZoneInfo(name)


def _pandas() -> Any:
    import pandas

    return pandas


_READERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": base64.b64decode,
    "$bytearray": lambda body: bytearray(base64.b64decode(body)),
    "$decimal": decimal.Decimal,
    "$uuid": uuid.UUID,
    "$datetime": datetime.datetime.fromisoformat,
    "$zoned": _read_zoned,
    "$zone": zoneinfo.ZoneInfo,
    "$date": datetime.date.fromisoformat,
    "$time": datetime.time.fromisoformat,
    "$timedelta": lambda body: datetime.timedelta(*body),
    "$path": pathlib.Path,
    "$array": _read_array,
    "$scalar": lambda body: _read_array(body)[()],
    "$table": _read_table,
    "$timestamp": _read_timestamp,
    "$missing": lambda body: getattr(_pandas(), body),
}


def _untag_enum(body: list[Any], known: Mapping[str, type]) -> Any:
    cls = _find_class(body[0], known, enum.Enum)
    return typing.cast("Any", cls)[body[1]]


def _untag_object(body: list[Any], known: Mapping[str, type]) -> Any:
    """The object with the fields as they were; its constructor is not run a second time."""
    cls: Any = _find_class(body[0], known, object)
    fields = {name: _untag(item, known) for name, item in body[1].items()}
    if issubclass(cls, tuple) and hasattr(cls, "_make"):
        return cls._make(fields[name] for name in cls._fields)
    if not dataclasses.is_dataclass(cls):
        raise ArtifactError(f"{body[0]} is no longer a dataclass or NamedTuple; the stored value does not fit it")
    names = {field.name for field in dataclasses.fields(cls)}
    if names != set(fields):
        difference = ", ".join(sorted(names ^ set(fields)))
        raise ArtifactError(f"the fields of {body[0]} changed since the value was stored: {difference}")
    new: Any = object.__new__
    made = new(cls)
    for name, item in fields.items():
        object.__setattr__(made, name, item)
    return made


def _untag_model(body: list[Any], known: Mapping[str, type]) -> Any:
    cls: Any = _find_class(body[0], known, object)
    fields = {name: _untag(item, known) for name, item in body[1]["fields"].items()}
    if not hasattr(cls, "model_fields") or not set(fields) <= set(cls.model_fields):
        raise ArtifactError(f"the fields of {body[0]} changed since the value was stored")
    made = cls.__new__(cls)
    made.__setstate__(
        {
            "__dict__": fields,
            "__pydantic_fields_set__": set(body[1]["set"]),
            "__pydantic_extra__": _untag(body[1]["extra"], known),
            "__pydantic_private__": None,
        }
    )
    return made


_NESTED: dict[str, Callable[[Any, Mapping[str, type]], Any]] = {
    "$tuple": lambda body, known: tuple(_untag(item, known) for item in body),
    "$set": lambda body, known: {_untag(item, known) for item in body},
    "$frozenset": lambda body, known: frozenset(_untag(item, known) for item in body),
    "$dict": lambda body, known: {_untag(key, known): _untag(item, known) for key, item in body},
    "$complex": lambda body, known: complex(*(_untag(part, known) for part in body)),
    "$enum": _untag_enum,
    "$flag": lambda body, known: typing.cast("Any", _find_class(body[0], known, enum.Flag))(body[1]),
    "$object": _untag_object,
    "$model": _untag_model,
}


def _find_class(name: str, known: Mapping[str, type], parent: type) -> type:
    found: Any = known.get(name)
    if found is None:
        module, _, path = name.partition(":")
        found = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
    if not isinstance(found, type) or not issubclass(found, parent):
        raise ArtifactError(
            f"the value is a {name.replace(':', '.')}, and that class is not loaded here: import its module first, "
            "or pass hint=<the class>"
        )
    return found


def _classes_in(hint: Any, seen: set[int]) -> Iterable[type]:
    """Every class that `hint` reaches through its arguments and the fields of its classes."""
    if id(hint) in seen or hint is None:
        return
    seen.add(id(hint))
    for arg in typing.get_args(hint):
        yield from _classes_in(arg, seen)
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
        if hint.__module__ != "builtins" and (
            dataclasses.is_dataclass(hint) or hasattr(hint, "_fields") or hasattr(hint, "model_fields")
        ):
            try:
                hints = typing.get_type_hints(hint)
            except (NameError, TypeError):  # a forward reference that cannot be followed adds no classes
                return
            for field in hints.values():
                yield from _classes_in(field, seen)
