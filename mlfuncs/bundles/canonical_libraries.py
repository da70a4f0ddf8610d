"""The canonical form of values from numpy, pandas, pyarrow, polars and pydantic; none of them is imported to look.

A table is written by what it shows: index, columns, types and values, not by how the library lays them out today.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfuncs.bundles.canonical import Encoder


def _encode_array(out: Encoder, value: Any) -> None:
    if type(value).__name__ != "ndarray":
        out.emit("array-class", type(value).__qualname__)
    out.emit("dtype", str(value.dtype.descr if value.dtype.names else value.dtype.str))
    out.emit("shape", str(value.shape))
    if value.dtype.names:
        for name in value.dtype.names:
            out.encode(value[name])
    elif value.dtype.hasobject:
        out.encode(value.ravel().tolist())
    else:
        out.emit("data", value.tobytes())


def _encode_frame(out: Encoder, value: Any) -> None:
    parts = [value.attrs, value.index]
    if value.ndim == 1:
        parts += [value.name, value.array]
    else:
        parts += [value.columns, *(value.iloc[:, position].array for position in range(value.shape[1]))]
    _encode_parts(out, f"frame:{type(value).__qualname__}", parts)


def _encode_index(out: Encoder, value: Any) -> None:
    kind = f"index:{type(value).__qualname__}"
    if hasattr(value, "levels"):
        parts = [value.get_level_values(level).array for level in range(value.nlevels)]
    elif hasattr(value, "step"):
        parts = [value.start, value.stop, value.step]
    else:
        parts = [value.array]
    _encode_parts(out, kind, [list(value.names), *parts])


def _encode_parts(out: Encoder, kind: str, parts: list[Any]) -> None:
    """Each part apart: whether two columns share an object is the library's own affair."""
    out.emit(kind, str(len(parts)))
    for part in parts:
        child = out.fork()
        child.encode(part)
        out.emit("part", child.hexdigest())


def _encode_pandas_array(out: Encoder, value: Any) -> None:
    out.emit("pandas-array", f"{type(value).__qualname__}:{value.dtype!s}")
    if hasattr(value, "categories"):
        _encode_parts(out, "categories", [value.categories, value.ordered, value.codes])
    elif hasattr(value, "asi8"):
        out.encode(value.asi8)
    elif type(value).__name__ == "NumpyExtensionArray":
        out.encode(value.to_numpy())
    else:
        out.encode(value.astype(object).tolist())


def _encode_arrow(out: Encoder, value: Any) -> None:
    import pyarrow

    table = value if isinstance(value, pyarrow.Table) else pyarrow.Table.from_batches([value])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    out.emit("arrow", sink.getvalue().to_pybytes())


def _encode_pydantic_decorator(out: Encoder, value: Any) -> None:
    names = [field.name for field in dataclasses.fields(value) if field.name != "cls_ref"]  # that holds an address
    out.encode_attributes({name: getattr(value, name) for name in names}, "validator")


def _encode_polars(out: Encoder, value: Any) -> None:
    frame = value.to_frame() if type(value).__name__ == "Series" else value
    out.emit("polars", type(value).__name__)
    out.encode(frame.rechunk().to_arrow())


def _refuse_file(out: Encoder, value: Any) -> None:
    raise out.refuse(value, "it is open only in this process")


_INDEXES = "Index RangeIndex MultiIndex CategoricalIndex DatetimeIndex TimedeltaIndex PeriodIndex IntervalIndex"
_ARRAYS = (
    "NumpyExtensionArray ArrowExtensionArray ArrowStringArray StringArray Categorical DatetimeArray TimedeltaArray "
    "PeriodArray IntegerArray FloatingArray BooleanArray IntervalArray SparseArray"
)
# by top-level module and class name
LIBRARY_ENCODERS: dict[tuple[str, str], Callable[[Encoder, Any], None]] = {
    ("numpy", "ndarray"): _encode_array,
    **{("pandas", name): _encode_frame for name in ("DataFrame", "Series")},
    **{("pandas", name): _encode_index for name in _INDEXES.split()},
    **{("pandas", name): _encode_pandas_array for name in _ARRAYS.split()},
    **{("pyarrow", name): _encode_arrow for name in ("Table", "RecordBatch")},
    **{("polars", name): _encode_polars for name in ("DataFrame", "Series")},
    ("pydantic", "Decorator"): _encode_pydantic_decorator,
    **{("_io", name): _refuse_file for name in ("TextIOWrapper", "BufferedReader", "BufferedWriter", "FileIO")},
}
