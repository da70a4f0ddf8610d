"""The spine: whose features at which times. Reading it, its keys and times per view, its digest.

Owns: turning any table into a Spine. Pure but for reading the table.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs.errors import InvalidInput, NotFound
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.hashing import hash_entities
from mlfuncs_featurestore.quality import key_column
from mlfuncs_featurestore.tables import as_table, to_utc

DEFAULT_TIMESTAMP = "event_timestamp"


@dataclass(frozen=True)
class Spine:
    """The rows that features are asked for. `table` is as it came, `at_us` the times in microseconds UTC.

    `frame` is the pandas frame it came as, or None.
    """

    table: pa.Table
    timestamp: str
    at_us: np.ndarray
    frame: Any = None

    @classmethod
    def read(cls, source: Any, timestamp: str | None = None) -> Spine:
        """The spine in `source`, any table. Raises InvalidInput when it has no usable time column."""
        table = as_table(source)
        name = _time_column(table, timestamp)
        array = table[name].combine_chunks()
        if array.null_count:
            row = pc.index(array.is_null(), True).as_py()
            raise InvalidInput(f"the spine's time {name!r} is null in {array.null_count} rows, first in row {row}")
        at_us = to_utc(name, array).cast(pa.int64()).to_numpy(zero_copy_only=False)
        is_frame = type(source).__module__.split(".")[0] == "pandas"
        return cls(table, name, at_us, source if is_frame else None)

    def entities(self, view: FeatureView) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        """Of the rows whose key is whole: the key columns, the bucket, and the row numbers."""
        columns = {}
        for name in view.keys:
            if name not in self.table.column_names:
                hint = f"(the key of view {view.name!r})"
                raise NotFound("spine column", name, self.table.column_names, hint=hint)
            array = self.table[name].combine_chunks()
            array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
            if pa.types.is_floating(array.type):
                array = pc.if_else(pc.is_nan(array), None, array)
            columns[name] = array
        rows = _whole_rows(list(columns.values()))
        if len(rows) < self.table.num_rows:
            columns = {name: array.take(pa.array(rows)) for name, array in columns.items()}
        keys = pa.table({name: _canonical(view, name, array) for name, array in columns.items()})
        hashes = hash_entities(column.combine_chunks() for column in keys.columns)
        return keys, (hashes % np.uint64(view.buckets)).astype(np.int32), rows

    @property
    def digest(self) -> str:
        """SHA-256 of the spine's columns and values."""
        return table_digest(self.table)


def _canonical(view: FeatureView, name: str, array: pa.Array) -> pa.Array:
    if pa.types.is_null(array.type):
        array = array.cast(pa.int64() if view.keys[name] == "int64" else pa.string())
    return key_column(name, array, view.keys[name])


def _whole_rows(columns: list[pa.Array]) -> np.ndarray:
    """Numbers of the rows in which no column is null."""
    whole = np.ones(len(columns[0]), bool)
    for column in columns:
        if column.null_count:
            whole &= column.is_valid().to_numpy(zero_copy_only=False)
    return np.flatnonzero(whole)


def _time_column(table: pa.Table, timestamp: str | None) -> str:
    if timestamp is not None:
        if timestamp not in table.column_names:
            raise NotFound("spine column", timestamp, table.column_names)
        return timestamp
    if DEFAULT_TIMESTAMP in table.column_names:
        return DEFAULT_TIMESTAMP
    times = [one.name for one in table.schema if pa.types.is_timestamp(one.type)]
    if len(times) != 1:
        found = f"it has {', '.join(times)}" if times else "it has no column of times"
        raise InvalidInput(f"which column of the spine is the time? {found}; say timestamp='...'")
    return times[0]


def table_digest(table: pa.Table) -> str:
    """SHA-256 of a table's column names, types and values; what lies under a null does not count."""
    digest = hashlib.sha256()
    for one in table.schema:
        digest.update(f"{one.name}\0{one.type}\0{table.num_rows}\0".encode())
        _digest_array(digest, table[one.name].combine_chunks())
    return digest.hexdigest()


def _digest_array(digest: Any, array: pa.Array) -> None:
    kind = array.type
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_dictionary(kind):
        _digest_array(digest, array.dictionary_decode())
        return
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            _digest_array(digest, pc.struct_field(array, [number]))
        return
    values = array.drop_null()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        digest.update(pc.list_value_length(values).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
        _digest_array(digest, pc.list_flatten(values))
    elif pa.types.is_null(kind):
        return
    elif pa.types.is_boolean(kind):
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    elif kind.num_buffers == 2:
        width = kind.bit_width // 8
        buffer = values.buffers()[1]
        digest.update(b"" if buffer is None else buffer[values.offset * width : (values.offset + len(values)) * width])
    else:  # text and bytes
        payload = values.cast(pa.large_binary())
        digest.update(pc.binary_length(payload).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
        _, offsets, data = payload.buffers()
        bounds = np.frombuffer(offsets, np.int64)[payload.offset : payload.offset + len(payload) + 1]
        digest.update(b"" if data is None else data[int(bounds[0]) : int(bounds[-1])])
