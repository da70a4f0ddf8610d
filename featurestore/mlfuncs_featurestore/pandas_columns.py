"""Arrow columns as pandas columns that lose nothing, the same in training and in serving.

Owns: `pandas_frame` and `pandas_column`, behind every `to_pandas` of the store. pandas' own conversion makes floats of
integers beside a null, also inside lists and structs, where digits beyond 2**53 are lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import pandas


def pandas_frame(table: pa.Table) -> pandas.DataFrame:
    """A table as a frame whose columns are those of `pandas_column`; an index that pandas stored in it comes back."""
    frame = table.to_pandas()
    for name in table.column_names:
        if name in frame.columns and _may_lose(table[name].type):
            frame[name] = pandas_column(table[name].combine_chunks(), frame.index)
    return frame


def pandas_column(array: pa.Array, index: Any) -> pandas.Series:
    """An array as a Series with `index` that loses nothing.

    Integers and booleans with nulls are Int64 and boolean; floats have NaN for null, unless they have both, and then
    are double[pyarrow]. Of vectors each value is a numpy array of the vector's type, of other lists a list of Python
    values, of structs a dict.
    """
    import pandas as pd

    kind = array.type
    if pa.types.is_nested(kind):
        return pd.Series(_nested(array), index=index, dtype=object)
    if array.null_count and (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return pd.Series(_masked(array), index=index)
    if array.null_count and pa.types.is_floating(kind) and pc.any(pc.is_nan(array)).as_py():
        return pd.Series(pd.arrays.ArrowExtensionArray(array), index=index)
    series = array.to_pandas()
    series.index = index
    return series


def _may_lose(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _nested(array: pa.Array) -> np.ndarray:
    """One object a row: None, a numpy array, a list or a dict."""
    values = np.empty(len(array), object)
    if pa.types.is_fixed_size_list(array.type) and pa.types.is_primitive(array.type.value_type):
        flat = array.flatten()  # without the elements of null rows
        if not flat.null_count:
            rows = flat.to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)
            for place, row in zip(np.flatnonzero(array.is_valid()).tolist(), rows, strict=True):
                values[place] = row
            return values
    for place, value in enumerate(array.to_pylist()):
        values[place] = value
    return values


def _masked(array: pa.Array) -> Any:
    import pandas as pd

    mask = array.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(array.type):
        return pd.arrays.BooleanArray(array.fill_null(False).to_numpy(zero_copy_only=False).copy(), mask.copy())
    return pd.arrays.IntegerArray(array.fill_null(0).to_numpy(zero_copy_only=False).copy(), mask.copy())
