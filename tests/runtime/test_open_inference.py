"""Open Inference Protocol v2: Triton's own client against a real server, and the documents by hand."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import uvicorn
from pydantic import BaseModel

from mlfuncs.errors import InvalidInput
from mlfuncs.interface.hints import unaliased
from mlfuncs_runtime.worker.asgi import make_app
from mlfuncs_runtime.worker.invocation import AppOptions
from mlfuncs_runtime.worker.tensor_values import TensorHint, tensor_hint, to_outputs
from mlfuncs_runtime.worker.tensors import parse_request
from tests.runtime.test_asgi_app import Answer, ask


@contextlib.contextmanager
def served(target: Any) -> Iterator[str]:
    """The address of a server of `target` as model "demo", version "rev-1"."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(target, AppOptions(name="demo", version="rev-1"))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, http="httptools"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)


def post(address: str, document: Any, path: str = "/v2/models/demo/infer", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


def get(address: str, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content)


def scale(x: npt.NDArray[np.float32], factor: float = 2.0) -> npt.NDArray[np.float32]:
    return (x * factor).astype(np.float32)


class Scores(NamedTuple):
    label: list[str]
    score: npt.NDArray[np.float64]


def classify(rows: list[list[float]], names: list[str]) -> Scores:
    return Scores([names[int(sum(row) > 0)] for row in rows], np.array([sum(row) for row in rows]))


def summed(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"total": frame["a"] + frame["b"], "name": frame["name"].str.upper()})


def test_tritons_client_reads_metadata_and_health() -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    with served(scale) as address:
        client = triton.InferenceServerClient(address)
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("demo")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        metadata = client.get_model_metadata("demo", "rev-1")
        client.close()
    assert metadata["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1]},
        {"name": "factor", "datatype": "FP64", "shape": [1]},
    ]
    assert metadata["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1]}]


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_infers_on_arrays(binary: bool) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    with served(scale) as address:
        client = triton.InferenceServerClient(address)
        x = triton.InferInput("x", [2, 3], "FP32")
        x.set_data_from_numpy(rows, binary_data=binary)
        factor = triton.InferInput("factor", [1], "FP64")
        factor.set_data_from_numpy(np.array([10.0]), binary_data=binary)
        wanted = [triton.InferRequestedOutput("output", binary_data=binary)]
        result = client.infer("demo", [x, factor], outputs=wanted, request_id="r1", model_version="rev-1")
        unnamed = client.infer("demo", [x])
        zipped = client.infer("demo", [x], request_compression_algorithm="gzip")
        client.close()
    output = result.as_numpy("output")
    assert output.dtype == np.float32 and (output == rows * 10).all()
    assert result.get_response()["id"] == "r1" and result.get_response()["model_version"] == "rev-1"
    assert (unnamed.as_numpy("output") == rows * 2).all() and (zipped.as_numpy("output") == rows * 2).all()


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_sends_text_and_gets_several_outputs(binary: bool) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    with served(classify) as address:
        client = triton.InferenceServerClient(address)
        rows = triton.InferInput("rows", [2, 2], "FP64")
        rows.set_data_from_numpy(np.array([[1.0, 1.0], [-1.0, -1.0]]), binary_data=binary)
        names = triton.InferInput("names", [2], "BYTES")
        names.set_data_from_numpy(np.array(["no", "jä"], dtype=object), binary_data=binary)
        wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "score")]
        result = client.infer("demo", [rows, names], outputs=wanted)
        client.close()
    labels = [value.decode() if isinstance(value, bytes) else value for value in result.as_numpy("label")]
    assert labels == ["jä", "no"]
    assert result.as_numpy("score").tolist() == [2.0, -2.0]


def test_tritons_client_sees_our_errors() -> None:
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    with served(scale) as address:
        client = triton.InferenceServerClient(address)
        x = triton.InferInput("y", [1], "FP32")
        x.set_data_from_numpy(np.ones(1, dtype=np.float32))
        with pytest.raises(triton.InferenceServerException, match="no such input; the function takes x, factor"):
            client.infer("demo", [x])
        with pytest.raises(triton.InferenceServerException, match="no model is named 'other'"):
            client.get_model_metadata("other")
        client.close()


