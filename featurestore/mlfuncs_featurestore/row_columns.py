"""Many packed rows to columns at once: the fixed parts stacked into one numpy array, one view per field.

Owns: the vectorised half of the row codec (`rows` has the layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.rows import ABSENT, DELETED, HEADER, PRESENT, Columns

if TYPE_CHECKING:
    from mlfuncs_featurestore.rows import RowCodec
    from mlfuncs_featurestore.types import FeatureType

_NUMPY = {"bool": "?", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
_NUMPY |= {"timestamp": "<i8", "date": "<i4"}


def decode_columns(codec: RowCodec, rows: Sequence[bytes | None], names: Sequence[str]) -> Columns:
    """The `names` of `rows` as columns; see RowCodec.decode_columns."""
    size = codec.fixed_size
    layout = codec.layout.to_bytes(4, "little")
    ours = [row if row is not None and row[:4] == layout else None for row in rows]
    blank = bytes(size)
    stacked = b"".join([blank if row is None else row[:size] for row in ours])
    if len(stacked) != size * len(rows):
        raise InvalidInput("a stored row is cut short; materialize the view again")
    fixed = np.frombuffer(stacked, np.uint8).reshape(len(rows), size)
    flags = fixed[:, HEADER.size - 1]
    found = np.fromiter((row is not None for row in ours), bool, len(rows)) & ((flags & DELETED) == 0)
    event_us, created_us = _cut(fixed, 4, "<i8"), _cut(fixed, 12, "<i8")
    values, states = {}, {}
    for name in names:
        slot = codec.slots[name]
        state = (fixed[:, codec._states_at + slot.index // 4] >> (2 * (slot.index % 4))) & 3
        states[name] = np.where(found, state, ABSENT).astype(np.uint8)
        if slot.type.kind in _NUMPY:
            values[name] = _cut(fixed, slot.position, _NUMPY[slot.type.kind])
        elif slot.type.kind == "vector" and slot.type.element is not None:
            dtype = np.dtype((_NUMPY[slot.type.element.kind], (slot.type.size,)))
            values[name] = _cut(fixed, slot.position, dtype)
        else:
            values[name] = _objects(ours, states[name], slot)
    columns = Columns(found, event_us, created_us, values, states)
    others = [i for i, row in enumerate(rows) if row is not None and ours[i] is None]
    return _merge(codec, columns, rows, others, names) if others else columns


def _cut(fixed: np.ndarray, position: int, dtype: str | np.dtype) -> np.ndarray:
    kind = np.dtype(dtype)
    flat = np.ascontiguousarray(fixed[:, position : position + kind.itemsize])
    return flat.view(kind.base).reshape(len(fixed), *kind.shape)


def _objects(rows: Sequence[bytes | None], states: np.ndarray, slot: object) -> np.ndarray:
    from mlfuncs_featurestore.rows import _get

    column = np.empty(len(rows), object)
    for index in np.flatnonzero(states == PRESENT).tolist():
        column[index] = _get(rows[index], slot)  # type: ignore[arg-type]
    return column


def _merge(
    codec: RowCodec, columns: Columns, rows: Sequence[bytes | None], others: Sequence[int], names: Sequence[str]
) -> Columns:
    """Rows of older layouts, one by one, into copies of the columns."""
    found, event_us, created_us = columns.found.copy(), columns.event_us.copy(), columns.created_us.copy()
    values = {name: column.copy() for name, column in columns.values.items()}
    states = {name: column.copy() for name, column in columns.states.items()}
    for index in others:
        row = rows[index]
        assert row is not None
        stamp, decoded = codec.decode(row)
        found[index], event_us[index], created_us[index] = not stamp.deleted, stamp.event_us, stamp.created_us
        for name in names:
            if stamp.deleted or name not in decoded:
                continue
            states[name][index] = PRESENT if decoded[name] is not None else 1
            if decoded[name] is not None:
                values[name][index] = _plain(codec.fields[name], decoded[name])
    return Columns(found, event_us, created_us, values, states)


def _plain(kind: FeatureType, value: object) -> object:
    """Times as the integers that numpy columns hold."""
    if kind.kind in ("timestamp", "date"):
        from mlfuncs_featurestore.rows import pack_value

        return int.from_bytes(pack_value(kind, value), "little", signed=True)
    return value
