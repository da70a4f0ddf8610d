"""Arrow IPC in and out: a table or array travels as a stream of record batches, without a detour through JSON.

In: Content-Type application/vnd.apache.arrow.stream. A function with one table parameter gets the table; one with one
array parameter gets the columns side by side, or the tensor itself when the stream has one column of fixed-size lists;
other parameters are taken from the query string as JSON. Out: when the caller accepts that type.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from mlfuncs.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    import pyarrow as pa

    from mlfuncs.interface.signature import Signature

ARROW = b"application/vnd.apache.arrow.stream"
_TABLES = {("pandas", "DataFrame"), ("pyarrow", "Table"), ("polars", "DataFrame")}


def _arrow() -> Any:
    try:
        import pyarrow as pa
    except ModuleNotFoundError as exc:
        raise MissingExtra("Arrow IPC (pyarrow)", "tables") from exc
    return pa


def table_parameter(signature: Signature) -> tuple[str, Any]:
    """The name and type of the one parameter that takes a table or array. Raises InvalidInput when there is not one."""
    found = [(p.name, p.annotation) for p in signature.parameters if _kind(p.annotation)]
    if len(found) != 1:
        raise InvalidInput(
            f"{signature.name} takes {len(found)} tables or arrays; Arrow IPC needs exactly one parameter of that kind"
        )
    return found[0]


def _kind(annotation: Any) -> str:
    """ "pandas", "pyarrow", "polars", "numpy", or "" for a type that is no table or array."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    origin = typing.get_origin(annotation) or annotation
    module, name = getattr(origin, "__module__", "").split(".")[0], getattr(origin, "__name__", "")
    if (module, name) in _TABLES or (module, name) == ("numpy", "ndarray"):
        return module
    return ""


def read_values(signature: Signature, body: bytes, query: bytes) -> dict[str, Any]:
    """The call's values in an Arrow stream and a query string. Raises InvalidInput."""
    pa = _arrow()
    name, annotation = table_parameter(signature)
    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as exc:
        raise InvalidInput(f"the body is not an Arrow IPC stream: {exc}") from exc
    values: dict[str, Any] = {name: _from_table(table, _kind(annotation))}
    for key, text in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return signature.validate_python(values)


def _from_table(table: pa.Table, kind: str) -> Any:
    if kind == "pyarrow":
        return table
    if kind == "pandas":
        return table.to_pandas()
    if kind == "polars":
        import polars as pl

        return pl.from_arrow(table)
    return _from_columns(table)


def _from_columns(table: pa.Table) -> Any:
    """A two-dimensional array of the columns, or of the rows of one column of fixed-size lists."""
    import numpy as np

    pa = _arrow()
    if table.num_columns == 1:
        column = table.column(0).combine_chunks()
        if isinstance(column.type, pa.FixedShapeTensorType):
            return column.to_numpy_ndarray()
        if pa.types.is_fixed_size_list(column.type):
            return np.asarray(column.flatten()).reshape(len(column), -1)
        return np.asarray(column)
    return np.column_stack([np.asarray(column) for column in table.columns])


def dump(result: Any) -> bytes:
    """A table, array, or dict of columns as an Arrow stream. Raises TypeError for another value."""
    pa = _arrow()
    table = _to_table(result, pa)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _to_table(result: Any, pa: Any) -> pa.Table:
    if isinstance(result, pa.Table):
        return result
    if isinstance(result, pa.RecordBatch):
        return pa.Table.from_batches([result])
    module = type(result).__module__.split(".")[0]
    if module == "polars" and hasattr(result, "to_arrow"):
        return result.to_arrow()
    if module == "pandas":
        frame = result if hasattr(result, "columns") else result.to_frame(name=result.name or "output")
        return pa.Table.from_pandas(frame, preserve_index=False)
    if module == "numpy" and hasattr(result, "ndim"):
        return _array_table(result, pa)
    if isinstance(result, Mapping) and result:
        return pa.table(dict(result))
    if isinstance(result, list):
        return pa.table({"output": result})
    raise TypeError(f"{type(result).__name__} has no Arrow form; return a table, an array or a dict of columns")


def _array_table(array: Any, pa: Any) -> pa.Table:
    if array.ndim <= 1:
        return pa.table({"output": array.reshape(-1)})
    return pa.table({"output": pa.FixedShapeTensorArray.from_numpy_ndarray(array)})
