"""One entity's features as one packed byte string, and many of them back as columns.

Owns: the row codec. Pure; numpy and pyarrow are used by the column functions only.

Layout, little-endian, fixed part first so that equally laid out rows stack into one numpy array:

    u32 layout      CRC-32 of the field names and types: which codec wrote the row
    i64 event       event time, microseconds since the epoch, UTC
    i64 created     created time, the same unit
    i64 sequence    ingest order: the last tie-break between two writers
    u8  flags       1: deleted (a tombstone that only newer rows replace)
    ..  states      2 bits a field, 4 fields a byte: 0 absent, 1 null, 2 present
    ..  fixed       each field's value; strings, bytes, lists and structs have u32 offset and u32 length into the tail
    ..  tail        the values of differing length

Absent (never written), null (written as null) and NaN (a float like any other) stay apart. A row of another layout
is decoded by the codec of that layout and widened.
"""

from __future__ import annotations

import datetime
import decimal
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.types import FeatureType

if TYPE_CHECKING:
    import numpy as np

ABSENT, NULL, PRESENT = 0, 1, 2
DELETED = 1
HEADER = struct.Struct("<IqqqB")
_SPAN = struct.Struct("<II")
_CODES = {"bool": "?", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "float32": "f", "float64": "d"}
_CODES |= {"timestamp": "q", "date": "i"}
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_EPOCH_DAY = datetime.date(1970, 1, 1)
_MICROSECOND = datetime.timedelta(microseconds=1)


@dataclass(frozen=True)
class Stamp:
    """When a row happened, when it was known, and its place in the order of ingest. Compares newest-last."""

    event_us: int
    created_us: int
    sequence: int
    deleted: bool = False

    @property
    def order(self) -> tuple[int, int, int]:
        """Of two rows of one entity, the one with the greater order wins."""
        return (self.event_us, self.created_us, self.sequence)


@dataclass(frozen=True)
class Columns:
    """Decoded rows, column by column; everything has one entry per row asked for, in that order.

    `values[name]` is a numpy array (object dtype for kinds of differing length and decimals); an entry means
    something only where `states[name]` is PRESENT. A row that was not there has `found` False and states ABSENT.
    Times are int64 microseconds; date values are int32 days.
    """

    found: np.ndarray
    event_us: np.ndarray
    created_us: np.ndarray
    values: dict[str, np.ndarray]
    states: dict[str, np.ndarray]


class RowCodec:
    """Packs and unpacks the rows of one field list; `older` are the field lists that earlier rows were packed with."""

    def __init__(self, fields: Mapping[str, FeatureType], older: Sequence[Mapping[str, FeatureType]] = ()) -> None:
        self.fields = dict(fields)
        self.layout = layout_id(self.fields)
        self._slots, position = {}, HEADER.size + (len(self.fields) + 3) // 4
        self._states_at = HEADER.size
        for index, (name, kind) in enumerate(self.fields.items()):
            width = kind.width
            self._slots[name] = _Slot(index, position, width if width is not None else _SPAN.size, kind)
            position += self._slots[name].width
        self.fixed_size = position
        codecs = [RowCodec(one) for one in older]
        self._older = {codec.layout: codec for codec in codecs if codec.layout != self.layout}

    def encode(self, values: Mapping[str, Any], stamp: Stamp) -> bytes:
        """The packed row of `values`: a field that is not in it is absent, None is null. Raises InvalidInput."""
        row = bytearray(self.fixed_size)
        flags = DELETED if stamp.deleted else 0
        HEADER.pack_into(row, 0, self.layout, stamp.event_us, stamp.created_us, stamp.sequence, flags)
        tail = bytearray()
        for name, slot in self._slots.items():
            if name not in values:
                continue
            value = values[name]
            state = NULL if value is None else PRESENT
            row[self._states_at + slot.index // 4] |= state << (2 * (slot.index % 4))
            if value is not None:
                _put(row, tail, slot, name, value, self.fixed_size)
        return bytes(row + tail)

    def decode(self, row: bytes) -> tuple[Stamp, dict[str, Any]]:
        """The stamp and the values of a packed row; absent fields are left out, null ones are None."""
        codec = self._codec_of(row)
        values = {}
        for name, slot in codec._slots.items():
            state = row[codec._states_at + slot.index // 4] >> (2 * (slot.index % 4)) & 3
            if state != ABSENT and name in self.fields:
                values[name] = None if state == NULL else _get(row, slot)
        return read_stamp(row), values

    def decode_columns(self, rows: Sequence[bytes | None], names: Sequence[str] | None = None) -> Columns:
        """The rows as columns of `names` (default: all fields), None for a row that is not there.

        Raises InvalidInput for bytes that no known codec wrote.
        """
        from mlfuncs_featurestore.row_columns import decode_columns

        return decode_columns(self, rows, list(self.fields) if names is None else list(names))

    def _codec_of(self, row: bytes) -> RowCodec:
        (layout,) = struct.unpack_from("<I", row)
        if layout == self.layout:
            return self
        if layout not in self._older:
            raise InvalidInput(
                f"a stored row has the unknown layout {layout:#010x} (known: {self.layout:#010x} and "
                f"{len(self._older)} older); it was written by another definition: materialize the view again"
            )
        return self._older[layout]

    @cached_property
    def slots(self) -> dict[str, _Slot]:
        """Where each field lies in the fixed part."""
        return dict(self._slots)


@dataclass(frozen=True)
class _Slot:
    index: int  # place among the fields, for the state bits
    position: int  # first byte
    width: int  # bytes
    type: FeatureType

    @property
    def spans(self) -> bool:
        """Whether the slot holds offset and length of a value in the tail."""
        return self.type.width is None


def layout_id(fields: Mapping[str, FeatureType]) -> int:
    """A 32-bit number for a field list: names, types and order."""
    return zlib.crc32(";".join(f"{name}:{kind}" for name, kind in fields.items()).encode())


def read_stamp(row: bytes) -> Stamp:
    """The stamp of a packed row, whatever its layout."""
    _, event, created, sequence, flags = HEADER.unpack_from(row)
    return Stamp(event, created, sequence, bool(flags & DELETED))


def _put(row: bytearray, tail: bytearray, slot: _Slot, name: str, value: Any, fixed_size: int) -> None:
    try:
        packed = pack_value(slot.type, value)
    except (struct.error, TypeError, ValueError, AttributeError, OverflowError, decimal.InvalidOperation) as exc:
        raise InvalidInput(
            f"{name!r}: {value!r} ({type(value).__name__}) is not {slot.type}: {exc}",
            [{"field": name, "message": f"is not {slot.type}"}],
        ) from exc
    if slot.spans:
        _SPAN.pack_into(row, slot.position, fixed_size + len(tail), len(packed))
        tail += packed
    else:
        row[slot.position : slot.position + slot.width] = packed


def _get(row: bytes, slot: _Slot) -> Any:
    if slot.spans:
        offset, length = _SPAN.unpack_from(row, slot.position)
        return unpack_value(slot.type, row[offset : offset + length])
    return unpack_value(slot.type, row[slot.position : slot.position + slot.width])


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
