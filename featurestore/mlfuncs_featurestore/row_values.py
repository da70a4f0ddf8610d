"""One value of each feature type as bytes, and back; times as microseconds.

Owns: `pack_value` and `unpack_value`, which `rows` puts together. Pure.
"""

from __future__ import annotations

import datetime
import decimal
import struct
from collections.abc import Sequence
from typing import Any

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.types import FeatureType

_CODES = {"bool": "?", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "float32": "f", "float64": "d"}
_CODES |= {"timestamp": "q", "date": "i"}
_EXACT = {"float32": 2**24, "float64": 2**53}  # up to here every integer is one; Arrow's casts have the same bounds
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_EPOCH_DAY = datetime.date(1970, 1, 1)
_MICROSECOND = datetime.timedelta(microseconds=1)


def pack_value(kind: FeatureType, value: Any) -> bytes:
    """The bytes of one value that is not null."""
    if kind.kind == "timestamp":
        return struct.pack("<q", to_us(value))
    if kind.kind == "date":
        return struct.pack("<i", value if isinstance(value, int) else (value - _EPOCH_DAY).days)
    if kind.kind in _CODES:
        return struct.pack("<" + _CODES[kind.kind], _checked(kind.kind, value))
    if kind.kind == "string":
        return value.encode()
    if kind.kind == "bytes":
        return bytes(memoryview(value))
    if kind.kind == "decimal":
        return _unscaled(kind, value).to_bytes(16, "little", signed=True)
    if kind.kind == "vector":
        return _pack_vector(kind, value)
    if kind.kind == "struct":
        return _pack_many([member for _, member in kind.members], [value.get(name) for name, _ in kind.members])
    elements = list(value)
    assert kind.element is not None
    return _pack_many([kind.element] * len(elements), elements)


def unpack_value(kind: FeatureType, packed: bytes) -> Any:
    """The value whose bytes `pack_value` made."""
    if kind.kind == "timestamp":
        return _EPOCH + struct.unpack("<q", packed)[0] * _MICROSECOND
    if kind.kind == "date":
        return _EPOCH_DAY + datetime.timedelta(days=struct.unpack("<i", packed)[0])
    if kind.kind in _CODES:
        return struct.unpack("<" + _CODES[kind.kind], packed)[0]
    if kind.kind == "string":
        return packed.decode()
    if kind.kind == "bytes":
        return packed
    if kind.kind == "decimal":
        return decimal.Decimal(int.from_bytes(packed, "little", signed=True)).scaleb(-kind.scale, _WIDE)
    assert kind.kind == "struct" or kind.element is not None
    if kind.kind == "vector":
        return list(struct.unpack(f"<{kind.size}{_CODES[kind.element.kind]}", packed))  # type: ignore[union-attr]
    if kind.kind == "struct":
        members = _unpack_many(packed, [member for _, member in kind.members])
        return dict(zip((name for name, _ in kind.members), members, strict=True))
    return _unpack_many(packed, kind.element)


_WIDE = decimal.Context(prec=60)


def to_us(moment: Any) -> int:
    """Microseconds since the epoch of a datetime (naive: UTC) or of a whole number of microseconds.

    >>> to_us(datetime.datetime(1970, 1, 1, 0, 0, 1))
    1000000
    """
    if isinstance(moment, datetime.datetime):
        moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return (moment - _EPOCH) // _MICROSECOND
    if isinstance(moment, bool) or not hasattr(moment, "__index__"):
        raise TypeError("a time is a datetime or whole microseconds since the epoch")
    return moment.__index__()


def moment_us(name: str, moment: Any) -> int:
    """`to_us` of what a user gave as `name`. Raises InvalidInput."""
    try:
        return to_us(moment)
    except TypeError:
        raise InvalidInput(f"{name} must be a datetime, not {moment!r}") from None


def _checked(kind: str, value: Any) -> Any:
    if kind == "bool":
        if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
            raise TypeError("not True or False")
        return bool(value)
    if isinstance(value, (bool, str)):
        raise TypeError("not a number")
    if kind in _EXACT and isinstance(value, int) and not -_EXACT[kind] <= value <= _EXACT[kind]:
        raise ValueError(f"an integer beyond {_EXACT[kind]} would be rounded; give a float to have it so")
    return value


def _unscaled(kind: FeatureType, value: Any) -> int:
    exact = decimal.Decimal(value if not isinstance(value, float) else str(value)).scaleb(kind.scale, _WIDE)
    if exact != exact.to_integral_value() or abs(exact) >= 10**kind.precision:
        raise ValueError("it does not fit without rounding")
    return int(exact)


def _pack_vector(kind: FeatureType, value: Any) -> bytes:
    assert kind.element is not None
    elements = [_checked(kind.element.kind, one) for one in value]
    if len(elements) != kind.size:
        raise ValueError(f"it has {len(elements)} elements")
    return struct.pack(f"<{kind.size}{_CODES[kind.element.kind]}", *elements)


def _pack_many(kinds: Sequence[FeatureType], values: Sequence[Any]) -> bytes:
    """Each value after its length; the length 2**32-1 is a null."""
    parts = []
    for kind, value in zip(kinds, values, strict=True):
        packed = b"" if value is None else pack_value(kind, value)
        parts.append(struct.pack("<I", 2**32 - 1 if value is None else len(packed)) + packed)
    return b"".join(parts)


def _unpack_many(packed: bytes, kinds: Sequence[FeatureType] | FeatureType | None) -> list[Any]:
    values: list[Any] = []
    position = 0
    while position < len(packed):
        (length,) = struct.unpack_from("<I", packed, position)
        position += 4
        if length == 2**32 - 1:
            values.append(None)
            continue
        kind = kinds if isinstance(kinds, FeatureType) else kinds[len(values)]  # type: ignore[index]
        values.append(unpack_value(kind, packed[position : position + length]))
        position += length
    return values
