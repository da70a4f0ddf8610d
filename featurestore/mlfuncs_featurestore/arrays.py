"""Arrow arrays as the numpy arrays that kernels take.

Owns: the one trick that keeps numba from compiling each kernel twice. Arrow's zero-copy arrays are read-only, which to
numba is another type; kernels write to no input, so an input may as well be shown as writable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


class _Shown:
    """The same memory without the read-only flag; keeps its owner alive."""

    def __init__(self, owner: np.ndarray) -> None:
        self._owner = owner
        interface: dict[str, Any] = dict(owner.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def for_kernel(array: np.ndarray) -> np.ndarray:
    """`array` as kernels take it: contiguous, of the type that numba has compiled for. Not to be written to."""
    plain = np.ascontiguousarray(array)
    return plain if plain.flags.writeable else np.asarray(_Shown(plain))


def whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array; copied only where it has several chunks."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def nullable(values: np.ndarray, present: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Numbers in the memory of `values` as an array of the fixed-width type `kind`; null where `present` is 0."""
    bits = None if present.all() else pa.py_buffer(np.packbits(present != 0, bitorder="little"))
    return pa.Array.from_buffers(kind, len(values), [bits, pa.py_buffer(np.ascontiguousarray(values))])


def int64s(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of whole numbers, dates or times as int64 for a kernel; nulls are 0."""
    array = whole(column)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    elif pa.types.is_date32(array.type):
        array = array.cast(pa.int32())
    numbers = array.cast(pa.int64())
    return for_kernel((numbers.fill_null(0) if numbers.null_count else numbers).to_numpy(zero_copy_only=False))


def float64s(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of numbers as float64 for a kernel; nulls are 0."""
    array = whole(column)
    floats = array.cast(pa.float64())
    return for_kernel((floats.fill_null(0.0) if floats.null_count else floats).to_numpy(zero_copy_only=False))


def validity(array: pa.Array) -> np.ndarray:
    """1 where there is a value, 0 where there is null (uint8)."""
    if array.null_count == 0:
        return np.ones(len(array), np.uint8)
    return array.is_valid().to_numpy(zero_copy_only=False).astype(np.uint8)
