"""What the router refuses before any worker sees it: smuggling, oversize, slowness, and bytes that are not HTTP."""

from __future__ import annotations

import asyncio
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs_runtime.router.core import RouterOptions
from mlfuncs_runtime.routes import Limits
from tests.runtime.router_harness import Harness, message, run, serving, until, with_router

POST = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
GET = b"GET /predict HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = b"GET /predict/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"

MALFORMED = {
    "different lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "equal lengths": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "list of lengths": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "signed length": POST + b"Content-Length: +3\r\n\r\nabc",
    "negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "hexadecimal length": POST + b"Content-Length: 0x3\r\n\r\nabc",
    "empty length": POST + b"Content-Length:\r\n\r\n",
    "length past 64 bits": POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "length and coding": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "coding and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "unknown coding": POST + b"Transfer-Encoding: gzip\r\n\r\n",
    "coding before chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked, then identity": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "almost chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "vertical tab before chunked": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST /predict HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size with prefix": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size with sign": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "chunk size past 64 bits": CHUNKED + b"FFFFFFFFFFFFFFFFF\r\nabc\r\n0\r\n\r\n",
    "chunk longer than told": CHUNKED + b"1\r\nabc\r\n0\r\n\r\n",
    "chunk size ended by LF": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "LF in a chunk extension": CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "length in a trailer": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    "folded header": GET + b"X-A: b\r\n c\r\n\r\n",
    "space before the colon": GET + b"X-A : b\r\n\r\n",
    "space before the first header": b"GET /predict HTTP/1.1\r\n Host: a\r\n\r\n",
    "bare CR": GET + b"X-A: b\rc\r\n\r\n",
    "bare LF": b"GET /predict HTTP/1.1\nHost: a\n\n",
    "LF after a header": GET + b"X-A: b\nX-C: d\r\n\r\n",
    "NUL": GET + b"X-A: b\0c\r\n\r\n",
    "control character": GET + b"X-A: b\x01c\r\n\r\n",
    "no colon": GET + b"nothing\r\n\r\n",
    "empty name": GET + b": b\r\n\r\n",
    "no host": b"GET /predict HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: b\r\n\r\n",
    "absolute form of another host": b"GET http://b/predict HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute form with a user": b"GET http://u@a/predict HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute form without a host": b"GET http:///predict HTTP/1.0\r\n\r\n",
    "CONNECT with a path": b"CONNECT /predict HTTP/1.1\r\nHost: a\r\n\r\n",
    "authority form": b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment": b"GET /predict#a HTTP/1.1\r\nHost: a\r\n\r\n",
    "raw byte in the path": b"GET /predict/\xe9 HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown method": b"BREW /predict HTTP/1.1\r\nHost: a\r\n\r\n",
    "lower-case method": b"get /predict HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "upgrade with a body": POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc" + SMUGGLED,
    "bytes before a 101": GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + SMUGGLED,
    "TLS": bytes.fromhex("16030100c8010000c403035a"),
    "two authorizations": GET + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
}
OTHER_STATUS = {
    b"GET /predict HTTP/2.0\r\nHost: a\r\n\r\n": b"505",
    b"GET /predict\r\n\r\n": b"505",
    GET + b"Expect: magic\r\n\r\n": b"417",
    GET + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n": b"431",
    GET + b"X-A: b\r\n" * 200 + b"\r\n": b"431",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n": b"431",
    b"GET /" + b"a" * 40_000: b"431",
    CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X-A: b\r\n" * 3000 + b"\r\n": b"431",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refuses_what_two_readers_could_read_differently(name: str) -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(MALFORMED[name])
        raw = await connection.rest()
        assert raw.startswith(b"HTTP/1.1 400 Bad Request\r\n"), raw
        assert raw.count(b"HTTP/1.1 4") == 1
        assert b"Connection: close" in raw
        assert worker.seen == []

    with_router(test)


def test_refusals_hold_after_the_same_head_was_recognised() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        for name, raw in MALFORMED.items():
            connection = await harness.connect()
            for _ in range(3):
                await connection.send(message("POST", "/predict", b"{}"))
                assert (await connection.reply()).status == 200
            await connection.send(raw)
            assert (await connection.rest()).startswith(b"HTTP/1.1 400 "), name
        assert {seen.target for seen in worker.seen} == {"/"}

    with_router(test)


@pytest.mark.parametrize(("raw", "status"), OTHER_STATUS.items(), ids=[s.decode() for s in OTHER_STATUS.values()])
def test_refuses_with_the_status_that_says_why(raw: bytes, status: bytes) -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(raw)
        assert (await connection.rest()).startswith(b"HTTP/1.1 " + status)
        assert worker.seen == []

    with_router(test)


@pytest.mark.parametrize("endless", [b"0\r\nX-A: ", b"0\r\n", b"2;a="])
def test_refuses_trailers_and_chunk_extensions_without_end(endless: bytes) -> None:
    """They are no part of the body, so that its bound does not hold for them."""

    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(CHUNKED + b"2\r\n{}\r\n" + endless)
        (client,) = harness.router.core.clients
        for _ in range(100):
            if client.closing:
                break
            await connection.send(b"X-A: b\r\n" * 200 if endless.endswith(b"\n") else b"a" * 1400)
            await asyncio.sleep(0.001)
        assert (await connection.rest()).startswith(b"HTTP/1.1 431 ")
        assert worker.seen == []

    with_router(test)


@pytest.mark.parametrize("given", [b"", b"X-Request-Id: mine\r\n"])
@pytest.mark.parametrize(
    "rest",
    [
        b"X-Mlfuncs-Timeout-Ms: abc\r\n\r\n",
        b"X-A: b\rc\r\n\r\n",
        b"X-A: " + b"a" * 20_000 + b"\r\n\r\n",
        b"X-A: b\r\n" * 200 + b"\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0x3\r\n",
    ],
)
def test_every_refusal_has_a_request_id(given: bytes, rest: bytes) -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        await connection.send(POST + given + rest)
        reply = await connection.reply()
        assert reply.status in (400, 431)
        name = reply.json()["request_id"]
        assert name == reply.header("x-request-id") and name and (not given or name == "mine")

    with_router(test)


def test_what_came_before_a_malformed_request_is_answered() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/gate") + MALFORMED["bare CR"])
        await until(lambda: worker.seen)
        worker.gate.set()
        assert (await connection.reply()).body == b"opened"
        assert (await connection.reply()).status == 400
        assert await connection.rest() == b""

    with_router(test)


def test_bytes_after_connection_close_are_nobodys() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(GET + b"Connection: close\r\n\r\n" + SMUGGLED)
        reply = await connection.reply()
        assert (reply.status, reply.header("connection")) == (200, "close")
        assert await connection.rest() == b""
        assert len(worker.seen) == 1

    with_router(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_bound_is_413(chunked: bool) -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker(), limits=Limits(body_bytes=100_000))
        connection = await harness.connect()
        body = b"x" * 150_000
        if chunked:
            await connection.send(CHUNKED + b"%x\r\n%s\r\n" % (len(body), body))
        else:
            await connection.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        reply = await connection.reply()
        assert (reply.status, reply.json()["title"]) == (413, "TooLarge")
        assert await connection.rest() == b""
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: endpoint.in_flight() == {"w0": 0})

    with_router(test)


