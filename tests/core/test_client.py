"""The HTTP client against a real server on loopback: encoding, errors, deadlines, what is passed on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mlfuncs.errors import (
    DeadlineExceeded,
    InvalidInput,
    MlfuncsError,
    NotFound,
    Overloaded,
    Unavailable,
)
from mlfuncs.serving import client
from mlfuncs.serving.request_context import CURRENT_REQUEST, RequestContext

Reply = Callable[[BaseHTTPRequestHandler, bytes], tuple[int, dict[str, str], bytes]]


class Server:
    """A loopback server whose `reply` each test sets; it remembers the headers and peers it saw."""

    def __init__(self) -> None:
        self.reply: Reply = lambda _handler, body: (200, {"Content-Type": "application/json"}, body)
        self.seen: list[dict[str, str]] = []
        self.peers: set[tuple[str, int]] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.seen.append(dict(self.headers.items()))
                outer.peers.add(self.client_address)
                status, headers, content = outer.reply(self, body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/churn"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def problem(status: int, **values: Any) -> Reply:
    body = json.dumps({"type": "about:blank", "status": status, **values}).encode()
    headers = {"Content-Type": "application/problem+json"}
    if "retry_after" in values:
        headers["Retry-After"] = str(values["retry_after"])
    return lambda _handler, _body: (status, headers, body)


@pytest.fixture
def in_request() -> Iterator[Callable[[float], RequestContext]]:
    tokens = []

    def enter(seconds: float) -> RequestContext:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        context = RequestContext("req-1", time.monotonic() + seconds, trace)
        tokens.append(CURRENT_REQUEST.set(context))
        return context

    yield enter
    for token in reversed(tokens):
        CURRENT_REQUEST.reset(token)


def test_values_of_data_science_arrive_as_json(server: Server):
    @dataclasses.dataclass
    class Point:
        x: float

    values = {
        "array": np.array([1.5, 2.5]),
        "number": np.int64(7),
        "nan": float("nan"),
        "table": pd.DataFrame({"a": [1, 2], "b": ["x", None]}),
        "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
        "point": Point(1.0),
        "raw": b"\x00\x01",
        "big": 2**70,
    }
    answer = client.invoke(server.url, client.encode(values))
    assert answer == {
        "array": [1.5, 2.5],
        "number": 7,
        "nan": None,
        "table": {"a": [1, 2], "b": ["x", None]},
        "when": "2024-01-02T00:00:00+00:00",
        "point": {"x": 1.0},
        "raw": "AAE=",
        "big": 2**70,
    }


def test_an_error_that_says_json_and_is_none_is_told_as_it_came(server: Server):
    page = b"<html>bad gateway</html>"
    server.reply = lambda _handler, _body: (502, {"Content-Type": "application/json"}, page)
    with pytest.raises(Unavailable, match="answered 502: <html>bad gateway"):
        client.invoke(server.url, b"{}")


def test_a_value_without_a_json_form_is_named():
    with pytest.raises(InvalidInput, match="object"):
        client.encode({"x": object()})


def test_connections_are_kept(server: Server):
    for _ in range(5):
        client.invoke(server.url, b"{}")
    assert len(server.peers) == 1


def test_a_fork_has_connections_of_its_own(server: Server):
    client.invoke(server.url, b"{}")
    child = os.fork()
    if child == 0:
        try:  # whatever happens, the child must not go on with the tests
            client.invoke(server.url, b"{}")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    client.invoke(server.url, b"{}")
    assert len(server.peers) == 2


def test_bad_input_comes_back_with_its_fields(server: Server):
    errors = [{"field": "x.0", "message": "a number is needed"}]
    server.reply = problem(422, title="InvalidInput", detail="bad input", errors=errors, request_id="r9")
    with pytest.raises(InvalidInput) as caught:
        client.invoke(server.url, b"{}")
    assert caught.value.fields == errors
    assert "x.0: a number is needed" in str(caught.value)
    assert "r9" in str(caught.value)


def test_an_unknown_endpoint_lists_near_names(server: Server):
    server.reply = problem(404, title="NotFound", detail="no endpoint is named 'chrun'", near=["churn"])
    with pytest.raises(NotFound) as caught:
        client.invoke(server.url, b"{}")
    assert caught.value.near == ["churn"]


def test_overload_says_when_to_come_again(server: Server):
    server.reply = problem(429, title="Overloaded", detail="full", retry_after=3)
    with pytest.raises(Overloaded) as caught:
        client.invoke(server.url, b"{}")
    assert caught.value.retry_after_s == 3.0
    assert len(server.seen) == 1  # a refused request is not sent again


def test_an_answer_that_is_no_problem_document_is_shown(server: Server):
    server.reply = lambda _handler, _body: (500, {"Content-Type": "text/plain"}, b"broken pipe in the basement")
    with pytest.raises(MlfuncsError, match="500: broken pipe in the basement"):
        client.invoke(server.url, b"{}")


def test_other_content_is_given_as_it_is(server: Server):
    server.reply = lambda _handler, _body: (200, {"Content-Type": "image/png"}, b"\x89PNG")
    assert client.invoke(server.url, b"{}") == b"\x89PNG"
    server.reply = lambda _handler, _body: (200, {"Content-Type": "text/html; charset=utf-8"}, "é".encode())
    assert client.invoke(server.url, b"{}") == "é"
    server.reply = lambda _handler, _body: (200, {}, b"")
    assert client.invoke(server.url, b"{}") is None


def test_a_stream_of_json_lines_is_a_list(server: Server):
    server.reply = lambda _handler, _body: (200, {"Content-Type": "application/x-ndjson"}, b'{"a": 1}\n2\n')
    assert client.invoke(server.url, b"{}") == [{"a": 1}, 2]


def test_broken_json_is_an_error_of_ours(server: Server):
    server.reply = lambda _handler, _body: (200, {"Content-Type": "application/json"}, b"{")
    with pytest.raises(MlfuncsError, match="and is not"):
        client.invoke(server.url, b"{}")


def test_no_answer_in_time_is_a_deadline(server: Server):
    gate = threading.Event()

    def late(_handler: BaseHTTPRequestHandler, _body: bytes) -> tuple[int, dict[str, str], bytes]:
        gate.wait(60)
        return 200, {}, b""

    server.reply = late
    with pytest.raises(DeadlineExceeded, match=r"within 0.2 s"):
        client.invoke(server.url, b"{}", timeout_s=0.2)
    gate.set()


def test_nobody_there_says_how_to_start():
    with pytest.raises(Unavailable, match="mlfuncs up") as caught:
        client.invoke("http://127.0.0.1:9/churn", b"{}", timeout_s=60)
    assert caught.value.retry_after_s == 0.0


def test_a_call_inside_a_request_carries_id_trace_and_what_is_left_of_the_time(server: Server, in_request):
    in_request(60.0)
    client.invoke(server.url, b"{}", token="secret")
    (headers,) = server.seen
    assert headers["X-Request-Id"] == "req-1"
    version, trace, span, flags = headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", "0af7651916cd43dd8448eb211c80319c", "01")
    assert span != "b7ad6b7169203331"
    assert 0 < int(headers["X-Mlfuncs-Timeout-Ms"]) <= 60_000
    assert headers["Authorization"] == "Bearer secret"


def test_a_request_whose_time_is_over_calls_nobody(server: Server, in_request):
    in_request(-0.1)
    with pytest.raises(DeadlineExceeded, match="no further endpoint"):
        client.invoke(server.url, b"{}")
    assert server.seen == []


def test_outside_a_request_the_default_time_is_allowed(server: Server):
    client.invoke(server.url, b"{}")
    assert server.seen[0]["X-Mlfuncs-Timeout-Ms"] == "60000"
    assert "X-Request-Id" not in server.seen[0]
