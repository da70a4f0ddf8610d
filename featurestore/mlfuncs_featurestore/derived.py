"""On-demand features and transforms: the user's function on columns, the same call offline and online.

Owns: handing columns to the function in the form its `mode` names, and checking what comes back. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.definitions import OnDemandView
from mlfuncs_featurestore.tables import as_table, cast_column


def evaluate(view: OnDemandView, function: Callable[..., Any], inputs: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
    """The view's fields from `inputs` (its sources by feature name and its request columns), as Arrow arrays.

    Modes: "pandas" hands over Series with Arrow dtypes, so that null and NaN stay apart; "numpy" arrays, where a null
    float is NaN and other nulls are refused, also inside lists and structs; "arrow" arrays. Raises InvalidInput when
    the result does not fit.
    """
    rows = len(next(iter(inputs.values()))) if inputs else 0
    result = function(**{name: _hand_over(name, array, view.mode) for name, array in inputs.items()})
    columns = _columns_of(view, result)
    computed = {}
    for name, kind in view.fields.items():
        if name not in columns:
            raise InvalidInput(f"on-demand view {view.name!r} returned no {name!r}; it returned {', '.join(columns)}")
        array = cast_column(name, _as_arrow(columns[name], rows), kind)
        if len(array) != rows:
            raise InvalidInput(f"on-demand view {view.name!r} returned {len(array)} values of {name!r} for {rows} rows")
        computed[name] = array
    return computed


def apply_transform(transform: Callable[..., Any], table: pa.Table) -> Any:
    """What a view's transform makes of a source table; it receives a pandas frame with Arrow dtypes."""
    import pandas as pd

    return transform(table.to_pandas(types_mapper=pd.ArrowDtype))


def _hand_over(name: str, array: pa.Array, mode: str) -> Any:
    if mode == "arrow":
        return array
    if mode == "pandas":
        import pandas as pd

        return pd.Series(pd.arrays.ArrowExtensionArray(array), name=name)
    if (lost := _type_with_nulls(array)) is not None:
        raise InvalidInput(f"{name!r} has nulls, which a numpy array of {lost} cannot hold; use mode='pandas'")
    return array.to_numpy(zero_copy_only=False)


def _type_with_nulls(array: pa.Array) -> pa.DataType | None:
    """The type, in the array or inside its lists and structs, that has nulls and is not float; None: there is none."""
    if array.null_count and not pa.types.is_floating(array.type):
        return array.type
    parts: list[pa.Array] = []
    if pa.types.is_nested(array.type):
        parts = array.flatten() if pa.types.is_struct(array.type) else [array.flatten()]
    return next(filter(None, map(_type_with_nulls, parts)), None)


def _columns_of(view: OnDemandView, result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if hasattr(result, "columns") or (hasattr(result, "__arrow_c_stream__") and not hasattr(result, "dtype")):
        table = as_table(result)
        return {name: table[name] for name in table.column_names}
    if len(view.fields) == 1:  # one array for the one field
        return {next(iter(view.fields)): result}
    raise InvalidInput(
        f"on-demand view {view.name!r} returned {type(result).__name__}; return a dict or frame with "
        f"{', '.join(view.fields)}"
    )


def _as_arrow(column: Any, rows: int) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks()
    if isinstance(column, pa.Array):
        return column
    if isinstance(column, (bool, int, float, str, bytes)) or column is None:
        return pa.array([column] * rows)
    arrow = getattr(column, "__arrow_array__", None)
    if hasattr(column, "to_numpy") and arrow is None:  # a pandas Series: its dtype says what a null is
        import numpy as np

        if isinstance(column.dtype, np.dtype) and column.dtype.kind in "fiub":
            return pa.array(column.to_numpy(), from_pandas=False)
        converted = pa.array(column, from_pandas=True)
        return converted.combine_chunks() if isinstance(converted, pa.ChunkedArray) else converted
    converted = pa.array(column)
    return converted.combine_chunks() if isinstance(converted, pa.ChunkedArray) else converted
