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

import decimal
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.row_values import moment_us as moment_us
from mlfuncs_featurestore.row_values import pack_value, unpack_value
from mlfuncs_featurestore.row_values import to_us as to_us
from mlfuncs_featurestore.types import FeatureType

if TYPE_CHECKING:
    import numpy as np

ABSENT, NULL, PRESENT = 0, 1, 2
DELETED = 1
HEADER = struct.Struct("<IqqqB")
_SPAN = struct.Struct("<II")


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
