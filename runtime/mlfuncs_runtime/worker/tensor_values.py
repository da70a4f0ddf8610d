"""Python values and the tensors they travel as, by the type hint: for the Open Inference Protocol.

Arrays as they are, lists and scalars by shape, a table as one tensor per column, anything else as JSON text in a BYTES
tensor of one element. A NamedTuple, dataclass, model or dict of columns gives one output tensor each.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput
from mlfuncs_runtime.worker.tensors import DATATYPES, numpy

if TYPE_CHECKING:
    import numpy as np

_SCALARS: dict[Any, str] = {float: "FP64", int: "INT64", bool: "BOOL", str: "BYTES", bytes: "BYTES"}
_TABLES = {("pandas", "DataFrame"), ("pyarrow", "Table"), ("polars", "DataFrame")}
_TEXT_TYPES = ("str_", "bytes_")  # numpy's names
ONLY_OUTPUT = "output"


@dataclasses.dataclass(frozen=True)
class TensorHint:
    """How one parameter or result is a tensor. `depth` is the number of dimensions, -1 when it is open."""

    kind: str  # "array", "list", "scalar", "table" or "json"
    datatype: str
    depth: int

    @property
    def shape(self) -> list[int]:
        """The shape for the metadata: -1 for a dimension of any length."""
        if self.kind in ("scalar", "json"):
            return [1]
        return [-1] * max(1, self.depth)


def tensor_hint(annotation: Any) -> TensorHint:
    """How values of a type travel as tensors.

    >>> tensor_hint(list[list[float]])
    TensorHint(kind='list', datatype='FP64', depth=2)
    """
    annotation = plain(annotation)
    if annotation in _SCALARS:
        return TensorHint("scalar", _SCALARS[annotation], 1)
    origin = typing.get_origin(annotation) or annotation
    if _module(origin) == "numpy" and getattr(origin, "__name__", "") == "ndarray":
        return TensorHint("array", _array_datatype(annotation), -1)
    if (_module(origin), getattr(origin, "__name__", "")) in _TABLES:
        return TensorHint("table", "FP64", 1)
    depth = 0
    while typing.get_origin(annotation) in (list, tuple) and typing.get_args(annotation):
        annotation, depth = plain(typing.get_args(annotation)[0]), depth + 1
    if depth and annotation in _SCALARS:
        return TensorHint("list", _SCALARS[annotation], depth)
    return TensorHint("json", "BYTES", 1)


def plain(annotation: Any) -> Any:
    """The type inside of Annotated; any other as it is."""
    if typing.get_origin(annotation) is typing.Annotated:
        return plain(typing.get_args(annotation)[0])
    return annotation


def _module(kind: Any) -> str:
    return str(getattr(kind, "__module__", "")).split(".")[0]


def _array_datatype(annotation: Any) -> str:
    """The datatype in `npt.NDArray[np.float32]`, BYTES for text and bytes; FP64 when the hint does not say."""
    for argument in typing.get_args(annotation)[1:]:
        for scalar in typing.get_args(argument):
            name = getattr(scalar, "__name__", "")
            if name in DATATYPES or name in _TEXT_TYPES:
                return DATATYPES.get(name, "BYTES")
    return "FP64"


def to_value(name: str, array: np.ndarray, hint: TensorHint, annotation: Any) -> Any:
    """A tensor as the Python value that a parameter's hint asks for. Raises InvalidInput."""
    if hint.kind == "array":
        if array.dtype == object and not typing.get_args(annotation):
            message = "text came, and the function takes an array of numbers or booleans"
            raise InvalidInput(f"input {name!r}: {message}", [{"field": name, "message": message}])
        wanted = _array_datatype(annotation)
        if wanted == "BYTES":
            return _to_text_array(name, array, annotation)
        declared = bool(typing.get_args(annotation)) and wanted != "FP64"
        return array.astype(_dtype(wanted), copy=False) if declared and array.dtype != object else _texts(array)
    if hint.kind == "list":
        return _texts(array, as_bytes=_holds_bytes(annotation)).tolist()
    return _texts(_single(name, array), as_bytes=annotation is bytes).tolist()[0]


def _to_text_array(name: str, array: np.ndarray, annotation: Any) -> np.ndarray:
    """A BYTES tensor as the array of text, or of bytes, that a hint asks for. Raises InvalidInput for others."""
    as_bytes = any(scalar is numpy().bytes_ for part in typing.get_args(annotation) for scalar in typing.get_args(part))
    texts = _texts(array, as_bytes)
    if array.dtype != object or (not as_bytes and any(isinstance(text, bytes) for text in texts.ravel())):
        message = "the function takes an array of bytes" if as_bytes else "the function takes an array of text in UTF-8"
        raise InvalidInput(f"input {name!r}: {message}", [{"field": name, "message": message}])
    return texts.astype(numpy().bytes_ if as_bytes else numpy().str_)


