"""What the router passes on, and how: paths, headers, bodies, streams, upgrades."""

from __future__ import annotations

import asyncio
import re
import socket
import struct

import pytest
import websockets
from websockets.asyncio.server import ServerConnection, unix_serve

from mlfuncs_runtime.routes import Replica, Route
from tests.runtime.router_harness import Harness, message, run, serving, until, with_router


@pytest.mark.parametrize(
    ("target", "seen"),
    [
        ("/predict", "/"),
        ("/predict/", "/"),
        ("/predict?a=1", "/?a=1"),
        ("/predict/docs", "/docs"),
        ("/predict/a/b?c=%2F&d", "/a/b?c=%2F&d"),
        ("/v2/models/predict/infer", "/v2/models/predict/infer"),
        ("/v2/models/predict", "/v2/models/predict"),
    ],
)
def test_strips_the_endpoint_from_the_path(target: str, seen: str) -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        for _ in range(3):  # the first is parsed, the others are recognised
            assert (await harness.call("POST", target, b"{}")).json()["target"] == seen
        assert [request.body for request in worker.seen] == [b"{}"] * 3

    with_router(test)


def test_same_connection_carries_many_requests_and_bodies() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        for number in range(50):
            body = b"x" * (number % 7)
            await connection.send(message("POST", "/predict", body))
            assert (await connection.reply()).json()["body"] == body.decode()
        assert worker.accepted == 1

    with_router(test)


def test_gives_request_id_and_trace_and_keeps_given_ones() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        first = await harness.call("POST", "/predict", b"{}")
        second = await harness.call("POST", "/predict", b"{}")
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        third = await harness.call("POST", "/predict", b"{}", x_request_id="mine", traceparent=trace)
        assert first.header("x-request-id") != second.header("x-request-id")
        assert third.header("x-request-id") == "mine"
        traces = [seen.header("traceparent") for seen in worker.seen]
        assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", value) for value in traces[:2])
        assert traces[0] != traces[1]
        assert traces[2] == trace
        assert [seen.header("x-request-id") for seen in worker.seen] == [
            reply.header("x-request-id") for reply in (first, second, third)
        ]

    with_router(test)


def test_malformed_ids_are_replaced() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        reply = await harness.call("POST", "/predict", b"{}", x_request_id="a b", traceparent="00-0-0-0")
        assert reply.header("x-request-id") not in ("", "a b")

    with_router(test)


def test_a_short_request_id_never_confuses_a_recognised_answer() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        for request_id in ("1", "0", "20", "1", "HTTP", "200"):
            for _ in range(3):
                await connection.send(message("POST", "/predict", b"{}"))
                plain = await connection.reply()
                await connection.send(message("POST", "/predict", b"{}", x_request_id=request_id))
                reply = await connection.reply()
                assert reply.json() == plain.json()
                assert reply.header("x-request-id") == request_id

    with_router(test)


def test_hop_by_hop_headers_end_at_the_router() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        headers = {"Connection": "keep-alive, X-Private", "Keep_Alive": "timeout=5", "X_Private": "1", "X_Kept": "2"}
        await harness.call("GET", "/predict", b"", TE="trailers", Proxy_Connection="keep-alive", **headers)
        names = {name.lower() for name, _ in worker.seen[0].headers}
        assert not names & {"connection", "keep-alive", "x-private", "te", "proxy-connection"}
        assert worker.seen[0].header("x-kept") == "2"
        reply = await harness.call("GET", "/predict/closing")
        assert reply.header("keep-alive") == ""

    with_router(test)


def test_a_closing_worker_does_not_close_the_client() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        for _ in range(3):
            await connection.send(message("GET", "/predict/closing"))
            reply = await connection.reply()
            assert (reply.status, reply.body, reply.header("connection")) == (200, b"ok", "")
        assert worker.accepted == 3

    with_router(test)


def test_head_204_and_early_hints() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        await connection.send(message("HEAD", "/predict/x"))
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        for target, status, body in [("/predict/empty", 204, b""), ("/predict/hints", 200, b"ok")]:
            await connection.send(message("GET", target))
            reply = await connection.reply()
            assert (reply.status, reply.body) == (status, body)

    with_router(test)


def test_pipelined_requests_are_answered_in_order() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        targets = [f"/predict/{number}" for number in range(40)]
        await connection.send(b"".join(message("POST", target, target.encode()) for target in targets))
        for target in targets:
            assert (await connection.reply()).json()["body"] == target

    with_router(test)


def test_pipelining_mixes_refusals_and_answers_in_order() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        targets = ["/predict/a", "/nobody", "/-/healthz", "/predict/b"]
        await connection.send(b"".join(message("GET", target) for target in targets))
        assert [(await connection.reply()).status for _ in targets] == [200, 404, 200, 200]

    with_router(test)