def test_a_table_is_one_tensor_per_column() -> None:
    document = {
        "inputs": [
            {"name": "a", "datatype": "INT64", "shape": [2], "data": [1, 2]},
            {"name": "b", "datatype": "INT64", "shape": [2, 1], "data": [[10], [20]]},
            {"name": "name", "datatype": "BYTES", "shape": [2], "data": ["x", "y"]},
        ]
    }
    with served(summed) as address:
        status, answer = post(address, document)
    assert status == 200
    assert answer == {
        "model_name": "demo",
        "model_version": "rev-1",
        "outputs": [
            {"name": "total", "datatype": "INT64", "shape": [2], "data": [11, 22]},
            {"name": "name", "datatype": "BYTES", "shape": [2], "data": ["X", "Y"]},
        ],
    }


def test_other_types_travel_as_json_text() -> None:
    def describe(options: dict[str, int]) -> dict[str, Any]:
        return {"keys": sorted(options), "deep": {"n": options["n"]}}

    tensor = {"name": "options", "datatype": "BYTES", "shape": [1], "data": ['{"n": 3}']}
    with served(describe) as address:
        status, answer = post(address, {"inputs": [tensor]})
    assert status == 200
    assert [output["data"] for output in answer["outputs"]] == [["n"], ['{"n": 3}']]


def test_refuses_what_does_not_fit() -> None:
    def one(x: int) -> int:
        return x

    def tensor(**changes: Any) -> Any:
        return {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [1], **changes}]}

    with served(one) as address:
        assert post(address, tensor())[1]["outputs"] == [
            {"name": "output", "datatype": "INT64", "shape": [1], "data": [1]}
        ]
        for changes in ({"shape": [2]}, {"data": [1.5]}, {"data": [True]}, {"datatype": "INT128"}, {"shape": [-1]}):
            status, answer = post(address, tensor(**changes))
            assert status == 422 and "'x'" in answer["error"]
        two = post(address, tensor(shape=[2], data=[1, 2]))
        assert two[0] == 422 and "one value is needed" in two[1]["error"]
        assert post(address, {"inputs": []})[0] == 422
        assert post(address, {"inputs": tensor()["inputs"], "outputs": [{"name": "nope"}]})[0] == 404
        assert post(address, b"not json")[0] == 422
        assert post(address, tensor(), path="/v2/models/demo/versions/rev-9/infer")[0] == 404
        assert get(address, "/v2/models/demo/infer")[0] == 405
        assert get(address, "/v2/models/demo/ready") == (200, {"ready": True})


def test_reads_binary_tensors_in_order_and_refuses_wrong_lengths() -> None:
    text = struct.pack("<I", 2) + b"hi" + struct.pack("<I", 0)
    head = json.dumps(
        {
            "inputs": [
                {"name": "a", "datatype": "INT16", "shape": [2], "parameters": {"binary_data_size": 4}},
                {"name": "b", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(text)}},
            ]
        }
    ).encode()
    request = parse_request(head + struct.pack("<hh", -1, 2) + text, len(head))
    assert request.inputs["a"].tolist() == [-1, 2]
    assert request.inputs["b"].tolist() == [b"hi", b""]
    for body, length in ((head, len(head)), (head + b"\0" * 99, len(head)), (head, len(head) + 1)):
        with pytest.raises(InvalidInput):
            parse_request(body, length)


def test_maps_hints_to_tensors() -> None:
    assert tensor_hint(list[list[int]]) == TensorHint("list", "INT64", 2)
    assert tensor_hint(unaliased(npt.NDArray[np.uint8])).datatype == "UINT8"
    assert tensor_hint(np.ndarray).datatype == "FP64"
    assert tensor_hint(bool).shape == [1]
    assert tensor_hint(dict[str, int]).kind == "json"


def test_turns_results_into_tensors() -> None:
    assert {name: value.tolist() for name, value in to_outputs({"a": [1, 2], "b": None}).items()} == {
        "a": [1, 2],
        "b": ["null"],
    }
    assert to_outputs([[1, 2], [3]])["output"].tolist() == ["[[1, 2], [3]]"]
    assert to_outputs(1.5)["output"].shape == (1,)


@dataclass
class Query:
    words: list[str]
    limit: int = 3


class Place(BaseModel):
    city: str


def search(query: Query) -> int:
    return len(query.words) * query.limit


def search_near(query: Query, place: Place, since: datetime.date, boosts: list[float], note: str = "") -> str:
    return f"{query.words} {place.city} {since.year} {sum(boosts)}{note}"


