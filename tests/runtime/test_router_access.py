"""Who gets in: tokens, rate limits, CORS, the every-route check, and where a router may listen."""

from __future__ import annotations

import argparse
import hashlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.errors import SpecError
from mlfuncs_runtime.router.access import TokenBucket, is_token_valid
from mlfuncs_runtime.router.core import RouterOptions
from mlfuncs_runtime.router.pages import METRICS, PAGES
from mlfuncs_runtime.router.process import check_reach, open_listener
from mlfuncs_runtime.routes import Access
from tests.runtime.router_harness import Harness, message, with_router


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


PROJECT = RouterOptions(token_sha256=(digest("project"),))
OPEN_PATHS = {"/-/healthz"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_route_but_health_needs_the_token(method: str) -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker(), tags={"canary": "rev-1"})
        own = [path.decode() for path in (*PAGES, METRICS)] + ["/-/", "/-/api/unknown", "/v2/unknown", "/", "/nobody"]
        served = ["/predict", "/predict/docs", "/predict--canary", "/predict--no", "/v2/models/predict/infer"]
        for path in (*own, *served):
            connection = await harness.connect()
            await connection.send(message(method, path))
            head = await connection.reader.readuntil(b"\r\n\r\n")
            refused = head.startswith(b"HTTP/1.1 401 ") and b"WWW-Authenticate: Bearer" in head
            assert refused == (path not in OPEN_PATHS), (method, path, head)
            connection.close()
        assert harness.workers[0].seen == []

    with_router(test, PROJECT)


def test_the_projects_and_the_endpoints_tokens_are_taken_and_go_no_further() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker, access=Access(token_sha256=(digest("old"), digest("new"))))
        for token, status in [("project", 200), ("old", 200), ("new", 200), ("wrong", 401), ("", 401)]:
            for _ in range(2):
                reply = await harness.call("POST", "/predict", b"{}", Authorization=f"Bearer {token}")
                assert reply.status == status, token
        assert {seen.header("authorization") for seen in worker.seen} == {""}

    with_router(test, PROJECT)


def test_a_withdrawn_token_ends_on_a_kept_connection_too() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        connection = await harness.connect()
        request = message("POST", "/predict", b"{}", Authorization="Bearer a")
        statuses = []
        for tokens in ((digest("a"),), (digest("b"),), (digest("a"), digest("b"))):
            harness.route(worker, access=Access(token_sha256=tokens))
            for _ in range(3):
                await connection.send(request)
                statuses.append((await connection.reply()).status)
        assert statuses == [200] * 3 + [401] * 3 + [200] * 3

    with_router(test)


def test_an_open_endpoint_gets_the_callers_authorization() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        await harness.call("POST", "/predict", b"{}", Authorization="Basic abc")
        assert worker.seen[0].header("authorization") == "Basic abc"

    with_router(test)


@given(st.binary(max_size=30))
def test_only_the_token_itself_is_valid(guess: bytes) -> None:
    assert is_token_valid(b"Bearer " + guess, [digest("right")]) == (guess.strip() == b"right")
    assert not is_token_valid(guess, [digest("right")])


def test_rate_limit_is_429_with_retry_after() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker(), access=Access(rate_per_s=0.5, burst=3))
        replies = [await harness.call("POST", "/predict", b"{}") for _ in range(5)]
        assert [reply.status for reply in replies] == [200, 200, 200, 429, 429]
        assert 1 <= int(replies[-1].header("retry-after")) <= 4

    with_router(test)


@given(st.floats(0.1, 100), st.integers(1, 20), st.lists(st.floats(0, 2), max_size=60))
def test_a_bucket_never_passes_more_than_its_rate_and_burst(rate: float, burst: int, gaps: list[float]) -> None:
    bucket, now, passed = TokenBucket(rate, burst, 0.0), 0.0, 0
    for gap in gaps:
        now += gap
        wait = bucket.take(now)
        passed += wait == 0.0
        assert wait <= 1 / rate + 1e-9
        assert passed <= burst + rate * now + 1e-6


def test_cors_answers_preflights_and_marks_answers_for_allowed_origins() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        access = Access(token_sha256=(digest("a"),), cors_origins=("https://good.example",))
        harness.route(worker, access=access)
        asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
        allowed = await harness.call("OPTIONS", "/predict", b"", Origin="https://good.example", **asked)
        assert (allowed.status, allowed.header("access-control-allow-origin")) == (204, "https://good.example")
        assert allowed.header("access-control-allow-headers") == "authorization"
        refused = await harness.call("OPTIONS", "/predict", b"", Origin="https://bad.example", **asked)
        assert (refused.status, refused.header("access-control-allow-origin")) == (204, "")
        assert worker.seen == []
        for _ in range(3):
            reply = await harness.call(
                "POST", "/predict", b"{}", Origin="https://good.example", Authorization="Bearer a"
            )
            assert (reply.status, reply.header("access-control-allow-origin")) == (200, "https://good.example")
            other = await harness.call(
                "POST", "/predict", b"{}", Origin="https://bad.example", Authorization="Bearer a"
            )
            assert (other.status, other.header("access-control-allow-origin")) == (200, "")
        denied = await harness.call("POST", "/predict", b"{}", Origin="https://good.example")
        assert (denied.status, denied.header("access-control-allow-origin")) == (401, "https://good.example")

    with_router(test)


def test_another_address_without_a_token_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        with pytest.raises(SpecError, match=r"0\.0\.0\.0.*MLFUNCS_TOKEN"):
            check_reach(listener, [])
        check_reach(listener, [digest("a")])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        check_reach(listener, [])


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=str(port)):
            open_listener(argparse.Namespace(socket_fd=None, host="127.0.0.1", port=port))
