"""Entity keys as bytes: one canonical spelling per key, the same offline, online and in every process.

Owns: the key codec. Pure. 0, "" and b"" are keys; int64 is exact over its whole range; text is never made a number
or a number text; a null is no key.

Bytes of one key column: a tag and a payload, `i` decimal digits, `s` UTF-8, `u` 16 raw bytes, `b` raw bytes. A key of
several columns is each part after its length as 4 big-endian bytes, so that ("a", "bc") and ("ab", "c") differ.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlfuncs.errors import InvalidInput

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
_LENGTH = struct.Struct(">I")


def encode_key(values: Mapping[str, Any], keys: Mapping[str, str]) -> bytes:
    """The canonical bytes of one entity. `keys` maps key column to type ("int64", "string", "uuid", "bytes").

    >>> encode_key({"user_id": 0}, {"user_id": "int64"}), encode_key({"name": ""}, {"name": "string"})
    (b'i0', b's')

    Raises InvalidInput for a missing, null or ill-typed key.
    """
    parts = []
    for name, kind in keys.items():
        if name not in values:
            raise InvalidInput(
                f"entity key {name!r} is missing; the key is {', '.join(keys)}", [_field(name, "missing")]
            )
        parts.append(_ENCODERS[kind](name, values[name]))
    return _join(parts)


def encode_keys(columns: Mapping[str, Iterable[Any]], keys: Mapping[str, str]) -> list[bytes]:
    """The canonical bytes of many entities, given as equally long columns of Python values.

    >>> encode_keys({"user_id": [1, 2**53 + 1]}, {"user_id": "int64"})
    [b'i1', b'i9007199254740993']
    """
    parts: list[list[bytes]] = []
    for name, kind in keys.items():
        if name not in columns:
            raise InvalidInput(
                f"entity key {name!r} is missing; the key is {', '.join(keys)}", [_field(name, "missing")]
            )
        encode = _ENCODERS[kind]
        parts.append([encode(name, value) for value in columns[name]])
    if len({len(column) for column in parts}) > 1:
        lengths = ", ".join(f"{name}: {len(column)}" for name, column in zip(keys, parts, strict=True))
        raise InvalidInput(f"entity key columns differ in length ({lengths})")
    return parts[0] if len(parts) == 1 else [_join(row) for row in zip(*parts, strict=True)]


def decode_key(encoded: bytes, keys: Mapping[str, str]) -> dict[str, Any]:
    """The key columns of an entity, from its canonical bytes. Raises InvalidInput for bytes no encoder wrote.

    >>> decode_key(b"i9007199254740993", {"user_id": "int64"})
    {'user_id': 9007199254740993}
    """
    parts = [encoded] if len(keys) == 1 else _cut(encoded)
    if len(parts) != len(keys):
        raise InvalidInput(f"{encoded!r} is not a key of {', '.join(keys)}")
    return {name: _decode_part(part, kind) for part, (name, kind) in zip(parts, keys.items(), strict=True)}


def canonical(name: str, value: Any, kind: str) -> Any:
    """The one Python value of a key: int, str, lower-case UUID text, or bytes. Raises InvalidInput."""
    return _CANONICAL[kind](name, value)


def _join(parts: Sequence[bytes]) -> bytes:
    if len(parts) == 1:
        return parts[0]
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def _cut(encoded: bytes) -> list[bytes]:
    parts, position = [], 0
    while position + 4 <= len(encoded):
        (length,) = _LENGTH.unpack_from(encoded, position)
        parts.append(encoded[position + 4 : position + 4 + length])
        position += 4 + length
    if position != len(encoded):
        raise InvalidInput(f"{encoded!r} is not a key of several columns: it is cut short")
    return parts


def _decode_part(part: bytes, kind: str) -> Any:
    tag, payload = part[:1], part[1:]
    if tag != _TAGS[kind]:
        raise InvalidInput(f"{part!r} is not the key of an entity of type {kind}")
    if kind == "int64":
        return int(payload)
    if kind == "string":
        return payload.decode()
    return str(uuid.UUID(bytes=payload)) if kind == "uuid" else payload


def _canonical_int(name: str, value: Any) -> int:
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            value = _whole_number(name, value)
        value = value.__index__()
    if not INT64_MIN <= value <= INT64_MAX:
        raise _bad(name, value, "is outside int64")
    return value


def _whole_number(name: str, value: Any) -> int:
    """A float that pandas made of an int column with nulls is taken back while that is exact."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        raise _bad(name, value, "is a float beyond 2**53 and may have lost digits; keep the column as Int64")
    raise _bad(name, value, "is not a whole number")


def _canonical_string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad(name, value, "is not text; a key of type string is never made of a number")
    return value


def _encode_string(name: str, value: Any) -> bytes:
    try:
        return b"s" + _canonical_string(name, value).encode()
    except UnicodeEncodeError:
        raise _bad(name, value, "is not valid Unicode text: half of a surrogate pair stands alone") from None


def _canonical_uuid(name: str, value: Any) -> str:
    if isinstance(value, uuid.UUID):
        return str(value)
    try:
        return str(uuid.UUID(bytes=value) if isinstance(value, bytes) and len(value) == 16 else uuid.UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise _bad(name, value, "is not a UUID") from None


def _canonical_bytes(name: str, value: Any) -> bytes:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise _bad(name, value, "is not bytes")
    return bytes(value)


def _missing(name: str, keys: Mapping[str, str]) -> InvalidInput:
    return InvalidInput(f"entity key {name!r} is missing; the key is {', '.join(keys)}", [_field(name, "is missing")])


def _bad(name: str, value: Any, reason: str) -> InvalidInput:
    if value is None or value != value:
        reason = "is null; every row needs its key"
    return InvalidInput(f"entity key {name!r}: {value!r} ({type(value).__name__}) {reason}", [_field(name, reason)])


def _field(name: str, message: str) -> dict[str, str]:
    return {"field": name, "message": message}


_TAGS = {"int64": b"i", "string": b"s", "uuid": b"u", "bytes": b"b"}
_CANONICAL: dict[str, Callable[[str, Any], Any]] = {
    "int64": _canonical_int,
    "string": _canonical_string,
    "uuid": _canonical_uuid,
    "bytes": _canonical_bytes,
}
_ENCODERS: dict[str, Callable[[str, Any], bytes]] = {
    "int64": lambda name, value: b"i%d" % _canonical_int(name, value),
    "string": _encode_string,
    "uuid": lambda name, value: b"u" + uuid.UUID(_canonical_uuid(name, value)).bytes,
    "bytes": lambda name, value: b"b" + _canonical_bytes(name, value),
}
