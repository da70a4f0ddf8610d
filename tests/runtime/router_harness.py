"""A router in this process, workers that really listen on Unix sockets, and a client that sends bytes as they are."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from httptools import HttpRequestParser, HttpResponseParser

from mlfuncs_runtime.router.core import RouterOptions
from mlfuncs_runtime.router.process import Router
from mlfuncs_runtime.routes import Replica, Route

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], timeout_s: float = 120.0) -> T:
    """The result of `work` on a loop of its own, the kind that the router has."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


async def until(holds: Callable[[], object], what: str = "the condition") -> None:
    """Wait until `holds()` is true, at most a minute."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come true within a minute"
        await asyncio.sleep(0.005)


@dataclasses.dataclass
class Seen:
    """One request as a worker saw it."""

    method: str = ""
    target: str = ""
    headers: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    body: bytearray = dataclasses.field(default_factory=bytearray)

    def header(self, name: str) -> str:
        """The header's value; empty when it did not come."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")


class Worker:
    """Listens on a Unix socket and answers by the first segment of the path; `seen` holds what came."""

    def __init__(self, path: Path, revision: str, name: str) -> None:
        self.replica = Replica(name, revision, str(path))
        self.seen: list[Seen] = []
        self.gate = asyncio.Event()  # /gate waits for it
        self.connections: set[_WorkerConnection] = set()
        self.accepted = 0
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _WorkerConnection(self), self.replica.socket)

    def kill(self) -> None:
        """Go as after SIGKILL: no listener, every connection cut."""
        if self._server is not None:
            self._server.close()
        Path(self.replica.socket).unlink(missing_ok=True)
        for connection in list(self.connections):
            connection.transport.abort()


