"""The values of a column of events in the forms that window kernels take, and their results as Arrow arrays.

Owns: `WindowColumn`. A form is made when it is first needed, and once for all windows.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs_featurestore import sum_kernels
from mlfuncs_featurestore.arrays import float64s, int64s, nullable, validity, whole

_NONE = np.empty(0, np.int64)
_WORDS = np.dtype("<i8")


class WindowColumn:
    """One value per event, in event order; nulls are left out of every window."""

    def __init__(self, array: pa.Array | pa.ChunkedArray) -> None:
        self.array = whole(array)
        kind = self.array.type
        self.is_float = pa.types.is_floating(kind)
        self.is_decimal = pa.types.is_decimal(kind)
        self.is_int = pa.types.is_integer(kind) or pa.types.is_boolean(kind)

    @cached_property
    def valid(self) -> np.ndarray:
        """1 where there is a value (uint8)."""
        return validity(self.array)

    @cached_property
    def ints(self) -> np.ndarray:
        """Integers, booleans, times and dates as int64; nulls are 0."""
        return int64s(self.array)

    @cached_property
    def bits(self) -> np.ndarray:
        """The bits of the numbers as float64, as int64; nulls are 0."""
        return (self.ints.astype(np.float64) if self.is_int else float64s(self.array)).view(np.int64)

    @cached_property
    def coded(self) -> tuple[np.ndarray, pa.Array]:
        """Each value's place among the sorted different values (null: -1), and those values."""
        array = self.array
        if self.is_float:  # one zero and one NaN
            positive = pc.if_else(pc.equal(array, 0.0), pa.scalar(0.0, array.type), array)
            array = pc.if_else(pc.is_nan(positive), pa.scalar(float("nan"), array.type), positive)
        encoded = array.dictionary_encode()
        order = pc.sort_indices(encoded.dictionary).to_numpy()
        places = np.empty(len(order) + 1, np.int64)
        places[order] = np.arange(len(order))
        places[-1] = -1
        indices = encoded.indices.fill_null(len(order)).to_numpy(zero_copy_only=False)
        return places[indices], encoded.dictionary.take(pa.array(order))

    def summands(self, is_counted_only: bool) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, float]:
        """(kind, low, high, valid, unit) as `sum_kernels.window_sums` takes them."""
        if is_counted_only:
            return sum_kernels.NOTHING, _NONE, _NONE, self.valid, 1.0
        if self.is_decimal:
            low, high = self._words
            return sum_kernels.DECIMALS, low, high, self.valid, 10.0**self.array.type.scale
        if self.is_int:
            return sum_kernels.INTS, self.ints, _NONE, self.valid, 1.0
        return sum_kernels.FLOATS, self.bits, _NONE, self.valid, 1.0

    @cached_property
    def _words(self) -> tuple[np.ndarray, np.ndarray]:
        """The low and high words of decimals as whole numbers of their last place."""
        words = np.frombuffer(self.array.buffers()[1], _WORDS).reshape(-1, 2)
        mine = words[self.array.offset : self.array.offset + len(self.array)]
        return np.ascontiguousarray(mine[:, 0]), np.ascontiguousarray(mine[:, 1])

    @property
    def ordered(self) -> np.ndarray:
        """int64 or the bits of float64 that are ordered as the values are; `restored` makes values of them again."""
        if self.is_float:
            return self.bits
        return self.coded[0] if self.is_decimal else self.ints

    def restored(self, picked: np.ndarray, present: np.ndarray) -> pa.Array:
        """Some of `ordered` (n,) as an array of the column's type; null where `present` (n,) is 0."""
        kind = self.array.type
        if self.is_decimal:
            return self.coded[1].take(pa.array(picked, mask=present == 0))
        if pa.types.is_boolean(kind):
            return pa.array(picked != 0, mask=present == 0)
        if self.is_float:
            return nullable(picked.view(np.float64).astype(kind.to_pandas_dtype(), copy=False), present, kind)
        width = np.dtype(f"i{kind.bit_width // 8}")
        return nullable(picked.astype(width, copy=False), present, kind)
