"""Arrow tables to packed rows, column by column: what `rows.RowCodec.encode` makes of each row, many at a time.

Owns: the vectorised encoder, and the choice of the newest row of each entity. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.keys import encode_keys
from mlfuncs_featurestore.offline import DELETED as DELETED_COLUMN
from mlfuncs_featurestore.offline import INGEST
from mlfuncs_featurestore.row_columns import _NUMPY
from mlfuncs_featurestore.rows import DELETED, HEADER, NULL, PRESENT, RowCodec, _Slot, pack_value
from mlfuncs_featurestore.types import FeatureType

_HEADER = np.dtype("<u4,<i8,<i8,<i8,u1")


@dataclass(frozen=True)
class Stamps:
    """Per row, int64: event time and created time (microseconds UTC), place in the order of ingest; bool: deleted."""

    event_us: np.ndarray
    created_us: np.ndarray
    sequence: np.ndarray
    deleted: np.ndarray


def read_stamps(view: FeatureView, rows: pa.Table) -> Stamps:
    """The stamps of rows as they are stored offline: with `__ingest`, and `__deleted` in views with an event_id."""
    event = whole_numbers(rows[view.timestamp])
    created = whole_numbers(rows[view.created_timestamp]) if view.created_timestamp else event
    if DELETED_COLUMN in rows.column_names:
        flags = rows[DELETED_COLUMN].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)
    else:
        flags = np.zeros(rows.num_rows, bool)
    return Stamps(event, created, whole_numbers(rows[INGEST]), flags)


def entity_keys(view: FeatureView, rows: pa.Table) -> list[bytes]:
    """The encoded entity key of each row, whose key columns are canonical (as `quality.conform` leaves them)."""
    names = list(view.keys)
    kind = view.keys[names[0]]
    if len(names) == 1 and kind == "int64":  # canonical already: one formatting a row
        return [b"i%d" % number for number in rows[names[0]].to_pylist()]
    if len(names) == 1 and kind == "string":
        return [b"s" + text for text in rows[names[0]].combine_chunks().cast(pa.binary()).to_pylist()]
    return encode_keys({name: rows[name].to_pylist() for name in names}, view.keys)


def pack_table(codec: RowCodec, rows: pa.Table, stamps: Stamps) -> list[bytes]:
    """The packed row of each table row; a field that the table does not have is absent in all of them."""
    count, size = rows.num_rows, codec.fixed_size
    fixed = np.zeros((count, size), np.uint8)
    header = np.zeros(count, _HEADER)
    header["f0"], header["f1"], header["f2"] = codec.layout, stamps.event_us, stamps.created_us
    header["f3"], header["f4"] = stamps.sequence, np.where(stamps.deleted, DELETED, 0)
    fixed[:, : HEADER.size] = header.view(np.uint8).reshape(count, HEADER.size)
    tails: list[list[bytes]] = []
    offsets, everywhere = np.full(count, size, np.int64), np.ones(count, bool)
    states = np.zeros((len(codec.slots) + 3) // 4, np.uint8)  # of the columns that have no nulls, for every row
    for name, slot in codec.slots.items():
        if name not in rows.column_names:
            continue
        array = rows[name].combine_chunks()
        valid, shift = everywhere, 2 * (slot.index % 4)
        if array.null_count:
            valid = array.is_valid().to_numpy(zero_copy_only=False)
            fixed[:, HEADER.size + slot.index // 4] |= np.where(valid, PRESENT, NULL).astype(np.uint8) << shift
        else:
            states[slot.index // 4] |= PRESENT << shift
        if slot.spans:
            parts = _variable(slot.type, array)
            lengths = np.fromiter(map(len, parts), np.int64, count)
            spans = np.empty((count, 2), "<u4")
            spans[:, 0], spans[:, 1] = np.where(valid, offsets, 0), lengths
            fixed[:, slot.position : slot.position + slot.width] = spans.view(np.uint8).reshape(count, 8)
            offsets = offsets + lengths
            tails.append(parts)
        else:
            _place(fixed, slot, array, valid)
    fixed[:, HEADER.size : HEADER.size + len(states)] |= states
    whole = fixed.tobytes()
    heads = [whole[start : start + size] for start in range(0, count * size, size)]
    return [b"".join(parts) for parts in zip(heads, *tails, strict=True)] if tails else heads


def _place(fixed: np.ndarray, slot: _Slot, array: pa.Array, valid: np.ndarray) -> None:
    """Write a column of fixed width into its slot; null entries stay zero."""
    kind = slot.type
    part = fixed[:, slot.position : slot.position + slot.width]
    if kind.kind in _NUMPY:
        values = fixed_numpy(kind, array).astype(_NUMPY[kind.kind], copy=False)
        part[:] = np.ascontiguousarray(values).view(np.uint8).reshape(len(part), slot.width)
    elif kind.kind == "vector" and kind.element is not None:
        numbers = pc.list_flatten(array).cast(kind.element.arrow).to_numpy(zero_copy_only=False)
        packed = np.ascontiguousarray(numbers.astype(_NUMPY[kind.element.kind], copy=False)).view(np.uint8)
        part[valid] = packed.reshape(int(valid.sum()), slot.width)
    else:  # decimals
        for row in np.flatnonzero(valid).tolist():
            part[row] = np.frombuffer(pack_value(kind, array[row].as_py()), np.uint8)


def fixed_numpy(kind: FeatureType, array: pa.Array) -> np.ndarray:
    """The values of a scalar column as numpy; nulls are zero, times and dates whole numbers."""
    if kind.kind == "timestamp":
        array = array.cast(pa.int64())
    elif kind.kind == "date":
        array = array.cast(pa.int32())
    if array.null_count:
        array = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
    return array.to_numpy(zero_copy_only=False)


def _variable(kind: FeatureType, array: pa.Array) -> list[bytes]:
    """The packed values of a column of differing lengths; b"" for null."""
    if kind.kind in ("string", "bytes"):
        return [b"" if value is None else value for value in array.cast(pa.binary()).to_pylist()]
    return [b"" if value is None else pack_value(kind, value) for value in array.to_pylist()]


def newest_of_each(keys: Sequence[bytes], stamps: Stamps) -> list[int] | None:
    """Places of the newest row of every key, or None when every key comes once."""
    if len(set(keys)) == len(keys):
        return None
    best: dict[bytes, tuple[int, int, int, int]] = {}
    triples = zip(stamps.event_us.tolist(), stamps.created_us.tolist(), stamps.sequence.tolist(), strict=True)
    for place, (key, order) in enumerate(zip(keys, triples, strict=True)):
        known = best.get(key)
        if known is None or (*order, place) > known:
            best[key] = (*order, place)
    return [known[3] for known in best.values()]


def whole_numbers(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of whole numbers or times without nulls as int64."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.cast(pa.int64()).to_numpy(zero_copy_only=False)


def to_arrow(kind: FeatureType, values: np.ndarray, states: np.ndarray) -> pa.Array:
    """A decoded column (see `rows.Columns`) as an Arrow array of the feature's type; all but PRESENT are null."""
    gone = states != PRESENT
    mask = gone if gone.any() else None
    if kind.kind == "timestamp":
        return pa.array(values, pa.int64(), mask=mask).cast(kind.arrow)
    if kind.kind == "date":
        return pa.array(values, pa.int32(), mask=mask).cast(kind.arrow)
    if kind.kind == "vector" and kind.element is not None:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.element.arrow, from_pandas=False)
        whole = pa.FixedSizeListArray.from_arrays(flat, kind.size)
        return whole if mask is None else pc.if_else(pa.array(~gone), whole, pa.nulls(len(gone), kind.arrow))
    if values.dtype == object:
        listed: list[Any] = [None if missing else value for value, missing in zip(values, gone, strict=True)]
        return pa.array(listed, kind.arrow, from_pandas=False)
    return pa.array(values, kind.arrow, mask=mask, from_pandas=False)
