"""JSON that gives back an equal value: what JSON cannot say is an object whose only member starts with "$".

    {"$tuple": [..]}  {"$set": [..]}  {"$frozenset": [..]}  {"$dict": [[key, value], ..]}    (keys that are not text)
    {"$float": "nan"}  {"$complex": [re, im]}  {"$decimal": "1.10"}  {"$bytes": "<base64>"}  {"$uuid": ".."}
    {"$datetime": "<ISO 8601>"}  {"$zoned": ["<ISO 8601 local time>", "Europe/Paris", fold]}  {"$date"}  {"$time"}
    {"$timestamp": ["Timestamp", count, "ns", "Europe/Paris"]}  {"$missing": "NaT"}                        (pandas)
    {"$timedelta": [days, seconds, microseconds]}  {"$path": ".."}  {"$array": "<base64 npy>"}  {"$scalar": ..}
    {"$table": ["<base64 parquet>", metadata]}  {"$enum": ["module:Class", "MEMBER"]}
    {"$object": ["module:Class", {field: value}]}  {"$model": [..]}              (dataclass, NamedTuple; pydantic)

A dict with one text key that starts with "$" is written as "$dict", so that no value is mistaken for a tag. Only exact
types are taken: a subclass of dict or float is not a dict or float, and has to go another way.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import decimal
import enum
import io
import json
import math
import pathlib
import re
import sys
import uuid
import zoneinfo
from collections.abc import Callable, Iterable
from typing import Any

from mlfuncs.codecs.untagged import class_name


class NotEncodable(Exception):
    """The value has no form in this format that comes back equal; another format must take it."""


def dumps(value: Any) -> bytes:
    """`value` as tagged JSON. Raises NotEncodable when it would not come back equal.

    >>> from mlfuncs.codecs.untagged import loads
    >>> loads(dumps({1: (2.5, {"a"})}))
    {1: (2.5, {'a'})}
    """
    try:
        return json.dumps(_tag(value), allow_nan=False, separators=(",", ":")).encode("ascii")
    except RecursionError as exc:
        raise NotEncodable("the value contains itself, or is nested too deeply") from exc
    except ValueError as exc:  # an integer of thousands of digits
        raise NotEncodable(str(exc)) from exc


_CLASS = re.compile(rb'"\$(?:enum|flag|object|model)":\["([^"]+)"')  # a quote inside text has a backslash before it


def classes_named(text: bytes) -> set[str]:
    """The classes, as "module:Class", that reading what `dumps` wrote takes.

    >>> classes_named(b'{"$enum":["shop:Colour","RED"]}')
    {'shop:Colour'}
    """
    return {name.decode() for name in _CLASS.findall(text)}


def _tag(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [_tag(item) for item in value]
    if kind is dict:
        return _tag_dict(value)
    if kind in _TAGGERS:
        return _TAGGERS[kind](value)
    return _tag_object(value)


def _tag_dict(value: dict[Any, Any]) -> Any:
    plain = all(type(key) is str for key in value)
    if plain and not (len(value) == 1 and next(iter(value)).startswith("$")):
        return {key: _tag(item) for key, item in value.items()}
    return {"$dict": [[_tag(key), _tag(item)] for key, item in value.items()]}


def _sorted(items: Iterable[Any]) -> list[Any]:
    return sorted((_tag(item) for item in items), key=json.dumps)  # the same set gives the same bytes


def _tag_datetime(value: datetime.datetime) -> Any:
    zone = value.tzinfo
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key:
        return {"$zoned": [value.replace(tzinfo=None).isoformat(), zone.key, value.fold]}
    if zone is None or type(zone) is datetime.timezone:
        if value.fold:
            raise NotEncodable("a datetime with fold and no zone")
        return {"$datetime": value.isoformat()}
    if type(zone).__module__.startswith("pydantic_core"):
        return {"$datetime": value.isoformat()}  # its zones are fixed offsets
    raise NotEncodable(f"time zone {zone!r}")


def _tag_time(value: datetime.time) -> Any:
    if value.tzinfo is not None or value.fold:
        raise NotEncodable("a time of day with a zone")
    return {"$time": value.isoformat()}


def _tag_path(value: pathlib.Path) -> Any:
    return {"$path": str(value)}


_TAGGERS: dict[type, Callable[[Any], Any]] = {
    tuple: lambda v: {"$tuple": [_tag(item) for item in v]},
    set: lambda v: {"$set": _sorted(v)},
    frozenset: lambda v: {"$frozenset": _sorted(v)},
    complex: lambda v: {"$complex": [_tag(v.real), _tag(v.imag)]},
    bytes: lambda v: {"$bytes": base64.b64encode(v).decode()},
    bytearray: lambda v: {"$bytearray": base64.b64encode(v).decode()},
    decimal.Decimal: lambda v: {"$decimal": str(v)},
    uuid.UUID: lambda v: {"$uuid": str(v)},
    datetime.datetime: _tag_datetime,
    datetime.date: lambda v: {"$date": v.isoformat()},
    datetime.time: _tag_time,
    datetime.timedelta: lambda v: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    zoneinfo.ZoneInfo: lambda v: {"$zone": v.key},
    pathlib.PosixPath: _tag_path,
    pathlib.WindowsPath: _tag_path,
}


def _tag_object(value: Any) -> Any:
    cls = type(value)
    if isinstance(value, enum.Enum):
        if isinstance(value, enum.Flag) and value.name not in cls.__members__:
            return {"$flag": [class_name(cls), value.value]}
        return {"$enum": [class_name(cls), value.name]}
    if isinstance(value, tuple) and hasattr(cls, "_fields"):
        return {"$object": [class_name(cls), {name: _tag(getattr(value, name)) for name in cls._fields}]}
    if hasattr(cls, "__pydantic_fields_set__") and hasattr(cls, "model_fields"):
        return {"$model": [class_name(cls), _model_state(value)]}
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
        if set(getattr(value, "__dict__", {})) - set(names):
            raise NotEncodable(f"a {cls.__name__} with attributes beside its fields")
        present = {name: _tag(getattr(value, name)) for name in names if hasattr(value, name)}
        return {"$object": [class_name(cls), present]}
    return _tag_data(value)


def _model_state(value: Any) -> dict[str, Any]:
    state = value.__getstate__()
    if state.get("__pydantic_private__"):
        raise NotEncodable(f"a {type(value).__name__} with private attributes")
    return {
        "fields": {name: _tag(item) for name, item in state["__dict__"].items()},
        "set": sorted(state["__pydantic_fields_set__"]),
        "extra": _tag(state.get("__pydantic_extra__")),
    }


def _tag_data(value: Any) -> Any:
    """Arrays, numpy scalars, tables and pandas scalars inside a value, in their own safe formats."""
    from mlfuncs.codecs import arrays, tables

    sink = io.BytesIO()
    numpy = sys.modules.get("numpy")
    if numpy is not None and (type(value) is numpy.ndarray or isinstance(value, numpy.generic)):
        arrays.write(value, sink)
        tag = "$array" if type(value) is numpy.ndarray else "$scalar"
        return {tag: base64.b64encode(sink.getvalue()).decode()}
    if tables.is_table(value):
        metadata = tables.write(value, sink)
        return {"$table": [base64.b64encode(sink.getvalue()).decode(), metadata]}
    pandas = sys.modules.get("pandas")
    if pandas is not None and (value is pandas.NA or value is pandas.NaT):
        return {"$missing": "NA" if value is pandas.NA else "NaT"}
    if pandas is not None and type(value) in (pandas.Timestamp, pandas.Timedelta):
        return {"$timestamp": [type(value).__name__, value.asm8.astype("int64").item(), value.unit, _zone_name(value)]}
    raise NotEncodable(f"a {type(value).__module__}.{type(value).__qualname__}")


def _zone_name(value: Any) -> str | None:
    zone = getattr(value, "tzinfo", None)
    if zone is None or isinstance(zone, zoneinfo.ZoneInfo):
        return None if zone is None else zone.key
    if zone == datetime.UTC:
        return "+00:00"
    raise NotEncodable(f"time zone {zone!r}")