class _WorkerConnection(asyncio.Protocol):
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.transport: asyncio.Transport
        self._parser = HttpRequestParser(self)
        self._queue: asyncio.Queue[Seen] = asyncio.Queue()
        self._seen = Seen()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.worker.connections.add(self)
        self.worker.accepted += 1
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def connection_lost(self, exc: Exception | None) -> None:
        self.worker.connections.discard(self)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._seen = Seen()

    def on_url(self, url: bytes) -> None:
        self._seen.target += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._seen.headers.append((name.decode(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self._seen.method = self._parser.get_method().decode()
        if self._seen.target.startswith("/duplex"):
            self.transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._seen.body += body
        if self._seen.target.startswith("/duplex"):
            self.transport.write(b"%x\r\n%s\r\n" % (len(body), body))

    def on_message_complete(self) -> None:
        self.worker.seen.append(self._seen)
        self._queue.put_nowait(self._seen)

    async def _serve(self) -> None:
        while True:
            seen = await self._queue.get()
            await self._answer(seen)

    async def _answer(self, seen: Seen) -> None:
        kind = seen.target.partition("?")[0].strip("/").partition("/")[0]
        write = self.transport.write
        if kind == "die":
            self.transport.abort()
        elif kind == "hang":
            await asyncio.Event().wait()
        elif kind == "gate":
            await self.worker.gate.wait()
            self._whole(seen, b"opened")
        elif kind == "duplex":
            write(b"0\r\n\r\n")
        elif kind == "half":
            write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this")
            self.transport.close()
        elif kind == "until-close":
            write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nall of it")
            self.transport.close()
        elif kind == "chunked":
            write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")
        elif kind == "sse":
            write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for event in (b"data: one\n\n", b"data: two\n\n"):
                write(b"%x\r\n%s\r\n" % (len(event), event))
                await self.worker.gate.wait()
                self.worker.gate.clear()
            write(b"0\r\n\r\n")
        elif kind == "big":
            size = int(seen.target.rpartition("/")[2])
            write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            write(b"x" * size)
        elif kind == "garbage":
            write(b"what is this?\r\n\r\n")
        elif kind == "excess":
            write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        elif kind == "hints":
            write(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        elif kind == "old":
            write(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok")
            self.transport.close()
        elif kind == "closing":
            write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\nkeep-alive: timeout=5\r\n\r\nok")
            self.transport.close()
        elif kind == "empty":
            write(b"HTTP/1.1 204 No Content\r\nx-request-id: %s\r\n\r\n" % seen.header("x-request-id").encode())
        elif kind == "-":
            self._whole(seen, b"# HELP up Whether it is up.\n# TYPE up gauge\nup 1\n", b"text/plain")
        else:
            echo = {"worker": self.worker.replica.id, "method": seen.method, "target": seen.target}
            self._whole(seen, json.dumps({**echo, "body": seen.body.decode("latin-1")}).encode())

    def _whole(self, seen: Seen, body: bytes, content_type: bytes = b"application/json") -> None:
        request_id = seen.header("x-request-id").encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\nx-request-id: %s\r\n\r\n"
        data = head % (content_type, len(body), request_id)
        self.transport.write(data if seen.method == "HEAD" else data + body)


@dataclasses.dataclass
class Reply:
    """One answer as a client saw it."""

    status: int = 0
    headers: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    body: bytearray = dataclasses.field(default_factory=bytearray)
    complete: bool = False

    def header(self, name: str) -> str:
        """The header's value; empty when it did not come."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


class Connection:
    """A client's connection: bytes out as given, answers in through a parser that is not the router's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._replies: list[Reply] = []
        self._parser = HttpResponseParser(self)

    def on_message_begin(self) -> None:
        self._replies.append(Reply())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._replies[-1].headers.append((name.decode(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self._replies[-1].status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._replies[-1].body += body

    def on_message_complete(self) -> None:
        self._replies[-1].complete = True

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> Reply:
        """The next whole answer; an incomplete one when the connection ends first."""
        while not (self._replies and self._replies[0].complete):
            data = await self.reader.read(65536)
            if not data:
                return self._replies.pop(0) if self._replies else Reply()
            self._parser.feed_data(data)
        return self._replies.pop(0)

    async def part(self, wanted: bytes) -> Reply:
        """The answer under way, once its body ends with `wanted`."""
        while not (self._replies and self._replies[0].body.endswith(wanted)):
            data = await self.reader.read(65536)
            assert data, f"the connection ended before {wanted!r} came"
            self._parser.feed_data(data)
        return self._replies[0]

    async def rest(self) -> bytes:
        """Everything until the connection ends."""
        with contextlib.suppress(ConnectionResetError):
            return await self.reader.read(-1)
        return b""

    def close(self) -> None:
        """End the connection."""
        self.writer.close()


class Harness:
    """One router on loopback, its workers, and the wake events that it sent."""

    def __init__(self, folder: Path, options: RouterOptions | None = None) -> None:
        self.folder = folder
        self.options = options or RouterOptions()
        self.workers: list[Worker] = []
        self.woken: list[tuple[str, str]] = []
        self.router: Router
        self.port = 0

    async def start(self) -> None:
        """Listen on a free port."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        self.port = listener.getsockname()[1]
        self.router = Router(listener, self.options, state=self.folder / "routes.json")
        self.router.core.wake = lambda endpoint, revision: self.woken.append((endpoint, revision))
        await self.router.start(self.folder / "control.sock")

    async def worker(self, revision: str = "rev-1", name: str = "") -> Worker:
        """A new worker that listens."""
        name = name or f"w{len(self.workers)}"
        worker = Worker(self.folder / f"{name}.sock", revision, name)
        await worker.start()
        self.workers.append(worker)
        return worker

    def route(self, *workers: Worker, endpoint: str = "predict", **changes: Any) -> Route:
        """Configure one endpoint with these workers; by default all traffic goes to the first one's revision."""
        traffic = {workers[0].replica.revision if workers else "rev-1": 100}
        route = Route(endpoint, "test", traffic, tuple(worker.replica for worker in workers))
        route = dataclasses.replace(route, **changes)
        self.router.core.configure([route])
        return route

    async def connect(self) -> Connection:
        """A client's connection."""
        return Connection(*await asyncio.open_connection("127.0.0.1", self.port))

    async def call(self, method: str, target: str, body: bytes = b"", **headers: str) -> Reply:
        """The answer to one request on a connection of its own."""
        connection = await self.connect()
        await connection.send(message(method, target, body, **headers))
        reply = await connection.reply()
        connection.close()
        return reply

    async def control(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to one order on the control socket."""
        reader, writer = await asyncio.open_unix_connection(str(self.folder / "control.sock"))
        writer.write(json.dumps(order).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await reader.readline())
        writer.close()
        return answer


def message(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    """A request's bytes; `x_request_id="a"` is the header X-Request-Id."""
    lines = [f"{method} {target} HTTP/1.1", "Host: test"]
    lines += [f"{key.replace('_', '-')}: {value}" for key, value in headers.items()]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def serving(options: RouterOptions | None = None) -> AsyncIterator[Harness]:
    """A harness whose router and workers end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="mlr-", dir="/tmp"))
    harness = Harness(folder, options)
    await harness.start()
    try:
        yield harness
    finally:
        harness.router.stop()
        for worker in harness.workers:
            worker.kill()
        await asyncio.sleep(0)
        shutil.rmtree(folder, ignore_errors=True)


def with_router(
    test: Callable[[Harness], Awaitable[None]], options: RouterOptions | None = None, timeout_s: float = 120.0
) -> None:
    """Run one async test against a fresh router."""

    async def main() -> None:
        async with serving(options) as harness:
            await test(harness)

    run(main(), timeout_s)
