"""Nuclio handlers run unmodified: events, contexts, outputs, init_context, batches, streams."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mlfuncs.spec import Batch
from mlfuncs_runtime.worker.asgi import WorkerApp, make_app
from mlfuncs_runtime.worker.invocation import AppOptions


async def send(
    app: WorkerApp, method: str = "POST", path: str = "/", body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    path, _, query = path.partition("?")
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": raw}
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0) if incoming else await asyncio.Event().wait()

    async def collect(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, collect)
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(message.get("body", b"") for message in sent[1:])


def ask(target: Any, *args: Any, options: AppOptions | None = None, **kwargs: Any) -> tuple[int, dict[str, str], bytes]:
    async def once() -> tuple[int, dict[str, str], bytes]:
        app = make_app(target, options)
        await app.start()
        return await send(app, *args, **kwargs)

    return asyncio.run(once())


def test_gives_the_handler_the_whole_event() -> None:
    seen: list[Any] = []

    def handler(context: Any, event: Any) -> str:
        seen.append(event)
        return "ok"

    ask(
        handler,
        "PUT",
        "/a/b?x=1&y=two",
        b"raw",
        headers={"Content-Type": "text/csv", "X-Thing": "v", "X-Request-Id": "i7"},
    )
    event = seen[0]
    assert (event.body, event.content_type, event.method, event.path) == (b"raw", "text/csv", "PUT", "/a/b")
    assert event.fields == {"x": "1", "y": "two"}
    assert event.headers["X-Thing"] == event.headers["x-thing"] == event.get_header("X-THING") == "v"
    assert event.headers.get("absent") is None and "x-thing" in event.headers
    assert (event.id, event.size, event.trigger.kind, event.url) == ("i7", 3, "http", "http://localhost/a/b?x=1&y=two")
    assert abs(event.timestamp - datetime.datetime.now(datetime.UTC).replace(tzinfo=None)) < datetime.timedelta(
        minutes=1
    )
    assert (event.shard_id, event.num_shards, event.version, event.last_in_batch) == (-1, 0, "", False)
    assert '"path": "/a/b"' in event.to_json()


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("application/json", b'{"a": 1}', {"a": 1}),
        ("application/json; charset=utf-8", b"[1]", [1]),
        ("application/json", b"{broken", b"{broken"),
        ("text/plain", b'{"a": 1}', b'{"a": 1}'),
        ("", b"", b""),
    ],
)
def test_parses_the_body_by_its_content_type(content_type: str, body: bytes, expected: Any) -> None:
    seen: list[Any] = []

    def handler(context: Any, event: Any) -> None:
        seen.append(event.body)

    ask(handler, body=body, headers={"Content-Type": content_type} if content_type else {})
    assert seen == [expected]


@pytest.mark.parametrize(
    ("output", "status", "content_type", "body"),
    [
        ("text", 200, "text/plain", b"text"),
        (b"\x00\x01", 200, "application/octet-stream", b"\x00\x01"),
        ({"a": 1}, 200, "application/json", b'{"a": 1}'),
        ([1, 2], 200, "application/json", b"[1, 2]"),
        ((201, "made"), 201, "text/plain", b"made"),
        ((404, {"why": "x"}), 404, "application/json", b'{"why": "x"}'),
        (None, 200, "text/plain", b""),
        (3.5, 200, "text/plain", b"3.5"),
    ],
)
def test_turns_every_output_into_an_answer(output: Any, status: int, content_type: str, body: bytes) -> None:
    def handler(context: Any, event: Any) -> Any:
        return output

    got = ask(handler)
    assert (got[0], got[1]["content-type"], got[2]) == (status, content_type, body)


def test_a_response_sets_status_headers_and_content_type() -> None:
    def handler(context: Any, event: Any) -> Any:
        return context.Response(
            body="<p>", headers={"X-Algo": "aes", "Content-Length": 99}, content_type="text/html", status_code=418
        )

    status, headers, body = ask(handler)
    assert (status, headers["x-algo"], headers["content-type"], headers["content-length"]) == (
        418,
        "aes",
        "text/html",
        "3",
    )
    assert body == b"<p>"


def test_accepts_the_responses_of_nuclios_own_sdk() -> None:
    nuclio_sdk = pytest.importorskip("nuclio_sdk", reason="nuclio-sdk is not installed")

    def handler(context: Any, event: Any) -> Any:
        return nuclio_sdk.Response(body={"a": 1}, status_code=202)

    assert ask(handler)[0::2] == (202, b'{"a": 1}')


def test_logs_with_named_values(caplog: pytest.LogCaptureFixture) -> None:
    def handler(context: Any, event: Any) -> None:
        context.logger.debug("plain")
        context.logger.info("of %d", 3)
        context.logger.warn_with("looked", count=2, name="x")
        context.logger.error_with("Analyzing ", "sentence", "hi")

    with caplog.at_level(logging.DEBUG):
        ask(handler)
    mine = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "mlfuncs.nuclio"]
    assert mine == [
        ("DEBUG", "plain"),
        ("INFO", "of 3"),
        ("WARNING", "looked count=2 name='x'"),
        ("ERROR", "Analyzing sentence='hi'"),
    ]


def module(source: str) -> Callable[[Any, Any], Any]:
    """The `handler` of a module with this source: init_context is looked up beside it."""
    namespace: dict[str, Any] = {"__name__": "user_module"}
    exec(compile(source, "user_module.py", "exec"), namespace)
    handler: Callable[[Any, Any], Any] = namespace["handler"]
    return handler


def test_runs_init_context_once_before_the_first_event() -> None:
    handler = module(
        "def init_context(context):\n    context.user_data.calls = [context.worker_id]\n"
        "def handler(context, event):\n    context.user_data.calls.append(1)\n    return context.user_data.calls\n"
    )
    assert ask(handler)[2] == b"[0, 1]"


def test_awaits_an_async_init_context_and_an_async_handler() -> None:
    handler = module(
        "import asyncio\n"
        "async def init_context(context):\n    await asyncio.sleep(0)\n    setattr(context.user_data, 'ready', 'yes')\n"
        "async def handler(context, event):\n    await asyncio.sleep(0)\n    return context.user_data.ready\n"
    )
    assert ask(handler)[2] == b"yes"


def test_a_compressed_body_reaches_the_handler_as_it_came() -> None:
    def handler(context: Any, event: Any) -> bytes:
        return gzip.decompress(event.body) + event.headers["content-encoding"].encode()

    status, _, body = ask(handler, body=gzip.compress(b"rows"), headers={"Content-Encoding": "gzip"})
    assert (status, body) == (200, b"rowsgzip")


def test_an_error_in_a_handler_is_a_500_without_its_text() -> None:
    def handler(context: Any, event: Any) -> None:
        raise ValueError("inside")

    status, headers, body = ask(handler)
    assert status == 500 and b"inside" not in body and headers["content-type"] == "application/problem+json"


def test_streams_a_generator_and_a_response_with_a_generator_body() -> None:
    def handler(context: Any, event: Any) -> Any:
        if event.path == "/response":
            return context.Response(body=iter(["a", "b"]), status_code=203, content_type="text/csv")
        return (str(n) for n in range(3))

    assert ask(handler)[2] == b"012"
    status, headers, body = ask(handler, path="/response")
    assert (status, headers["content-type"], body) == (203, "text/csv", b"ab")


def test_hands_a_batch_to_the_handler_and_sorts_its_responses_by_event_id() -> None:
    sizes: list[int] = []

    async def handler(context: Any, event: Any) -> Any:
        sizes.append(len(event))
        assert event[-1].last_in_batch
        return [context.Response(body=item.body, event_id=item.id) for item in reversed(event)]

    async def many() -> list[bytes]:
        app = make_app(handler, AppOptions(batch=Batch(max_size=8, max_wait_ms=200)))
        waiting: list[Awaitable[Any]] = [send(app, body=b"%d" % n) for n in range(8)]
        return [answer[2] for answer in await asyncio.gather(*waiting)]

    assert asyncio.run(many()) == [b"%d" % n for n in range(8)]
    assert sizes == [8]


def test_calls_registered_callbacks_when_the_worker_drains() -> None:
    called: list[str] = []

    def handler(context: Any, event: Any) -> None:
        context.platform.set_drain_callback(lambda: called.append("drain"))
        context.platform.set_termination_callback(lambda: called.append("termination"))

    async def once() -> None:
        app = make_app(handler)
        await send(app)
        app.begin_drain()

    asyncio.run(once())
    assert called == ["drain", "termination"]


def test_the_platforms_own_paths_stay_the_platforms() -> None:
    def handler(context: Any, event: Any) -> str:
        return "user"

    assert ask(handler, "GET", "/docs")[2] == b"user"
    assert ask(handler, "GET", "/-/ready")[2] == b'{"ready":true}'
    assert ask(handler, "GET", "/-/other")[0] == 404