def test_head_and_body_in_many_small_pieces() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        for byte in message("POST", "/predict", b"body"):
            await connection.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await connection.reply()).json()["body"] == "body"
        assert len(worker.seen) == 1

    with_router(test)


def test_chunked_request_becomes_whole_or_stays_chunked() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection = await harness.connect()
        await connection.send(head + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: dropped\r\n\r\n")
        assert (await connection.reply()).json()["body"] == "abcde"
        assert worker.seen[0].header("content-length") == "5"
        await connection.send(head + b"3\r\nabc\r\n")
        await until(lambda: harness.router.core.endpoints["predict"].in_flight() == {"w0": 1})
        await connection.send(b"2\r\nde\r\n0\r\n\r\n")
        assert (await connection.reply()).json()["body"] == "abcde"
        assert worker.seen[1].header("transfer-encoding") == "chunked"
        assert worker.seen[0].header("trailer") == worker.seen[1].header("trailer") == ""

    with_router(test)


def test_chunked_answer_passes_and_is_unchunked_for_http_1_0() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        assert (await harness.call("GET", "/predict/chunked")).body == b"abcdefg"
        connection = await harness.connect()
        await connection.send(b"GET /predict/chunked HTTP/1.0\r\n\r\n")
        raw = await connection.rest()
        assert raw.endswith(b"\r\n\r\nabcdefg")
        assert b"chunked" not in raw.lower()

    with_router(test)


def test_http_1_0_keeps_alive_only_when_asked() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        for _ in range(2):
            await connection.send(b"GET /predict/a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert (await connection.reply()).header("connection") == "keep-alive"
        await connection.send(b"GET /predict/a HTTP/1.0\r\n\r\n")
        assert (await connection.reply()).header("connection") == "close"
        assert await connection.rest() == b""

    with_router(test)


def test_answer_that_ends_with_its_connection() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/until-close"))
        raw = await connection.rest()
        assert raw.endswith(b"\r\n\r\nall of it")
        assert b"Connection: close" in raw

    with_router(test)


def test_server_sent_events_arrive_one_by_one() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/sse"))
        assert (await connection.part(b"one\n\n")).header("content-type") == "text/event-stream"
        worker.gate.set()
        await connection.part(b"two\n\n")
        worker.gate.set()
        assert (await connection.reply()).body == b"data: one\n\ndata: two\n\n"

    with_router(test)


def test_streams_flow_both_ways_at_once() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        await connection.send(b"POST /predict/duplex HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in (b"first", b"second", b"third"):
            await connection.send(b"%x\r\n%s\r\n" % (len(word), word))
            await connection.part(word)
        await connection.send(b"0\r\n\r\n")
        assert (await connection.reply()).body == b"firstsecondthird"

    with_router(test)


def test_large_bodies_pass_both_ways() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        body = bytes(range(256)) * 20_000
        connection = await harness.connect()
        sending = asyncio.create_task(connection.send(message("POST", "/predict/big/5000000", body)))
        reply = await connection.reply()
        await sending
        assert len(reply.body) == 5_000_000
        assert worker.seen[0].body == body

    with_router(test)


def test_a_client_that_does_not_read_holds_the_worker_back() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/big/50000000"))
        await until(lambda: worker.connections and worker.seen)
        (upstream,) = worker.connections
        client = next(iter(harness.router.core.clients))
        await until(lambda: client._blocked, "the router's buffer to fill")
        assert client.transport.get_write_buffer_size() < 2_000_000
        assert upstream.transport.get_write_buffer_size() > 30_000_000
        assert len((await connection.reply()).body) == 50_000_000

    with_router(test)


def test_expect_100_continue_is_answered_before_the_body() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
        await connection.send(head)
        assert await connection.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await connection.send(b"body")
        assert (await connection.reply()).json()["body"] == "body"
        assert worker.seen[0].header("expect") == ""

    with_router(test)


def test_websocket_echoes_through_the_router() -> None:
    async def main() -> None:
        async def echo(connection: ServerConnection) -> None:
            async for text in connection:
                await connection.send(text)

        async with serving() as harness:
            path = harness.folder / "ws.sock"
            async with unix_serve(echo, str(path)):
                replica = Replica("ws", "rev-1", str(path))
                harness.router.core.configure([Route("chat", "test", {"rev-1": 1}, (replica,))])
                async with websockets.connect(f"ws://127.0.0.1:{harness.port}/chat/ws", proxy=None) as client:
                    for text in ("one", "two" * 50_000):
                        await client.send(text)
                        assert await client.recv() == text
                endpoint = harness.router.core.endpoints["chat"]
                await until(lambda: endpoint.in_flight() == {"ws": 0})

    run(main())


def test_upgrade_to_anything_else_is_ignored() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMAAABkAARAAAAA"}
        await connection.send(message("GET", "/predict/a", b"", **upgrade) + message("GET", "/predict/b"))
        assert (await connection.reply()).json()["target"] == "/a"
        assert (await connection.reply()).json()["target"] == "/b"
        assert worker.seen[0].header("upgrade") == ""

    with_router(test)


def test_half_closed_client_still_gets_its_answer() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/gate"))
        connection.writer.write_eof()
        await until(lambda: worker.seen)
        worker.gate.set()
        assert (await connection.reply()).body == b"opened"
        assert await connection.rest() == b""

    with_router(test)


def test_a_client_that_ends_its_connection_leaves_the_queue() -> None:
    async def test(harness: Harness) -> None:
        harness.route()
        endpoint = harness.router.core.endpoints["predict"]
        connection = await harness.connect()
        await connection.send(message("POST", "/predict", b"{}"))
        await until(lambda: endpoint.queued == 1)
        connection.close()
        await until(lambda: endpoint.queued == 0)
        assert endpoint.queued_bytes == 0
        await until(lambda: not harness.router.core.clients)

    with_router(test)


def test_a_client_that_is_reset_frees_its_place() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        connection = await harness.connect()
        ends = struct.pack("ii", 1, 0)
        connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ends)
        await connection.send(message("POST", "/predict/hang", b"{}"))
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: worker.seen)
        assert endpoint.in_flight() == {"w0": 1}
        connection.writer.transport.abort()
        await until(lambda: endpoint.in_flight() == {"w0": 0})
        await until(lambda: not worker.connections)

    with_router(test)


def test_accepted_sockets_do_not_delay_small_answers() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        await connection.send(message("GET", "/predict/a"))
        await connection.reply()
        (client,) = harness.router.core.clients
        accepted = client.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    with_router(test)


def test_an_escaped_letter_in_an_endpoints_name_is_that_letter() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        assert (await harness.call("POST", "/%70redic%74/a%2Fb%61?c=%61", b"{}")).status == 200
        assert worker.seen[0].target == "/a%2Fb%61?c=%61"
        for target in ("/predict%2Fa", "/predict%00", "/%2D/metrics", "/%252D/metrics", "/predic%7"):
            assert (await harness.call("GET", target)).status == 404, target
        assert len(worker.seen) == 1

    with_router(test)


def test_a_worker_is_told_the_prefix_that_was_taken_off_its_paths() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker, tags={"canary": "rev-1"})
        for target in ("/predict/a", "/predict--canary/a?b=/c", "/%70redict/a", "/predict?b=/c", "/predict"):
            await harness.call("GET", target, X_Forwarded_Prefix="/elsewhere")
        told = [[value for name, value in seen.headers if name.lower() == "x-forwarded-prefix"] for seen in worker.seen]
        assert told == [[given] for given in ("/elsewhere/predict", "/elsewhere/predict--canary")] + [
            ["/elsewhere/predict"],
            ["/elsewhere/predict"],
            [],
        ]

    with_router(test)