def total(x: np.ndarray) -> float:
    return float(x.sum())


def count_up(n: int) -> Iterator[int]:
    yield from range(n)


async def count_up_later(n: int) -> AsyncIterator[int]:
    for number in range(n):
        yield number


def endless(n: int) -> Iterator[int]:
    while True:
        yield n


def shout(words: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    assert words.dtype.kind == "U"
    return np.char.upper(words)


def turn(words: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bytes_]:
    assert words.dtype.kind == "S"
    return words[::-1]


@pytest.mark.parametrize(
    ("target", "sent", "given"), [(shout, [b"a", "ü".encode()], ["A", "Ü"]), (turn, [b"\xff", b"b"], ["b", "\ufffd"])]
)
def test_arrays_of_text_and_bytes_come_and_go_as_bytes_tensors(
    target: Any, sent: list[bytes], given: list[str]
) -> None:
    raw = b"".join(struct.pack("<I", len(word)) + word for word in sent)
    tensor = {"name": "words", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    answer = ask(target, head + raw, AppOptions(name="demo"), path="/v2/models/demo/infer", headers=headers)
    (output,) = answer.json["outputs"]
    assert (output["datatype"], output["shape"], output["data"]) == ("BYTES", [2], given)
    metadata = ask(target, None, AppOptions(name="demo"), method="GET", path="/v2/models/demo").json
    assert [tensor["datatype"] for tensor in (*metadata["inputs"], *metadata["outputs"])] == ["BYTES", "BYTES"]


def infer(target: Any, *inputs: tuple[str, str, list[Any]], options: AppOptions | None = None) -> Answer:
    tensors = [{"name": n, "datatype": kind, "shape": [len(data)], "data": data} for n, kind, data in inputs]
    return ask(target, {"inputs": tensors}, options or AppOptions(name="demo"), path="/v2/models/demo/infer")


def test_objects_come_as_json_text_alone_or_beside_tensors() -> None:
    query = ("query", "BYTES", ['{"words": ["a", "b"]}'])
    assert infer(search, query).json["outputs"][0]["data"] == [6]
    others: list[tuple[str, str, list[Any]]] = [
        ("place", "BYTES", ['{"city": "Bonn"}']),
        ("since", "BYTES", ['"2024-05-01"']),
        ("boosts", "FP64", [1.5, 2]),
    ]
    assert infer(search_near, query, *others).json["outputs"][0]["data"] == ["['a', 'b'] Bonn 2024 3.5"]


@pytest.mark.parametrize(
    ("target", "inputs", "words"),
    [
        (search, [("query", "BYTES", ['{"words": 1}'])], "words"),
        (search, [("query", "BYTES", ['{"words": [], "more": 1}'])], "more"),
        (search, [("query", "BYTES", ['{"words": []}, "other": {}'])], "must be JSON text"),
        (search, [("query", "BYTES", ['{"words": []}', "{}"])], "one value is needed"),
        (search, [], "query"),
        (search_near, [("query", "BYTES", ['{"words": []}'])], "place"),
        (total, [("x", "BYTES", ["a"])], "numbers or booleans"),
        (shout, [("words", "INT64", [1])], "array of text"),
        (turn, [("words", "FP64", [1.0])], "array of bytes"),
        (count_up, [("n", "INT64", [1]), ("n", "INT64", [2])], "came twice"),
    ],
)
def test_inputs_that_do_not_fit_are_named(target: Any, inputs: Any, words: str) -> None:
    answer = infer(target, *inputs)
    assert answer.status == 422 and words in answer.json["error"]


@pytest.mark.parametrize("target", [count_up, count_up_later])
def test_the_items_of_a_stream_are_one_tensor(target: Any) -> None:
    (output,) = infer(target, ("n", "INT64", [3])).json["outputs"]
    assert (output["datatype"], output["shape"], output["data"]) == ("INT64", [3], [0, 1, 2])
    metadata = ask(target, None, AppOptions(name="demo"), method="GET", path="/v2/models/demo").json
    assert metadata["outputs"] == [{"name": "output", "datatype": "INT64", "shape": [-1]}]


def test_a_stream_that_does_not_end_within_the_deadline_is_a_504() -> None:
    assert infer(endless, ("n", "INT64", [3]), options=AppOptions(name="demo", timeout_s=0.05)).status == 504
