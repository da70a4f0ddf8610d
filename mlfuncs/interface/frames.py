"""Arrays and tables as JSON values and back, for numpy, pandas, polars and pyarrow.

No library is imported here: an annotation can only name a class whose library is loaded already.
"""

from __future__ import annotations

import datetime
import math
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_TABLE_SCHEMA = {
    "anyOf": [
        {"type": "object", "additionalProperties": {"type": "array"}, "title": "columns"},
        {"type": "array", "items": {"type": "object"}, "title": "rows"},
    ]
}
_NUMBER = {"b": "boolean", "i": "integer", "u": "integer", "f": "number", "U": "string"}
_INT64 = range(-(2**63), 2**63)

Description = tuple[
    type, str, Mapping[str, Any], Callable[[Any], Any] | None, Callable[[Any], Any] | None, Callable[[Any], None] | None
]


def describe(cls: type, args: tuple[Any, ...]) -> Description | None:
    """Class, name, JSON Schema, reader, writer and check of an array or table type; None for any other class."""
    numpy, pandas, polars, arrow = (sys.modules.get(name) for name in ("numpy", "pandas", "polars", "pyarrow"))
    if numpy is not None and issubclass(cls, numpy.ndarray):
        return _array(cls, _dtype_of(args))
    if numpy is not None and issubclass(cls, numpy.generic):
        return _scalar(cls)
    if pandas is not None and issubclass(cls, pandas.DataFrame):
        return cls, "a table (pandas)", _TABLE_SCHEMA, _read_pandas, _write_pandas, None
    if pandas is not None and issubclass(cls, pandas.Series):
        return cls, "a list of values", {"type": "array"}, _read_series, plain, None
    if polars is not None and issubclass(cls, polars.DataFrame):
        read = lambda value: polars.DataFrame(_columns(value), strict=True)  # noqa: E731
        return cls, "a table (polars)", _TABLE_SCHEMA, read, lambda value: plain(value.to_dict(as_series=False)), None
    if arrow is not None and issubclass(cls, arrow.Table):
        return cls, "a table (pyarrow)", _TABLE_SCHEMA, _read_arrow, lambda value: plain(value.to_pydict()), None
    return None


def plain(value: Any) -> Any:
    """`value` with every array, table and numpy scalar in it, at any depth, as plain Python values.

    >>> import numpy as np
    >>> plain({"p": np.array([0.5, 1.5]), "n": np.int64(3)})
    {'p': [0.5, 1.5], 'n': 3}
    """
    if value is None or isinstance(value, str | bool) or type(value) in (int, float):
        return value
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(plain(item) for item in value)
    numpy, pandas, polars, arrow = (sys.modules.get(name) for name in ("numpy", "pandas", "polars", "pyarrow"))
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        return _plain_numpy(value)
    if pandas is not None:
        if value is pandas.NA or value is pandas.NaT:
            return None
        if isinstance(value, pandas.DataFrame):
            return _write_pandas(value)
        if isinstance(value, pandas.Series | pandas.Index):
            return _plain_column(value)
        if isinstance(value, pandas.Timestamp):
            return value.isoformat()
    if polars is not None and isinstance(value, polars.DataFrame | polars.Series):
        return plain(value.to_dict(as_series=False) if isinstance(value, polars.DataFrame) else value.to_list())
    if arrow is not None and isinstance(value, arrow.Table | arrow.Array | arrow.ChunkedArray):
        return plain(value.to_pydict() if isinstance(value, arrow.Table) else value.to_pylist())
    return value


def _plain_numpy(value: Any) -> Any:
    if value.dtype.kind in "mM":  # tolist() gives bare integers for nanoseconds
        return plain(value.astype(str).tolist())
    listed = value.tolist()
    return plain(listed) if value.dtype.kind in "OV" else listed


def _plain_column(column: Any) -> list[Any]:
    missing = column.isna()
    values = plain(column.tolist())
    return [None if absent else item for item, absent in zip(values, missing, strict=True)] if any(missing) else values


def _dtype_of(args: tuple[Any, ...]) -> Any:
    """The numpy dtype in `NDArray[np.float64]` or `ndarray[shape, dtype[...]]`; None when it is not given."""
    import numpy

    for arg in args[1:]:
        scalar = (typing.get_args(arg) or (None,))[0]
        if isinstance(scalar, type) and issubclass(scalar, numpy.generic):
            try:
                return numpy.dtype(scalar)
            except TypeError:  # an abstract class like numpy.floating
                return None
    return None


def _array(cls: type, dtype: Any) -> Description:
    items = {"type": _NUMBER[dtype.kind]} if dtype is not None and dtype.kind in _NUMBER else {}
    schema = {"type": "array", "items": {"anyOf": [items, {"type": "array"}]} if items else {}}

    def check(value: Any) -> None:
        import numpy

        if dtype is not None and not numpy.can_cast(value.dtype, dtype, "safe"):
            raise ValueError(f"should be an array of {dtype}, not of {value.dtype}; convert it with .astype({dtype!s})")

    return cls, "an array", schema, lambda value: read_array(value, dtype), plain, check