def to_document(name: str, array: np.ndarray) -> Any:
    """The JSON value in a BYTES tensor of one element. Raises InvalidInput."""
    try:
        return json.loads(_single(name, array)[0])
    except (TypeError, ValueError) as exc:
        raise InvalidInput(f"input {name!r} must be JSON text in a BYTES tensor: {exc}") from exc


def _single(name: str, array: np.ndarray) -> np.ndarray:
    """A tensor of one element as shape (1,). Raises InvalidInput for any other."""
    if array.size != 1:
        message = f"one value is needed, and the tensor has shape {list(array.shape)}"
        raise InvalidInput(f"input {name!r}: {message}", [{"field": name, "message": message}])
    return array.reshape(1)


def _dtype(datatype: str) -> str:
    return next(dtype for dtype, name in DATATYPES.items() if name == datatype)


def _holds_bytes(annotation: Any) -> bool:
    return annotation is bytes or any(_holds_bytes(argument) for argument in typing.get_args(annotation))


def _texts(array: np.ndarray, as_bytes: bool = False) -> np.ndarray:
    """BYTES elements as text, unless bytes are wanted or they are no UTF-8; other arrays unchanged."""
    if array.dtype != object or as_bytes:
        return array
    decoded = array.copy()
    try:
        decoded.ravel()[:] = [value.decode() for value in array.ravel()]
    except UnicodeDecodeError:
        return array
    return decoded


def to_table(columns: Mapping[str, np.ndarray], annotation: Any) -> Any:
    """Tensors as the columns of the table that a hint asks for. Raises InvalidInput when their lengths differ."""
    lengths = {name: array.size for name, array in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidInput(f"all columns of a table need one length: {lengths}")
    flat = {name: _texts(array).ravel() for name, array in columns.items()}
    module = _module(typing.get_origin(annotation) or annotation)
    if module == "pyarrow":
        import pyarrow as pa

        return pa.table(flat)
    if module == "polars":
        import polars as pl

        return pl.DataFrame(flat)
    import pandas as pd

    return pd.DataFrame(flat)


def output_hints(returns: Any) -> dict[str, TensorHint]:
    """The outputs that a return hint promises; none for a table, whose columns it does not name."""
    returns = plain(returns)
    names: Mapping[str, Any] = {}
    if isinstance(returns, type) and (
        dataclasses.is_dataclass(returns) or hasattr(returns, "_fields") or hasattr(returns, "model_fields")
    ):
        names = typing.get_type_hints(returns)
    hints = {name: tensor_hint(kind) for name, kind in names.items()} or {ONLY_OUTPUT: tensor_hint(returns)}
    return {name: hint for name, hint in hints.items() if hint.kind != "table"}


def to_outputs(result: Any) -> dict[str, np.ndarray]:
    """A result as named tensors. Raises TypeError or ValueError for a value that has no tensor form."""
    if hasattr(result, "_asdict"):
        return {name: _to_tensor(value) for name, value in result._asdict().items()}
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {f.name: _to_tensor(getattr(result, f.name)) for f in dataclasses.fields(result)}
    if hasattr(result, "model_dump"):
        return {name: _to_tensor(value) for name, value in result.model_dump().items()}
    module = _module(type(result))
    if module == "pandas" and hasattr(result, "columns"):
        return {str(name): _to_tensor(result[name].to_numpy()) for name in result.columns}
    if module == "pyarrow" and hasattr(result, "column_names"):
        return {name: _to_tensor(result[name].to_numpy()) for name in result.column_names}
    if module == "polars" and hasattr(result, "columns"):
        return {name: _to_tensor(result[name].to_numpy()) for name in result.columns}
    if isinstance(result, dict) and result and all(isinstance(name, str) for name in result):
        return {name: _to_tensor(value) for name, value in result.items()}
    return {ONLY_OUTPUT: _to_tensor(result)}


def _to_tensor(value: Any) -> np.ndarray:
    np = numpy()
    if isinstance(value, dict) or dataclasses.is_dataclass(value) or value is None:
        return np.array([json.dumps(value, default=_jsonable)], dtype=object)
    if isinstance(value, datetime.datetime | datetime.date | enum.Enum):
        return np.array([str(_jsonable(value))], dtype=object)
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    if isinstance(value, bytes | str):
        return np.array([value], dtype=object)
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged list
        return np.array([json.dumps(value, default=_jsonable)], dtype=object)
    if array.dtype.kind in "US":
        array = array.astype(object)
    elif array.dtype == object and not all(isinstance(item, str | bytes) for item in array.ravel()):
        return np.array([json.dumps(value, default=_jsonable)], dtype=object)
    return array.reshape(1) if array.ndim == 0 else array


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        return value.value
    for method in ("tolist", "isoformat", "model_dump"):
        if hasattr(value, method):
            return getattr(value, method)()
    return str(value)
