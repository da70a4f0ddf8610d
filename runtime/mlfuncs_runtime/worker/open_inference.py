"""The Open Inference Protocol v2 over REST, from the type hints: what Triton's and KServe's clients speak.

Each parameter is an input tensor of its name: arrays as they are, lists and scalars by shape, a table as one tensor per
column, anything else as JSON text in a BYTES tensor of one element. The result maps back the same way; a NamedTuple,
dataclass, model or dict of columns gives one output tensor each.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import re
import typing
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlfuncs
from mlfuncs.errors import InvalidInput, MlfuncsError, NotFound
from mlfuncs.serving.request_context import CURRENT_REQUEST
from mlfuncs_runtime.worker.content_coding import read_body
from mlfuncs_runtime.worker.exchange import Exchange
from mlfuncs_runtime.worker.failures import bad_result
from mlfuncs_runtime.worker.handlers import item_type
from mlfuncs_runtime.worker.invocation import Invocation
from mlfuncs_runtime.worker.tensors import DATATYPES, InferRequest, dump_response, numpy, parse_request

if TYPE_CHECKING:
    import numpy as np

_MODEL = re.compile(r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?P<action>/ready|/infer)?")
_SCALARS: dict[Any, str] = {float: "FP64", int: "INT64", bool: "BOOL", str: "BYTES", bytes: "BYTES"}
_TABLES = {("pandas", "DataFrame"), ("pyarrow", "Table"), ("polars", "DataFrame")}
_ONLY_OUTPUT = "output"


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
    annotation = _plain(annotation)
    if annotation in _SCALARS:
        return TensorHint("scalar", _SCALARS[annotation], 1)
    origin = typing.get_origin(annotation) or annotation
    if _module(origin) == "numpy" and getattr(origin, "__name__", "") == "ndarray":
        return TensorHint("array", _array_datatype(annotation), -1)
    if (_module(origin), getattr(origin, "__name__", "")) in _TABLES:
        return TensorHint("table", "FP64", 1)
    depth = 0
    while typing.get_origin(annotation) in (list, tuple) and typing.get_args(annotation):
        annotation, depth = _plain(typing.get_args(annotation)[0]), depth + 1
    if depth and annotation in _SCALARS:
        return TensorHint("list", _SCALARS[annotation], depth)
    return TensorHint("json", "BYTES", 1)


def _plain(annotation: Any) -> Any:
    if typing.get_origin(annotation) is typing.Annotated:
        return _plain(typing.get_args(annotation)[0])
    return annotation


def _module(kind: Any) -> str:
    return str(getattr(kind, "__module__", "")).split(".")[0]


def _array_datatype(annotation: Any) -> str:
    """The datatype in `npt.NDArray[np.float32]`; FP64 when the hint does not say."""
    for argument in typing.get_args(annotation)[1:]:
        for scalar in typing.get_args(argument):
            name = getattr(scalar, "__name__", "")
            if name in DATATYPES:
                return DATATYPES[name]
    return "FP64"


class OpenInference:
    """Answers every path under /v2 for one handler."""

    def __init__(self, invocation: Invocation, unready: Any) -> None:
        self._invocation, self._unready = invocation, unready
        signature = invocation.handler.signature
        self._hints = {p.name: tensor_hint(p.annotation) for p in signature.parameters}
        self._annotations = {p.name: _plain(p.annotation) for p in signature.parameters}
        tables = [name for name, hint in self._hints.items() if hint.kind == "table"]
        self._table = tables[0] if len(tables) == 1 else None

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request; errors have the protocol's `error` beside the problem document's members."""
        try:
            await self._route(exchange)
        except MlfuncsError as exc:
            problem = {**exc.to_problem(exchange.request_id), "error": str(exc)}
            await exchange.answer(exc.status, json.dumps(problem, default=str).encode())

    async def _route(self, exchange: Exchange) -> None:
        path = exchange.path.rstrip("/")
        if path == "/v2":
            document = {"name": "mlfuncs", "version": mlfuncs.__version__, "extensions": ["binary_tensor_data"]}
            await self._get(exchange, document)
        elif path == "/v2/health/live":
            await self._get(exchange, {"live": True})
        elif path == "/v2/health/ready":
            await self._ready(exchange)
        elif match := _MODEL.fullmatch(path):
            await self._model(exchange, match["name"], match["version"], match["action"])
        else:
            raise NotFound("path", exchange.path, ["/v2", "/v2/health/live", "/v2/health/ready", self._base()])

    def _base(self) -> str:
        return f"/v2/models/{self._invocation.options.name}"

    async def _get(self, exchange: Exchange, document: Mapping[str, Any]) -> None:
        if exchange.method not in ("GET", "HEAD"):
            await exchange.refuse(405, "MethodNotAllowed", f"use GET on {exchange.path!r}", [(b"allow", b"GET, HEAD")])
        else:
            await exchange.answer(200, json.dumps(document).encode())

    async def _ready(self, exchange: Exchange) -> None:
        if reason := self._unready():
            await exchange.answer(503, json.dumps({"ready": False, "error": reason}).encode())
        else:
            await self._get(exchange, {"ready": True})

    async def _model(self, exchange: Exchange, name: str, version: str | None, action: str | None) -> None:
        options = self._invocation.options
        if name != options.name:
            raise NotFound("model", name, [options.name])
        if version not in (None, options.version):
            raise NotFound(f"version of model {name!r}", str(version), [options.version])
        if action is None:
            await self._get(exchange, self.metadata())
        elif action == "/ready":
            await self._ready(exchange)
        elif exchange.method != "POST":
            await exchange.refuse(405, "MethodNotAllowed", f"use POST on {exchange.path!r}", [(b"allow", b"POST")])
        else:
            await self._infer(exchange)

    def metadata(self) -> dict[str, Any]:
        """The model's metadata document."""
        handler, options = self._invocation.handler, self._invocation.options
        inputs = [
            {"name": name, "datatype": hint.datatype, "shape": hint.shape}
            for name, hint in self._hints.items()
            if hint.kind != "table"  # its columns are the inputs, and the hint does not name them
        ]
        returns = list[item_type(handler)] if self._invocation.streams else handler.signature.returns  # type: ignore[misc]
        outputs = [
            {"name": name, "datatype": hint.datatype, "shape": hint.shape}
            for name, hint in _output_hints(returns).items()
        ]
        return {
            "name": options.name,
            "versions": [options.version],
            "platform": "mlfuncs_python",
            "inputs": inputs,
            "outputs": outputs,
        }

    async def _infer(self, exchange: Exchange) -> None:
        body = await read_body(exchange, self._invocation.options.body_bytes)
        if body is None:
            return
        length = exchange.headers.get(b"inference-header-content-length")
        try:
            request = parse_request(body, None if length is None else int(length))
        except ValueError as exc:
            raise InvalidInput(f"Inference-Header-Content-Length is not a number: {length!r}") from exc
        values = self._invocation.handler.signature.validate_python(self._to_values(request.inputs))
        CURRENT_REQUEST.set(exchange)
        result = await self._invocation.collect(values, exchange)
        await self._respond(exchange, request, result)

    async def _respond(self, exchange: Exchange, request: InferRequest, result: Any) -> None:
        handler, options = self._invocation.handler, self._invocation.options
        try:
            outputs = to_outputs(result)
        except (TypeError, ValueError) as exc:
            raise bad_result(handler.name, InvalidInput(f"the result is no tensor: {exc}")) from exc
        if unknown := sorted(set(request.outputs) - set(outputs)):
            raise NotFound("output", unknown[0], outputs)
        head = {"model_name": options.name, "model_version": options.version}
        body, length = dump_response(head, outputs, request)
        if length is None:
            await exchange.answer(200, body)
        else:
            extra = [(b"inference-header-content-length", b"%d" % length)]
            await exchange.answer(200, body, b"application/octet-stream", extra)

    def _to_values(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        columns: dict[str, np.ndarray] = {}
        documents: dict[str, Any] = {}
        for name, array in inputs.items():
            if name in self._hints and self._hints[name].kind == "json":
                documents[name] = _to_document(name, array)
            elif name in self._hints and self._hints[name].kind != "table":
                values[name] = _to_value(name, array, self._hints[name], self._annotations[name])
            elif self._table is not None:
                columns[name] = array
            else:
                known = ", ".join(self._hints)
                message = f"there is no such input; the function takes {known}"
                raise InvalidInput(f"input {name!r}: {message}", [{"field": name, "message": message}])
        if self._table is not None and columns:
            values[self._table] = _to_table(columns, self._annotations[self._table])
        if documents:
            values |= self._documents.read(json.dumps(documents).encode())
        return values

    @cached_property
    def _documents(self) -> Any:
        """Reads the parameters that come as JSON text, as a JSON body's would be."""
        from mlfuncs.interface.validation import Reader

        signature = self._invocation.handler.signature
        parameters = [p for p in signature.parameters if self._hints[p.name].kind == "json"]
        return Reader(signature.name, parameters, None)


def _to_value(name: str, array: np.ndarray, hint: TensorHint, annotation: Any) -> Any:
    """A tensor as the Python value that a parameter's hint asks for. Raises InvalidInput."""
    if hint.kind == "array":
        if array.dtype == object and not typing.get_args(annotation):
            message = "text came, and the function takes an array of numbers or booleans"
            raise InvalidInput(f"input {name!r}: {message}", [{"field": name, "message": message}])
        wanted = _array_datatype(annotation)
        declared = bool(typing.get_args(annotation)) and wanted != "FP64"
        return array.astype(_dtype(wanted), copy=False) if declared and array.dtype != object else _texts(array)
    if hint.kind == "list":
        return _texts(array, as_bytes=_holds_bytes(annotation)).tolist()
    return _texts(_single(name, array), as_bytes=annotation is bytes).tolist()[0]


def _to_document(name: str, array: np.ndarray) -> Any:
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


def _to_table(columns: Mapping[str, np.ndarray], annotation: Any) -> Any:
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


def _output_hints(returns: Any) -> dict[str, TensorHint]:
    """The outputs that a return hint promises; none for a table, whose columns it does not name."""
    returns = _plain(returns)
    names: Mapping[str, Any] = {}
    if isinstance(returns, type) and (
        dataclasses.is_dataclass(returns) or hasattr(returns, "_fields") or hasattr(returns, "model_fields")
    ):
        names = typing.get_type_hints(returns)
    hints = {name: tensor_hint(kind) for name, kind in names.items()} or {_ONLY_OUTPUT: tensor_hint(returns)}
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
    return {_ONLY_OUTPUT: _to_tensor(result)}


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