def test_expected_body_over_the_bound_is_never_asked_for() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker(), limits=Limits(body_bytes=10))
        connection = await harness.connect()
        await connection.send(POST + b"Expect: 100-continue\r\nContent-Length: 11\r\n\r\n")
        assert (await connection.rest()).startswith(b"HTTP/1.1 413 ")

    with_router(test)


QUICK = RouterOptions(
    head_timeout_s=1.0, idle_timeout_s=1.0, stall_timeout_s=1.0
)  # a loaded machine stands still for less


@pytest.mark.parametrize("sent", [b"", b"GET /pred", GET + b"X-A: b\r\n"])
def test_a_slow_head_is_given_up(sent: bytes) -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        await connection.send(sent)
        raw = await connection.rest()
        assert raw == b"" if not sent else raw.startswith(b"HTTP/1.1 408 ")

    with_router(test, QUICK)


def test_a_head_that_trickles_is_given_up_all_the_same() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/a"))
        await connection.reply()

        async def trickle() -> None:
            await connection.send(GET)
            while True:
                await connection.send(b"X-A: b\r\n")
                await asyncio.sleep(0.05)

        trickling = asyncio.create_task(trickle())
        raw = await connection.rest()
        trickling.cancel()
        assert raw.startswith(b"HTTP/1.1 408 ")
        assert len(worker.seen) == 1

    with_router(test, QUICK)


