"""Tensors of the Open Inference Protocol v2 on the wire: JSON, and the binary tensor data extension.

Format: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md, and Triton's
docs/protocol/extension_binary_data.md. A binary message is the JSON, its length in Inference-Header-Content-Length,
then the raw tensors in the order of the JSON, little-endian and row-major; BYTES elements have a 4-byte length each.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    import numpy as np

DTYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
DATATYPES = {dtype: datatype for datatype, dtype in DTYPES.items()}


@dataclass(frozen=True)
class InferRequest:
    """A decoded request: arrays by input name (BYTES as an object array of bytes), and which outputs are wanted how."""

    id: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, bool]  # requested output -> as binary data; empty: all
    binary: bool  # for outputs that do not say
    parameters: Mapping[str, Any] = field(default_factory=dict)


def numpy() -> Any:
    """The numpy module. Raises MissingExtra."""
    try:
        import numpy as np
    except ModuleNotFoundError as exc:
        raise MissingExtra("the Open Inference Protocol (numpy)", "tables") from exc
    return np


def parse_request(body: bytes, header_length: int | None) -> InferRequest:
    """The request in a body whose JSON is `header_length` bytes long (None: all). Raises InvalidInput."""
    head = body if header_length is None else body[:header_length]
    if header_length is not None and not 0 <= header_length <= len(body):
        raise InvalidInput(f"Inference-Header-Content-Length is {header_length} but the body has {len(body)} bytes")
    try:
        document = json.loads(head)
    except ValueError as exc:
        raise InvalidInput(f"the inference request is not JSON: {exc}") from exc
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        raise InvalidInput("an inference request is a JSON object with a list 'inputs'")
    raw = memoryview(body)[len(head) :]
    inputs: dict[str, np.ndarray] = {}
    for item in document["inputs"]:
        name, array, used = _read_tensor(item, raw)
        if name in inputs:
            raise _wrong(name, "it came twice; an input is one tensor")
        inputs[name], raw = array, raw[used:]
    if raw:
        raise InvalidInput(f"{len(raw)} bytes of binary data belong to no input; set binary_data_size")
    parameters = _mapping(document.get("parameters"))
    binary = bool(parameters.get("binary_data_output", False))
    outputs = {
        str(item["name"]): bool(_mapping(item.get("parameters")).get("binary_data", binary))
        for item in document.get("outputs") or ()
        if isinstance(item, dict) and "name" in item
    }
    return InferRequest(str(document.get("id") or ""), inputs, outputs, binary, parameters)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_tensor(item: Any, raw: memoryview) -> tuple[str, np.ndarray, int]:
    """One input's name, its array, and how many bytes of `raw` it took."""
    try:
        name, datatype, shape = str(item["name"]), str(item["datatype"]), [int(n) for n in item["shape"]]
    except (KeyError, TypeError, ValueError) as exc:
        raise InvalidInput(f"an input tensor needs 'name', 'datatype' and 'shape': {exc}") from exc
    if datatype != "BYTES" and datatype not in DTYPES:
        raise _wrong(name, f"datatype {datatype!r} is not known; use BYTES or one of {', '.join(DTYPES)}")
    if any(n < 0 for n in shape):
        raise _wrong(name, f"shape {shape} has a negative dimension")
    size = _mapping(item.get("parameters")).get("binary_data_size")
    if size is None:
        return name, _from_json(name, datatype, shape, item.get("data")), 0
    if not isinstance(size, int) or not 0 <= size <= len(raw):
        raise _wrong(name, f"binary_data_size is {size} but {len(raw)} bytes are left")
    return name, _from_binary(name, datatype, shape, raw[:size]), size


def _from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> np.ndarray:
    np = numpy()
    if not isinstance(data, list):
        data = [data]
    flat = list(_flatten(data)) if any(isinstance(value, list) for value in data) else data
    if len(flat) != math.prod(shape):
        raise _wrong(name, f"{len(flat)} values came for shape {list(shape)}")
    if datatype == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise _wrong(name, "BYTES in JSON are strings; send other bytes as binary data")
        return _objects([value.encode() for value in flat]).reshape(shape)
    allowed = {bool} if datatype == "BOOL" else {int} if "INT" in datatype else {int, float}
    if not set(map(type, flat)) <= allowed:
        odd = next(value for value in flat if type(value) not in allowed)
        raise _wrong(name, f"{odd!r} is not {datatype}")
    try:
        return np.array(flat, dtype=DTYPES[datatype]).reshape(shape)
    except OverflowError as exc:
        raise _wrong(name, f"a value does not fit {datatype}: {exc}") from exc


def _flatten(data: list[Any]) -> Any:
    for value in data:
        if isinstance(value, list):
            yield from _flatten(value)
        else:
            yield value


def _from_binary(name: str, datatype: str, shape: Sequence[int], raw: memoryview) -> np.ndarray:
    np = numpy()
    count = math.prod(shape)
    if datatype == "BYTES":
        values = _split_bytes(name, raw)
        if len(values) != count:
            raise _wrong(name, f"{len(values)} BYTES elements came for shape {list(shape)}")
        return _objects(values).reshape(shape)
    dtype = np.dtype(DTYPES[datatype]).newbyteorder("<")
    if len(raw) != count * dtype.itemsize:
        raise _wrong(name, f"{len(raw)} bytes came; shape {list(shape)} of {datatype} has {count * dtype.itemsize}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _split_bytes(name: str, raw: memoryview) -> list[bytes]:
    values, start = [], 0
    while start < len(raw):
        if start + 4 > len(raw):
            raise _wrong(name, "the last BYTES element has no whole length")
        (length,) = struct.unpack_from("<I", raw, start)
        start += 4
        if start + length > len(raw):
            raise _wrong(name, f"a BYTES element of {length} bytes runs over the tensor's end")
        values.append(bytes(raw[start : start + length]))
        start += length
    return values


def _objects(values: Sequence[Any]) -> np.ndarray:
    np = numpy()
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _wrong(name: str, message: str) -> InvalidInput:
    return InvalidInput(f"input {name!r}: {message}", [{"field": name, "message": message}])


def datatype_of(array: np.ndarray) -> str:
    """The protocol's datatype of an array; text and objects are BYTES."""
    return DATATYPES.get(array.dtype.name, "BYTES")


def dump_response(
    head: Mapping[str, Any], outputs: Mapping[str, np.ndarray], request: InferRequest
) -> tuple[bytes, int | None]:
    """The response's body, and the length of its JSON when binary data follows it (else None)."""
    described: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, array in outputs.items():
        if request.outputs and name not in request.outputs:
            continue
        tensor: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if request.outputs.get(name, request.binary):
            blobs.append(_to_binary(array))
            tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            tensor["data"] = _to_json(array)
        described.append(tensor)
    document = {**head, **({"id": request.id} if request.id else {}), "outputs": described}
    text = json.dumps(document, allow_nan=False).encode()
    return (text + b"".join(blobs), len(text)) if blobs else (text, None)


def _to_binary(array: np.ndarray) -> bytes:
    np = numpy()
    if datatype_of(array) != "BYTES":
        return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    encoded = [_as_bytes(value) for value in array.ravel()]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


def _to_json(array: np.ndarray) -> list[Any]:
    np = numpy()
    if datatype_of(array) == "BYTES":
        return [_as_bytes(value).decode("utf-8", "replace") for value in array.ravel()]
    flat: list[Any] = array.ravel().tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [value if math.isfinite(value) else None for value in flat]
    return flat


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return value.encode() if isinstance(value, str) else str(value).encode()