@pytest.mark.parametrize(
    ("outer", "told"),
    [
        ("/a/b/", "/a/b/predict"),
        ("", "/predict"),
        ("//evil.example", "/predict"),
        ("/a?b", "/predict"),
        ("/", "/predict"),
    ],
)
def test_a_prefix_of_a_proxy_before_the_router_comes_first_when_it_is_a_path(outer: str, told: str) -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        await harness.call("GET", "/predict/docs", X_Forwarded_Prefix=outer)
        assert worker.seen[0].header("x-forwarded-prefix") == told

    with_router(test)


@pytest.mark.parametrize(
    ("target", "seen"),
    [("http://test/predict/a?b", "/a?b"), ("HTTP://TEST/predict", "/"), ("https://test/predict/", "/")],
)
def test_a_target_that_is_a_url_of_the_host_is_its_path(target: str, seen: str) -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        for _ in range(3):
            assert (await harness.call("GET", target)).json()["target"] == seen

    with_router(test)


def test_an_answer_of_http_1_0_is_one_of_1_1_for_the_client() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await harness.connect()
        for _ in range(2):
            await connection.send(message("GET", "/predict/old"))
            head = await connection.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"connection: close" not in head.lower()
            assert await connection.reader.readexactly(2) == b"ok"

    with_router(test)


def test_says_that_a_refused_websocket_ends_its_connection() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        asked = {"Connection": "Upgrade", "Upgrade": "websocket"}
        for target in ("/predict", "/nobody"):
            connection = await harness.connect()
            await connection.send(message("GET", target, **asked))
            assert b"connection: close\r\n" in (await connection.rest()).lower()

    with_router(test)