def test_a_body_that_stalls_is_given_up() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(POST + b"Content-Length: 10\r\n\r\nabc")
        assert (await connection.rest()).startswith(b"HTTP/1.1 408 ")
        assert worker.seen == []
        assert harness.router.core.endpoints["predict"].revisions["rev-1"].meter.active == 0

    with_router(test, QUICK)


@pytest.mark.parametrize("sent", [b"GET /pred", POST + b"Content-Length: 10\r\n\r\nabc", CHUNKED + b"3\r\nab"])
def test_a_request_cut_in_its_middle_is_refused(sent: bytes) -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(sent)
        connection.writer.write_eof()
        assert (await connection.rest()).startswith(b"HTTP/1.1 400 ")
        assert worker.seen == []
        await until(lambda: not harness.router.core.clients)

    with_router(test)


def test_an_idle_connection_is_closed() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/a"))
        assert (await connection.reply()).status == 200
        assert await connection.rest() == b""

    with_router(test, QUICK)


# --- fuzzing

WORDS = [
    *(b"GET POST HEAD PUT OPTIONS CONNECT PRI".split()),
    b" ", b" ", b"\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b":", b": ", b"\t", b"\0", b"\xff",
    b"/predict", b"/predict/die", b"/predict/half", b"/predict/chunked", b"/predict/excess", b"/predict/garbage",
    b"/nobody", b"/-/healthz", b"/-/metrics", b"/v2/models/predict/infer", b"http://a/", b"*", b"//", b"?a=b#c",
    b"HTTP/1.1", b"HTTP/1.0", b"HTTP/0.9", b"Host", b"Host: a\r\n", b"Content-Length: 3\r\n", b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Expect: 100-continue\r\n", b"X-Mlfuncs-Timeout-Ms: 50\r\n", b"Origin: null\r\n", b"Cookie: a=b\r\n",
    b"abc", b"3\r\nabc\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"a" * 5000,
    b"GET /predict HTTP/1.1\r\nHost: a\r\n\r\n", b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS) | st.binary(max_size=8), max_size=24), min_size=1, max_size=8))
def test_no_bytes_bring_it_down(conversations: list[list[bytes]]) -> None:
    """Whatever clients send, in whatever pieces, the next well-formed request is answered and nothing leaks."""
    chance = random.Random(repr(conversations))

    async def talk(harness: Harness, pieces: list[bytes]) -> None:
        connection = await harness.connect()
        data = b"".join(pieces)
        while data:
            size = chance.choice([1, 7, 100, 100_000])
            connection.writer.write(data[:size])
            data = data[size:]
            await asyncio.sleep(0)
        if chance.random() < 0.5:
            connection.writer.write_eof()
            await asyncio.wait_for(connection.rest(), 60)
        connection.writer.transport.abort()

    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        core = harness.router.core
        for pieces in conversations:
            await talk(harness, pieces)
        reply = await harness.call("POST", "/predict", b"{}")
        assert (reply.status, reply.body[:1]) == (200, b"{")
        await until(lambda: not core.clients and not core.active, "every connection to end")
        endpoint = core.endpoints["predict"]
        await until(lambda: set(endpoint.in_flight().values()) == {0})
        assert (endpoint.queued, endpoint.queued_bytes) == (0, 0)
        assert all(revision.meter.active == 0 for revision in endpoint.revisions.values())

    with_router(test, RouterOptions(head_timeout_s=0.2, stall_timeout_s=0.2))


def test_many_broken_connections_leak_no_descriptor() -> None:
    async def main() -> None:
        async with serving() as harness:
            worker = await harness.worker()
            harness.route(worker)
            core = harness.router.core
            targets = ["/predict", "/predict/die", "/predict/half", "/nobody", "/predict/garbage", "/predict/closing"]

            async def batch() -> None:
                for number in range(120):
                    connection = await harness.connect()
                    await connection.send(message("POST", targets[number % len(targets)], b"{}"))
                    if number % 3:
                        await connection.reply()
                    connection.writer.transport.abort()
                await until(lambda: not core.clients and not worker.connections - _pooled(worker))

            def _pooled(_: object) -> set[object]:
                return set(list(worker.connections)[:8])

            await batch()
            before = len(os.listdir("/proc/self/fd"))
            await batch()
            assert len(os.listdir("/proc/self/fd")) <= before + 8

    run(main())
