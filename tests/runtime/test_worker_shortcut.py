"""The short way through uvicorn sends what plain ASGI sends."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from mlfuncs_runtime.worker import exchange
from mlfuncs_runtime.worker.asgi import make_app
from mlfuncs_runtime.worker.invocation import AppOptions
from mlfuncs_runtime.worker.shortcut import cycle_of


def double(x: float) -> float:
    return 2 * x


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(double, AppOptions(body_bytes=200_000))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, http="httptools", server_header=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(60)


def talk(port: int, *parts: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.02)  # so that the parts arrive apart; nothing depends on it
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return re.sub(rb"date: [^\r]+", b"date: now", received)


def head(lines: bytes = b"", length: int = 8, method: bytes = b"POST / HTTP/1.1") -> bytes:
    return b"%b\r\nHost: w\r\nX-Request-Id: r\r\nContent-Length: %d\r\n%b\r\n" % (method, length, lines)


CLOSE = b"Connection: close\r\n"
EXCHANGES = {
    "ok": [head(CLOSE) + b'{"x": 1}'],
    "kept, then closed": [head() + b'{"x": 1}', head(CLOSE) + b'{"x": 2}'],
    "pipelined": [head() + b'{"x": 1}' + head() + b'{"x": 2}' + head(CLOSE) + b'{"x": 3}'],
    "body in parts": [head(CLOSE), b'{"x"', b": 1}"],
    "continue": [head(b"Expect: 100-continue\r\n" + CLOSE), b'{"x": 1}'],
    "chunked": [
        b"POST / HTTP/1.1\r\nHost: w\r\nX-Request-Id: r\r\nTransfer-Encoding: chunked\r\n" + CLOSE + b"\r\n",
        b'4\r\n{"x"\r\n4\r\n: 1}\r\n0\r\n\r\n',
    ],
    "bad input": [head(CLOSE) + b'{"y": 1}'],
    "too large": [head(CLOSE, 300_000), b"1" * 100],
    "get": [b"GET /-/live HTTP/1.1\r\nHost: w\r\nX-Request-Id: r\r\n" + CLOSE + b"\r\n"],
    "head": [b"HEAD /-/live HTTP/1.1\r\nHost: w\r\nX-Request-Id: r\r\n" + CLOSE + b"\r\n"],
    "http 1.0": [b'POST / HTTP/1.0\r\nX-Request-Id: r\r\nContent-Length: 8\r\n\r\n{"x": 1}'],
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_both_ways_give_the_same_bytes(name: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    short = talk(port, *EXCHANGES[name])
    monkeypatch.setattr(exchange, "cycle_of", lambda send: None)
    plain = talk(port, *EXCHANGES[name])
    assert _answers(short) == _answers(plain)
    assert short.startswith(b"HTTP/1.1 ")


def _answers(received: bytes) -> list[object]:
    """Each answer as its status line, its headers in any order, and its body."""
    answers: list[object] = []
    for part in re.split(rb"(?=HTTP/1\.1 )", received)[1:]:
        lines, _, body = part.partition(b"\r\n\r\n")
        status, *headers = lines.split(b"\r\n")
        answers.append((status, sorted(headers), body))
    return answers


def test_another_servers_send_is_not_taken_for_uvicorns() -> None:
    async def send(message: object) -> None: ...

    assert cycle_of(send) is None