def read_array(value: Any, dtype: Any = None) -> Any:
    """A numpy array of nested lists. Raises ValueError for ragged or mixed values and for a kind `dtype` is not.

    >>> read_array([[1, 2.5], [None, 4]])
    array([[1. , 2.5],
           [nan, 4. ]])
    """
    import numpy

    if not isinstance(value, list):
        raise ValueError(f"got {type(value).__name__}, write nested lists")
    kinds = {type(leaf) for leaf in _leaves(value)}
    if type(None) in kinds:
        if not kinds <= {type(None), int, float} or (dtype is not None and dtype.kind != "f"):
            raise ValueError("null only stands in an array of floats, where it is NaN")
        value, kinds = _with_nan(value), {float}
    _check_kinds(kinds, dtype)
    array = numpy.array(value, dtype=dtype)
    if array.dtype.kind == "O":
        raise ValueError("an integer is out of range of 64 bits")
    return array


def _check_kinds(kinds: set[type], dtype: Any) -> None:
    if dict in kinds:
        raise ValueError("an object is not an array element")
    if len(kinds) > 1 and kinds != {int, float}:
        raise ValueError("elements are of mixed types: " + ", ".join(sorted(_json_name(kind) for kind in kinds)))
    allowed: dict[str, set[type]] = {
        "b": {bool},
        "i": {int},
        "u": {int},
        "f": {int, float},
        "c": {int, float},
        "U": {str},
        "M": {str},
    }
    if dtype is None and str in kinds:
        raise ValueError("elements should be numbers or booleans, not string; for text write NDArray[np.str_]")
    if dtype is not None and dtype.kind in allowed and not kinds <= allowed[dtype.kind]:
        names = ", ".join(sorted(_json_name(kind) for kind in kinds))
        raise ValueError(f"elements should be {dtype}, not {names}")


def _json_name(kind: type) -> str:
    return {bool: "boolean", int: "integer", float: "number", str: "string"}.get(kind, kind.__name__)


def _leaves(value: list[Any]) -> Iterable[Any]:
    for item in value:
        if type(item) is list:
            yield from _leaves(item)
        else:
            yield item


def _with_nan(value: list[Any]) -> list[Any]:
    return [_with_nan(item) if type(item) is list else math.nan if item is None else item for item in value]


def _scalar(cls: Any) -> Description:
    import numpy

    kind = numpy.dtype(cls).kind if cls not in (numpy.generic, numpy.number, numpy.integer, numpy.floating) else "f"
    python = {"b": bool, "i": int, "u": int, "f": (int, float), "U": str}.get(kind, object)

    def read(value: Any) -> Any:
        if not isinstance(value, typing.cast("Any", python)) or (isinstance(value, bool) and kind != "b"):
            raise ValueError(f"got {value!r}")
        return cls(value)

    schema = {"type": _NUMBER[kind]} if kind in _NUMBER else {}
    return cls, f"a {cls.__name__}", schema, read, plain, None


def _columns(value: Any) -> dict[str, list[Any]]:
    """Column name to values, from columns or from rows; a member that a row lacks is None."""
    if isinstance(value, dict):
        for name, column in value.items():
            if not isinstance(column, list):
                raise ValueError(f"column {name!r} should be a list, not {type(column).__name__}")
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        return value
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError('write {"column": [values]} or a list of row objects')
    names = dict.fromkeys(name for row in value for name in row)
    return {name: [row.get(name) for row in value] for name in names}


def _read_pandas(value: Any) -> Any:
    import pandas

    return pandas.DataFrame({name: _read_series(column) for name, column in _columns(value).items()})


def _read_series(value: Any) -> Any:
    """A Series of JSON values; integers and booleans with nulls stay what they are (nullable dtypes)."""
    import pandas

    if not isinstance(value, list):
        raise ValueError(f"got {type(value).__name__}, write a list")
    kinds = {type(item) for item in value}
    if type(None) in kinds and kinds == {type(None), int} and all(v is None or v in _INT64 for v in value):
        return pandas.Series(value, dtype="Int64")
    if kinds == {type(None), bool}:
        return pandas.Series(value, dtype="boolean")
    if kinds <= {type(None), int, float} and float in kinds:
        return pandas.Series(value, dtype="float64")
    mixed = len(kinds - {type(None)}) > 1
    return pandas.Series(value, dtype=object) if mixed or kinds & {list, dict} else pandas.Series(value)


def _write_pandas(value: Any) -> dict[str, Any]:
    if not value.columns.is_unique:
        repeated = value.columns[value.columns.duplicated()][0]
        raise ValueError(f"the table has two columns named {repeated!r}; rename one")
    return {str(name): _plain_column(value[name]) for name in value.columns}


def _read_arrow(value: Any) -> Any:
    import pyarrow

    return pyarrow.table(_columns(value))


def fallback(value: Any) -> Any:
    """What a JSON encoder does with a value it does not know. Raises TypeError when nothing can be done."""
    import dataclasses
    import decimal
    import pathlib

    from mlfuncs import results

    changed = plain(value)
    if changed is not value:
        return changed
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="python")
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    if isinstance(value, decimal.Decimal | pathlib.PurePath):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        import base64

        return base64.b64encode(value).decode()
    if isinstance(value, datetime.timedelta):
        from pydantic_core import to_jsonable_python

        return to_jsonable_python(value)
    if isinstance(value, results.HTML | results.Markdown):
        return value.text
    if isinstance(value, results.ClassificationMetrics):
        return value.to_dict()
    if isinstance(value, results.FigureImage) or type(value).__module__ == "matplotlib.figure":
        return results.data_url(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"a {type(value).__name__} has no JSON form")
