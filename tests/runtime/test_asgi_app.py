"""The application around a plain callable: typed JSON, problem documents, streams, pages, timeouts, overload."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import pytest

from mlfuncs.errors import Overloaded
from mlfuncs.spec import Batch
from mlfuncs_runtime.worker.asgi import WorkerApp, make_app
from mlfuncs_runtime.worker.handlers import make_handler
from mlfuncs_runtime.worker.invocation import AppOptions

JSON_TYPE = {"content-type": "application/json"}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def send(
    app: WorkerApp, body: bytes = b"", method: str = "POST", path: str = "/", headers: dict[str, str] | None = None
) -> Answer:
    raw = [(k.lower().encode(), v.encode()) for k, v in (JSON_TYPE if headers is None else headers).items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw}
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0) if incoming else await asyncio.Event().wait()

    async def collect(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, collect)
    head = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return Answer(sent[0]["status"], head, b"".join(m.get("body", b"") for m in sent[1:]))


def ask(target: Any, body: Any = None, options: AppOptions | None = None, **kwargs: Any) -> Answer:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(send(make_app(target, options), payload, **kwargs))


def add(x: float, y: float = 1.0) -> float:
    """Adds two numbers."""
    return x + y


async def add_later(x: float, y: float = 1.0) -> float:
    await asyncio.sleep(0)
    return x + y


@pytest.mark.parametrize("target", [add, add_later])
def test_answers_typed_json_with_defaults(target: Any) -> None:
    answer = ask(target, {"x": 2})
    assert (answer.status, answer.json, answer.headers["content-type"]) == (200, 3.0, "application/json")


def test_keeps_the_callers_request_id_and_makes_one_when_there_is_none() -> None:
    assert ask(add, {"x": 1}, headers={**JSON_TYPE, "x-request-id": "mine"}).headers["x-request-id"] == "mine"
    app = make_app(add)

    async def two() -> set[str]:
        return {(await send(app, b'{"x": 1}')).headers["x-request-id"] for _ in range(2)}

    assert len(asyncio.run(two())) == 2


def test_bad_input_is_a_422_that_names_the_fields() -> None:
    answer = ask(add, {"x": "1", "y": True})
    assert answer.status == 422
    assert {error["field"] for error in answer.json["errors"]} == {"x", "y"}
    assert answer.json["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["content-type"] == "application/problem+json"


FORM = "application/x-www-form-urlencoded"


def test_a_caller_that_names_no_type_is_understood_unless_it_is_another_sites_page() -> None:
    assert ask(add, {"x": 1}, headers={"content-type": FORM}).status == 200


@pytest.mark.parametrize(
    ("kwargs", "status", "header"),
    [
        ({"method": "GET"}, 405, ("allow", "POST")),
        ({"method": "POST", "path": "/docs"}, 405, ("allow", "GET, HEAD")),
        ({"path": "/dcos", "method": "GET"}, 404, None),
        ({"headers": {"content-type": "text/csv"}}, 415, ("accept", "application/json")),
        ({"headers": {"content-type": FORM, "origin": "https://elsewhere.example"}}, 415, None),
    ],
)
def test_refuses_what_http_does_not_allow_here(kwargs: Any, status: int, header: Any) -> None:
    answer = ask(add, {"x": 1}, **kwargs)
    assert answer.status == status == answer.json["status"]
    if header:
        assert answer.headers[header[0]].startswith(header[1])
    if status == 404:
        assert "/docs" in answer.json["near"]


def test_accepts_json_with_parameters_and_suffixes() -> None:
    for media in ("application/json; charset=utf-8", "Application/JSON", "application/ld+json"):
        assert ask(add, {"x": 1}, headers={"content-type": media}).status == 200
    assert ask(add, {"x": 1}, headers={}).status == 200


@pytest.mark.parametrize(
    ("coding", "pack"), [("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress)]
)
def test_reads_compressed_bodies(coding: str, pack: Any) -> None:
    headers = {**JSON_TYPE, "content-encoding": coding}
    assert ask(add, pack(b'{"x": 1}'), headers=headers).json == 2.0


@pytest.mark.parametrize("path", ["/", "/v2/models/function/infer"])
@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("br", b"{}", 415),
        ("gzip, gzip", b"{}", 415),
        ("gzip", b'{"x": 1}', 422),
        ("gzip", gzip.compress(b'{"x": 1}', mtime=0)[:-4], 422),
        ("gzip", gzip.compress(b'{"x": 1}', mtime=0) * 2, 422),
        ("gzip", gzip.compress(b'{"x": 1' + b" " * 10_000 + b"}", mtime=0), 413),
    ],
)
def test_refuses_compressed_bodies_that_it_cannot_read_or_that_grow_too_large(
    path: str, coding: str, body: bytes, status: int
) -> None:
    headers = {**JSON_TYPE, "content-encoding": coding}
    answer = ask(add, body, AppOptions(body_bytes=5000), path=path, headers=headers)
    assert answer.status == status == answer.json["status"]
    assert status != 415 or repr(coding) in answer.json["detail"]


def test_the_servers_address_and_the_path_of_the_description_may_be_joined_by_letters() -> None:
    document = ask(add, method="GET", path="/openapi.json").json
    base = urljoin("http://host/", document["servers"][0]["url"])
    joined = base + next(iter(document["paths"]))
    assert ask(add, {"x": 1}, path=joined.removeprefix("http://host")).json == 2.0


def test_a_body_over_the_bound_is_a_413_and_the_connection_closes() -> None:
    answer = ask(add, b'{"x": ' + b"1" * 100 + b"}", AppOptions(body_bytes=50))
    assert (answer.status, answer.headers["connection"]) == (413, "close")


def test_what_the_function_raises_is_a_500_without_its_text() -> None:
    def fail(x: int) -> int:
        raise RuntimeError("the secret inside")

    answer = ask(fail, {"x": 1})
    assert answer.status == 500
    assert b"secret" not in answer.body and b"Traceback" not in answer.body
    assert answer.json["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("batch", [None, Batch(max_size=8)])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_what_is_no_exception_is_a_500_like_any_other_and_ends_nothing(
    error: type[BaseException], asynchronous: bool, batch: Batch | None
) -> None:
    def fail(rows: list[float]) -> list[float]:
        if min(rows) < 0:
            raise error("the secret inside")
        return rows

    async def fail_later(rows: list[float]) -> list[float]:
        await asyncio.sleep(0)
        return fail(rows)

    async def scenario() -> list[Answer]:
        app = make_app(fail_later if asynchronous else fail, AppOptions(batch=batch))
        bodies = [json.dumps({"rows": [x]}).encode() for x in (-1.0, 1.0, -1.0, 2.0)]
        return [*await asyncio.gather(*(send(app, body) for body in bodies)), await send(app, bodies[1])]

    answers = asyncio.run(scenario())
    assert [answer.status for answer in answers] == [500, 200, 500, 200, 200]
    assert answers[0].json["title"] == "HandlerFailed" and b"secret" not in answers[0].body


def test_a_result_of_another_type_is_the_functions_fault() -> None:
    def lie(x: int) -> int:
        return "text"  # type: ignore[return-value]

    answer = ask(lie, {"x": 1})
    assert answer.status == 500
    assert "return hint" in answer.json["detail"]


def test_a_function_may_answer_with_its_own_status() -> None:
    class Gone(Exception):
        status_code, detail = 410, "it was here"

    def gone(x: int) -> int:
        raise Gone if x else Overloaded("not now", retry_after_s=2.5)

    assert (ask(gone, {"x": 1}).status, ask(gone, {"x": 1}).json["detail"]) == (410, "it was here")
    answer = ask(gone, {"x": 0})
    assert (answer.status, answer.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_handler_past_its_timeout_is_a_504(asynchronous: bool) -> None:
    release = threading.Event()

    def wait(x: int) -> int:
        release.wait(60)
        return x

    async def wait_async(x: int) -> int:
        await asyncio.sleep(600)
        return x

    try:
        answer = ask(wait_async if asynchronous else wait, {"x": 1}, AppOptions(timeout_s=0.05))
    finally:
        release.set()
    assert (answer.status, answer.json["title"]) == (504, "DeadlineExceeded")
    assert answer.json["request_id"]


def test_the_callers_deadline_shortens_the_timeout() -> None:
    async def wait(x: int) -> int:
        await asyncio.sleep(600)
        return x

    headers = {**JSON_TYPE, "x-mlfuncs-timeout-ms": "30"}
    assert ask(wait, {"x": 1}, AppOptions(timeout_s=500), headers=headers).status == 504


def test_while_a_handler_thread_is_past_its_timeout_the_worker_is_not_ready() -> None:
    release = threading.Event()

    def wait(x: int) -> int:
        release.wait(60)
        return x

    async def scenario() -> list[int]:
        app = make_app(wait, AppOptions(timeout_s=1.0, stuck_grace_s=60))
        statuses = [(await send(app, method="GET", path="/-/ready")).status]
        statuses.append((await send(app, b'{"x": 1}')).status)
        statuses.append((await send(app, method="GET", path="/-/ready")).status)
        release.set()
        async with asyncio.timeout(60):
            while app.unready_reason():
                await asyncio.sleep(0.01)
        statuses.append((await send(app, method="GET", path="/-/ready")).status)
        return statuses

    assert asyncio.run(scenario()) == [200, 504, 503, 200]


def test_a_handler_that_does_not_come_back_fails_what_waits_and_tells_the_worker() -> None:
    release, told = threading.Event(), threading.Event()

    def wait(x: int) -> int:
        release.wait(60)
        return x

    async def scenario() -> list[int]:
        app = make_app(wait, AppOptions(timeout_s=60, stuck_grace_s=0.1))
        app.on_stuck = told.set
        short = send(app, b'{"x": 1}', headers={**JSON_TYPE, "x-mlfuncs-timeout-ms": "1000"})
        answers = await asyncio.gather(short, send(app, b'{"x": 2}'))
        return [answer.status for answer in answers]

    try:
        assert asyncio.run(scenario()) == [504, 503]
        assert told.is_set()
    finally:
        release.set()


def test_a_full_queue_is_a_429_with_retry_after_and_health_checks_still_answer() -> None:
    release = threading.Event()

    def wait(x: int) -> int:
        release.wait(60)
        return x

    async def scenario() -> tuple[Answer, int, list[int]]:
        app = make_app(wait, AppOptions(queue_size=2))
        waiting = [asyncio.ensure_future(send(app, b'{"x": 1}')) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        refused = await send(app, b'{"x": 1}')
        ready = (await send(app, method="GET", path="/-/ready")).status
        release.set()
        return refused, ready, [(await answer).status for answer in waiting]

    refused, ready, statuses = asyncio.run(scenario())
    assert (refused.status, refused.headers["retry-after"], ready, statuses) == (429, "1", 200, [200, 200])


def test_a_sync_handler_of_one_thread_runs_one_call_at_a_time_and_with_more_threads_several() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def many(threads: int) -> int:
        """The most calls that ran at once; each waits until as many do as there are threads."""
        nonlocal most
        most, together = 0, threading.Barrier(max(threads, 1))

        def work(x: int) -> int:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            together.wait(60)
            with lock:
                running -= 1
            return x

        async def scenario() -> None:
            app = make_app(work, AppOptions(concurrency=threads))
            answers = await asyncio.gather(*(send(app, b'{"x": 1}') for _ in range(6)))
            assert {answer.status for answer in answers} == {200}

        asyncio.run(scenario())
        return most

    assert many(0) == 1
    assert many(3) == 3


def numbers(n: int) -> Iterator[int]:
    yield from range(n)


async def numbers_later(n: int) -> AsyncIterator[int]:
    for number in range(n):
        await asyncio.sleep(0)
        yield number


@pytest.mark.parametrize("target", [numbers, numbers_later])
def test_streams_a_generator_as_json_lines_or_as_events(target: Any) -> None:
    lines = ask(target, {"n": 3})
    assert (lines.headers["content-type"], lines.body) == ("application/x-ndjson", b"0\n1\n2\n")
    events = ask(target, {"n": 2}, headers={**JSON_TYPE, "accept": "text/event-stream"})
    assert (events.headers["content-type"], events.body) == ("text/event-stream", b"data: 0\n\ndata: 1\n\n")
    assert ask(target, {"n": 0}).body == b""


def test_an_error_before_the_first_item_is_a_status_and_a_later_one_the_last_line() -> None:
    def break_at(n: int) -> Iterator[int]:
        for number in range(5):
            if number == n:
                raise ValueError("hidden")
            yield number

    assert ask(break_at, {"n": 0}).status == 500
    later = ask(break_at, {"n": 2})
    assert later.status == 200
    *items, last = later.body.splitlines()
    assert items == [b"0", b"1"]
    assert json.loads(last)["error"]["title"] == "HandlerFailed"
    assert b"hidden" not in later.body


def test_a_stream_whose_client_leaves_closes_the_generator() -> None:
    closed = threading.Event()

    def endless(n: int) -> Iterator[int]:
        try:
            while True:
                time.sleep(0.001)
                yield n
        finally:
            closed.set()

    async def scenario() -> None:
        app = make_app(endless)
        gone = asyncio.Event()
        first = {"type": "http.request", "body": b'{"n": 1}', "more_body": False}
        incoming = [first]

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        count = 0

        async def collect(message: Any) -> None:
            nonlocal count
            count += 1
            if count == 5:
                gone.set()

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        await asyncio.wait_for(app(scope, receive, collect), 60)

    asyncio.run(scenario())
    assert closed.is_set()


def test_the_pages_describe_the_function() -> None:
    document = ask(add, method="GET", path="/openapi.json").json
    assert document["openapi"].startswith("3.1")
    page = ask(add, method="GET", path="/docs").body.decode()
    assert "<form id='try'>" in page and "Adds two numbers." in page
    assert ">x<" in page and "number" in page
    assert "http://" not in page and "https://" not in page and "//cdn" not in page
    assert ask(add, method="HEAD", path="/docs").body == b""


@pytest.mark.parametrize("target", [numbers, numbers_later])
def test_a_streaming_function_has_pages_too(target: Any) -> None:
    assert ask(target, method="GET", path="/openapi.json").status == 200
    assert ask(target, method="GET", path="/docs").status == 200


def test_a_body_that_stops_coming_is_a_504_and_closes_the_connection() -> None:
    async def scenario() -> list[Any]:
        incoming = [{"type": "http.request", "body": b'{"x"', "more_body": True}]
        sent: list[Any] = []

        async def receive() -> Any:
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def collect(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        await make_app(add, AppOptions(timeout_s=0.05))(scope, receive, collect)
        return sent

    head = asyncio.run(scenario())[0]
    assert head["status"] == 504 and (b"connection", b"close") in head["headers"]


def test_metrics_count_requests_by_status() -> None:
    async def scenario() -> str:
        app = make_app(add, AppOptions(labels={"endpoint": 'odd"name'}))
        await send(app, b'{"x": 1}')
        await send(app, b"{}")
        return (await send(app, method="GET", path="/-/metrics")).body.decode()

    text = asyncio.run(scenario())
    assert 'mlfuncs_worker_requests_total{endpoint="odd\\"name",code="200"} 1' in text
    assert 'mlfuncs_worker_requests_total{endpoint="odd\\"name",code="422"} 1' in text
    assert 'mlfuncs_worker_request_duration_seconds_count{endpoint="odd\\"name"} 2' in text


def test_a_draining_worker_closes_connections_and_is_not_ready() -> None:
    async def scenario() -> tuple[Answer, Answer]:
        app = make_app(add)
        app.begin_drain()
        return await send(app, b'{"x": 1}'), await send(app, method="GET", path="/-/ready")

    answer, ready = asyncio.run(scenario())
    assert (answer.status, answer.headers["connection"], ready.status) == (200, "close", 503)


def test_paths_of_the_users_own_application_are_served_beside_the_function() -> None:
    class WithRoutes:
        async def app(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 207, "headers": []})
            await send({"type": "http.response.body", "body": scope["path"].encode()})

        def __call__(self, x: int) -> int:
            return x

    assert ask(WithRoutes, {"x": 1}).json == 1
    answer = ask(WithRoutes, method="GET", path="/mine/1")
    assert (answer.status, answer.body) == (207, b"/mine/1")
    assert ask(WithRoutes, method="GET", path="/-/mine").status == 404


class WithLinks:
    """Has pages that lead to each other."""

    def __init__(self) -> None:
        from fastapi import FastAPI, Request

        self.app = FastAPI()

        async def items(request: Request) -> str:
            return str(request.url_for("items"))

        items.__annotations__ = {"request": Request}
        self.app.get("/items/", name="items", response_model=None)(items)

    def __call__(self, x: int) -> int:
        return x


@pytest.mark.parametrize(
    ("prefix", "root"),
    [("/predict--canary", "/predict--canary"), ("/ml/predict", "/ml/predict"), ("//evil.example", ""), ("", "")],
)
def test_links_of_the_users_own_application_stay_below_the_endpoints_prefix(prefix: str, root: str) -> None:
    headers = {"host": "a.example", "x-forwarded-prefix": prefix}
    moved = ask(WithLinks, method="GET", path="/items", headers=headers)
    assert (moved.status, moved.headers["location"]) == (307, f"http://a.example{root}/items/")
    assert ask(WithLinks, method="GET", path="/items/", headers=headers).json == f"http://a.example{root}/items/"


def test_never_calls_a_handler_with_made_up_values_but_runs_its_own_warmup() -> None:
    calls: list[Any] = []

    class Charges:
        def warmup(self) -> None:
            calls.append("warm")

        def __call__(self, amount: float = 1.0) -> float:
            calls.append(amount)
            return amount

    assert make_handler(Charges).warm() is None
    assert calls == ["warm"]


def test_the_context_of_a_request_reaches_the_handler_on_its_thread() -> None:
    from mlfuncs.serving.request_context import current_request

    def who(x: int) -> list[str]:
        request = current_request()
        assert request is not None and 0 < request.remaining_s() <= 60
        return [request.request_id, request.traceparent]

    headers = {**JSON_TYPE, "x-request-id": "r1", "traceparent": "00-ab-cd-01"}
    assert ask(who, {"x": 1}, headers=headers).json == ["r1", "00-ab-cd-01"]


def test_an_endpoint_with_batches_answers_each_request_with_its_own_rows() -> None:
    def double(rows: list[list[float]]) -> list[float]:
        return [2 * sum(row) for row in rows]

    async def scenario() -> list[Any]:
        app = make_app(double, AppOptions(batch=Batch(max_size=64)))
        bodies = [json.dumps({"rows": [[n], [n + 1]]}).encode() for n in range(20)]
        return [json.loads(answer.body) for answer in await asyncio.gather(*(send(app, body) for body in bodies))]

    assert asyncio.run(scenario()) == [[2.0 * n, 2.0 * n + 2] for n in range(20)]
