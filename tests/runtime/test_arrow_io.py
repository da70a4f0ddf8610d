"""Arrow IPC streams in and out of typed functions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from mlfuncs_runtime.worker.arrow_io import ARROW, dump
from mlfuncs_runtime.worker.asgi import make_app

TYPE = ARROW.decode()


def ask(target: Any, body: bytes, query: str = "", accept: str = "") -> tuple[int, str, bytes]:
    headers = [(b"content-type", ARROW if body[:1] != b"{" else b"application/json")]
    headers += [(b"accept", accept.encode())] if accept else []
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": query.encode(), "headers": headers}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def collect(message: Any) -> None:
        sent.append(message)

    asyncio.run(make_app(target)(scope, receive, collect))
    kind = dict(sent[0]["headers"])[b"content-type"].decode()
    return sent[0]["status"], kind, b"".join(message.get("body", b"") for message in sent[1:])


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def read(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


TABLE = pa.table(
    {
        "a": [1, 2**53 + 1, None],
        "t": pa.array([0, 1, 2], pa.timestamp("ns", "UTC")),
        "s": ["x", "é", None],
    }
)


def same(table: pa.Table) -> pa.Table:
    return table


def by_pandas(frame: pd.DataFrame, times: int = 1) -> pd.DataFrame:
    return pd.DataFrame({"a": frame["a"] * times})


def by_polars(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("a") + 1)


def by_numpy(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x * 2


def test_a_table_comes_back_equal_with_nulls_and_zones() -> None:
    status, kind, content = ask(same, stream(TABLE), accept=TYPE)
    assert (status, kind) == (200, TYPE)
    assert read(content).equals(TABLE)


def test_reads_pandas_and_polars_and_options_from_the_query() -> None:
    small = stream(pa.table({"a": [1, 2]}))
    assert read(ask(by_pandas, small, "times=10", TYPE)[2]).to_pydict() == {"a": [10, 20]}
    assert read(ask(by_polars, small, accept=TYPE)[2]).to_pydict() == {"a": [2, 3]}


def test_arrays_are_columns_side_by_side_or_tensors() -> None:
    columns = stream(pa.table({"a": [1.0, 2.0], "b": [3.0, 4.0]}))
    back = read(ask(by_numpy, columns, accept=TYPE)[2])
    assert back.column(0).combine_chunks().to_numpy_ndarray().tolist() == [[2.0, 6.0], [4.0, 8.0]]
    tensor = dump(np.arange(12.0).reshape(2, 3, 2))
    again = read(ask(by_numpy, tensor, accept=TYPE)[2]).column(0).combine_chunks().to_numpy_ndarray()
    assert (again == np.arange(12.0).reshape(2, 3, 2) * 2).all()


def test_json_in_may_be_arrow_out_and_the_other_way_round() -> None:
    assert read(ask(by_numpy, b'{"x": [1, 2]}', accept=TYPE)[2]).to_pydict() == {"output": [2.0, 4.0]}
    status, kind, content = ask(by_numpy, stream(pa.table({"a": [1.0]})))
    assert (status, kind) == (200, "application/json") and json.loads(content) == [2.0]


@pytest.mark.parametrize("body", [b"garbage", b""])
def test_a_body_that_is_no_stream_is_a_422(body: bytes) -> None:
    status, _, content = ask(same, body)
    assert status == 422 and b"Arrow" in content


def test_a_function_without_a_table_is_a_422_and_a_result_without_one_a_500() -> None:
    def scalar(x: int) -> int:
        return x

    assert ask(scalar, stream(TABLE))[0] == 422
    assert ask(scalar, b'{"x": 1}', accept=TYPE)[0] == 500
