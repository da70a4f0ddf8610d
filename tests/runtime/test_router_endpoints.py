"""Endpoints in the router: queues, limits, deadlines, revisions, workers that come, go and die."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import socket
import time
from typing import Literal

import pytest

from mlfuncs_runtime.router.core import RouterOptions
from mlfuncs_runtime.routes import Limits, Replica
from tests.runtime.router_harness import Connection, Harness, Reply, message, until, with_router


async def open_request(harness: Harness, target: str, body: bytes = b"{}", method: str = "POST") -> Connection:
    connection = await harness.connect()
    await connection.send(message(method, target, body))
    return connection


class Turnstile(asyncio.Event):
    """A gate that lets as many pass as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._turns = asyncio.Semaphore(0)

    async def wait(self) -> Literal[True]:
        """Return in one's turn."""
        return await self._turns.acquire() and True

    def let_pass(self, count: int) -> None:
        """That many more go on."""
        for _ in range(count):
            self._turns.release()


# --- which endpoint


def test_unknown_endpoint_is_404_that_lists_near_names() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker(), endpoint="churn-model")
        reply = await harness.call("POST", "/churn_model", b"{}")
        assert (reply.status, reply.header("content-type")) == (404, "application/problem+json")
        problem = reply.json()
        assert (problem["title"], problem["near"]) == ("NotFound", ["churn-model"])
        assert problem["request_id"] == reply.header("x-request-id")

    with_router(test)


def test_a_deleted_endpoint_is_gone_and_what_waited_is_told() -> None:
    async def test(harness: Harness) -> None:
        harness.route()
        waiting = await open_request(harness, "/predict")
        await until(lambda: harness.router.core.endpoints["predict"].queued == 1)
        harness.router.core.configure([])
        assert (await waiting.reply()).status == 404
        assert (await harness.call("POST", "/predict", b"{}")).status == 404

    with_router(test)


# --- from zero


def test_holds_requests_while_there_is_no_worker_and_wakes_the_supervisor() -> None:
    async def test(harness: Harness) -> None:
        harness.route()
        connections = [await open_request(harness, "/predict", b"%d" % n) for n in range(5)]
        await until(lambda: harness.router.core.endpoints["predict"].queued == 5)
        assert ("predict", "rev-1") in harness.woken
        harness.route(await harness.worker())
        bodies = [(await connection.reply()).json()["body"] for connection in connections]
        assert bodies == ["0", "1", "2", "3", "4"]

    with_router(test)


def test_requests_that_wait_for_a_busy_worker_are_told_to_the_supervisor() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker, concurrency={"rev-1": 1})
        first = await open_request(harness, "/predict/gate")
        await until(lambda: len(worker.seen) == 1)
        assert harness.woken == []  # it did not wait
        second = await open_request(harness, "/predict")
        await until(lambda: harness.router.core.endpoints["predict"].queued == 1)
        assert harness.woken == [("predict", "rev-1")]
        worker.gate.set()
        assert [(await connection.reply()).status for connection in (first, second)] == [200, 200]

    with_router(test)


def test_what_waits_for_a_revision_that_does_not_start_is_told_so_until_it_is_tried_again() -> None:
    async def test(harness: Harness) -> None:
        harness.route()
        waiting = await open_request(harness, "/predict", b"1")
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: endpoint.queued == 1)
        harness.route(broken_until_s={"rev-1": time.monotonic() + 25})
        for reply in (await waiting.reply(), await harness.call("POST", "/predict", b"2")):
            assert (reply.status, reply.json()["title"]) == (503, "Unavailable")
            assert "mlfuncs logs predict" in reply.json()["detail"]
            assert 20 <= int(reply.header("retry-after")) <= 25
        assert endpoint.queued == 0
        harness.route(broken_until_s={"rev-1": time.monotonic()})
        waiting = await open_request(harness, "/predict", b"3")
        await until(lambda: endpoint.queued == 1)
        harness.route(await harness.worker(), broken_until_s={"rev-1": time.monotonic() + 25})
        assert (await waiting.reply()).json()["body"] == "3"

    with_router(test)


def test_deadline_over_in_the_queue_is_504() -> None:
    async def test(harness: Harness) -> None:
        harness.route(limits=Limits(timeout_s=0.1))
        reply = await harness.call("POST", "/predict", b"{}")
        assert (reply.status, reply.json()["title"]) == (504, "DeadlineExceeded")
        assert harness.router.core.endpoints["predict"].queued == 0

    with_router(test)


def test_deadline_over_at_the_worker_is_504_and_ends_its_connection() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        reply = await harness.call("POST", "/predict/hang", b"{}", X_Mlfuncs_Timeout_Ms="800")
        assert reply.status == 504
        await until(lambda: not worker.connections)
        assert 0 < int(worker.seen[0].header("x-mlfuncs-timeout-ms")) <= 800

    with_router(test)


def test_a_caller_cannot_ask_for_more_time_than_the_endpoint_has() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker(), limits=Limits(timeout_s=0.1))
        assert (await harness.call("POST", "/predict/hang", b"{}", X_Mlfuncs_Timeout_Ms="60000")).status == 504

    with_router(test)


# --- limits


def test_queue_is_bound_by_count_and_answers_429_or_503_with_retry_after() -> None:
    async def test(harness: Harness) -> None:
        limits = Limits(queue_size=2)
        harness.route(limits=limits)
        waiting = [await open_request(harness, "/predict/gate") for _ in range(2)]
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: endpoint.queued == 2)
        away = await harness.call("POST", "/predict", b"{}")
        assert (away.status, away.json()["title"]) == (503, "Unavailable")
        assert int(away.header("retry-after")) >= 1
        worker = await harness.worker()
        harness.route(worker, limits=limits, concurrency={"rev-1": 1})
        waiting.append(await open_request(harness, "/predict/gate"))
        await until(lambda: endpoint.queued == 2)
        busy = await harness.call("POST", "/predict", b"{}")
        assert (busy.status, busy.json()["title"]) == (429, "Overloaded")
        assert int(busy.header("retry-after")) >= 1
        worker.gate.set()
        assert [(await connection.reply()).body for connection in waiting] == [b"opened"] * 3

    with_router(test)


def test_queue_is_bound_by_bytes() -> None:
    async def test(harness: Harness) -> None:
        harness.route(limits=Limits(queue_bytes=1000))
        waiting = await open_request(harness, "/predict", b"x" * 900)
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: endpoint.queued_bytes == 900)
        assert (await harness.call("POST", "/predict", b"x" * 101)).status == 503
        assert endpoint.queued_bytes == 900
        harness.route(await harness.worker())
        assert (await waiting.reply()).status == 200
        assert endpoint.queued_bytes == 0

    with_router(test)


@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_never_more_in_flight_at_a_worker_than_its_concurrency(concurrency: int) -> None:
    async def test(harness: Harness) -> None:
        workers = [await harness.worker() for _ in range(2)]
        harness.route(*workers, concurrency={"rev-1": concurrency})
        total = concurrency * 2 + 5
        connections = [await open_request(harness, "/predict/gate") for _ in range(total)]
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: endpoint.queued == 5)
        await until(lambda: sum(len(worker.seen) for worker in workers) == concurrency * 2)
        assert set(endpoint.in_flight().values()) == {concurrency}
        for worker in workers:
            worker.gate.set()
        assert [(await connection.reply()).status for connection in connections] == [200] * total

    with_router(test)


def test_ten_times_overload_keeps_the_wait_of_admitted_requests_bounded() -> None:
    """Ten come where one is served: most are turned away at once, the rest wait a queue's length."""

    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker, limits=Limits(queue_size=10), concurrency={"rev-1": 1})
        connections = [await open_request(harness, "/predict/gate") for _ in range(110)]
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: endpoint.rejected.get("queue") == 99)
        assert (endpoint.queued, endpoint.in_flight()) == (10, {"w0": 1})
        worker.gate.set()
        statuses = collections.Counter([(await connection.reply()).status for connection in connections])
        assert statuses == {200: 11, 429: 99}
        assert len(worker.seen) == 11

    with_router(test)


def test_overload_that_lasts_makes_no_admitted_request_wait_longer_than_the_queue() -> None:
    """Ten come in every turn of the one worker: who is let in is answered within as many turns as the queue is long."""
    queue, each, turns = 8, 10, 60

    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        worker.gate = Turnstile()
        harness.route(worker, limits=Limits(queue_size=queue), concurrency={"rev-1": 1})
        endpoint = harness.router.core.endpoints["predict"]
        answered = endpoint.revision("rev-1").counts.by_status
        connections = []
        for turn in range(turns):
            for number in range(turn * each, (turn + 1) * each):
                connections.append(await open_request(harness, "/predict/gate", b"%d" % number))
            await until(lambda: endpoint.queued == queue and sum(endpoint.in_flight().values()) == 1, "a full house")
            await until(lambda: len(connections) == endpoint.rejected.get("queue", 0) + len(worker.seen) + queue)
            worker.gate.let_pass(1)
            await until(lambda: answered.get(200) == len(connections) // each, "the turn's answer")
        worker.gate.let_pass(queue + 1)
        statuses = [(await connection.reply()).status for connection in connections]
        waits = [turn - int(seen.body) // each for turn, seen in enumerate(worker.seen)]
        assert statuses.count(200) == len(waits) == turns + queue
        assert statuses.count(429) == turns * each - len(waits)
        assert max(waits) <= queue
        assert waits[turns // 2] == queue  # the bound is met: the load was above it all the time

    with_router(test)


def test_a_slow_sender_takes_no_place_until_its_body_is_here() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker, concurrency={"rev-1": 1})
        slow = await harness.connect()
        await slow.send(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbo")
        revision = harness.router.core.endpoints["predict"].revisions["rev-1"]
        await until(lambda: revision.meter.active == 1)
        assert (await harness.call("POST", "/predict", b"{}")).status == 200
        await slow.send(b"dy")
        assert (await slow.reply()).json()["body"] == "body"

    with_router(test)


# --- workers that go


def test_a_worker_that_dies_with_a_post_is_502_and_nobody_else_notices() -> None:
    async def test(harness: Harness) -> None:
        worker, other = await harness.worker(), await harness.worker()
        harness.route(worker, other)
        reply = await harness.call("POST", "/predict/die", b"{}")
        assert (reply.status, reply.json()["title"]) == (502, "BadGateway")
        assert [(await harness.call("POST", "/predict", b"{}")).status for _ in range(10)] == [200] * 10
        assert len([seen for w in (worker, other) for seen in w.seen if seen.target == "/die"]) == 1

    with_router(test)


def test_an_idempotent_request_is_tried_once_more_elsewhere() -> None:
    async def test(harness: Harness) -> None:
        workers = [await harness.worker(), await harness.worker()]
        harness.route(*workers)
        assert (await harness.call("GET", "/predict/die")).status == 502
        assert [len(worker.seen) for worker in workers] == [1, 1]

    with_router(test)


def test_an_answer_cut_in_its_middle_cuts_the_client() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        reply = await harness.call("GET", "/predict/half")
        assert (reply.status, reply.complete) == (200, False)

    with_router(test)


@pytest.mark.parametrize("kind", ["garbage", "excess"])
def test_an_answer_that_is_not_one_is_502(kind: str) -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        connection = await open_request(harness, f"/predict/{kind}", b"", "GET")
        reply = await connection.reply()
        assert reply.status == 502
        await connection.send(message("GET", "/predict/a"))
        assert (await connection.reply()).json()["target"] == "/a"

    with_router(test)


@pytest.mark.parametrize("accepted", [False, True])
def test_a_post_that_no_worker_read_goes_to_another_one(accepted: bool) -> None:
    async def test(harness: Harness) -> None:
        path = harness.folder / "deaf.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        deaf, other = Replica("deaf", "rev-1", str(path)), await harness.worker(name="other")
        route = dataclasses.replace(harness.route(), replicas=(deaf,))
        harness.router.core.configure([route])
        connections = [await open_request(harness, "/predict", b"%d" % n) for n in range(5)]
        loop = asyncio.get_running_loop()
        sockets = [(await loop.sock_accept(listener))[0] for _ in range(5 if accepted else 0)]
        endpoint = harness.router.core.endpoints["predict"]
        await until(lambda: endpoint.in_flight() == {"deaf": 5})
        await until(lambda: all(request.upstream is not None for request in harness.router.core.active))
        await asyncio.sleep(0.01)  # the bytes leave the router's own buffer
        harness.router.core.configure([dataclasses.replace(route, replicas=(deaf, other.replica))])
        for ended in (listener, *sockets):
            ended.close()
        assert [(await connection.reply()).json()["worker"] for connection in connections] == ["other"] * 5
        assert endpoint.retried >= 5

    with_router(test)


def test_a_request_that_its_only_worker_did_not_read_is_sent_there_again() -> None:
    """A worker may close a kept connection in the moment in which a request is sent on it."""

    async def test(harness: Harness) -> None:
        path = harness.folder / "once.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        core, loop = harness.router.core, asyncio.get_running_loop()
        core.configure([dataclasses.replace(harness.route(), replicas=(Replica("once", "rev-1", str(path)),))])
        connection = await open_request(harness, "/predict")
        accepted, _ = await loop.sock_accept(listener)
        await until(lambda: all(r.upstream and not r.upstream.transport.get_write_buffer_size() for r in core.active))
        accepted.close()
        again, _ = await asyncio.wait_for(loop.sock_accept(listener), 20)
        await loop.sock_recv(again, 65_536)
        await loop.sock_sendall(again, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        assert (await connection.reply()).body == b"ok"
        again.close()
        listener.close()

    with_router(test)


def test_a_socket_that_refuses_is_passed_over_and_tried_again_later() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        missing = Replica("missing", "rev-1", str(harness.folder / "missing.sock"))
        route = harness.route(worker)
        harness.router.core.configure([dataclasses.replace(route, replicas=(missing, worker.replica))])
        replies = [await harness.call("POST", "/predict", b"{}") for _ in range(20)]
        assert {reply.status for reply in replies} == {200}
        revision = harness.router.core.endpoints["predict"].revisions["rev-1"]
        await until(lambda: len(revision.replicas) == 2, "the replica to be tried again")

    with_router(test)


def test_a_request_waits_for_a_worker_whose_socket_is_late() -> None:
    async def test(harness: Harness) -> None:
        late = Replica("late", "rev-1", str(harness.folder / "late.sock"))
        route = harness.route()
        harness.router.core.configure([dataclasses.replace(route, replicas=(late,))])
        connection = await open_request(harness, "/predict")
        await until(lambda: harness.router.core.endpoints["predict"].retried > 0)
        await harness.worker(name="late")
        assert (await connection.reply()).json()["worker"] == "late"

    with_router(test)


def test_a_removed_worker_finishes_and_gets_nothing_new() -> None:
    async def test(harness: Harness) -> None:
        old, new = await harness.worker(), await harness.worker()
        harness.route(old)
        pending = await open_request(harness, "/predict/gate")
        await until(lambda: old.seen)
        harness.route(new)
        drained = asyncio.create_task(harness.control({"op": "drain", "replica": "w0"}))
        assert (await harness.call("POST", "/predict", b"{}")).json()["worker"] == "w1"
        assert not drained.done()
        old.gate.set()
        assert (await pending.reply()).body == b"opened"
        assert await drained == {"replica": "w0"}
        await until(lambda: not old.connections, "its idle connections to be closed")

    with_router(test)


def test_draining_an_idle_or_unknown_worker_answers_at_once() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        await harness.call("POST", "/predict", b"{}")
        for name in ("w0", "nobody"):
            assert await harness.control({"op": "drain", "replica": name}) == {"replica": name}

    with_router(test)


# --- revisions


def by_worker(replies: list[Reply]) -> dict[str, int]:
    return dict(collections.Counter(reply.json()["worker"] for reply in replies))


def test_traffic_is_split_by_shares() -> None:
    async def test(harness: Harness) -> None:
        old, new = await harness.worker("rev-1"), await harness.worker("rev-2")
        harness.route(old, new, traffic={"rev-1": 90, "rev-2": 10})
        replies = [await harness.call("POST", "/predict", b"{}") for _ in range(100)]
        assert by_worker(replies) == {"w0": 90, "w1": 10}

    with_router(test)


def test_a_change_of_traffic_holds_from_the_next_request_of_a_kept_connection() -> None:
    async def test(harness: Harness) -> None:
        old, new = await harness.worker("rev-1"), await harness.worker("rev-2")
        connection = await harness.connect()
        seen = []
        for traffic in ({"rev-1": 1}, {"rev-2": 1}, {"rev-1": 1}):
            harness.route(old, new, traffic=traffic)
            for _ in range(3):
                await connection.send(message("POST", "/predict", b"{}"))
                seen.append((await connection.reply()).json()["worker"])
        assert seen == ["w0"] * 3 + ["w1"] * 3 + ["w0"] * 3

    with_router(test)


@pytest.mark.parametrize("how", ["header", "cookie"])
def test_callers_stick_to_their_revision(how: str) -> None:
    async def test(harness: Harness) -> None:
        old, new = await harness.worker("rev-1"), await harness.worker("rev-2")
        sticky = {"sticky_header": "X-User"} if how == "header" else {"sticky_cookie": "session"}
        harness.route(old, new, traffic={"rev-1": 50, "rev-2": 50}, **sticky)
        homes = {}
        for user in range(20):
            name = {"X_User": f"u{user}"} if how == "header" else {"Cookie": f"a=b; session=u{user}"}
            replies = [await harness.call("POST", "/predict", b"{}", **name) for _ in range(4)]
            (homes[user],) = by_worker(replies)
        assert set(homes.values()) == {"w0", "w1"}

    with_router(test)


def test_a_caller_without_the_cookie_is_given_one_that_sticks() -> None:
    async def test(harness: Harness) -> None:
        old, new = await harness.worker("rev-1"), await harness.worker("rev-2")
        harness.route(old, new, traffic={"rev-1": 50, "rev-2": 50}, sticky_cookie="session")
        for _ in range(10):
            first = await harness.call("POST", "/predict", b"{}")
            cookie = first.header("set-cookie")
            assert "HttpOnly" in cookie
            assert "Path=/predict" in cookie
            again = await harness.call("POST", "/predict", b"{}", Cookie=cookie.partition(";")[0])
            assert again.json()["worker"] == first.json()["worker"]
            assert again.header("set-cookie") == ""

    with_router(test)


def test_tags_reach_one_revision() -> None:
    async def test(harness: Harness) -> None:
        old, new = await harness.worker("rev-1"), await harness.worker("rev-2")
        harness.route(old, new, tags={"canary": "rev-2"})
        assert (await harness.call("POST", "/predict--canary/x", b"{}")).json() == {
            "worker": "w1",
            "method": "POST",
            "target": "/x",
            "body": "{}",
        }
        assert (await harness.call("POST", "/predict", b"{}")).json()["worker"] == "w0"
        missing = await harness.call("POST", "/predict--canari", b"{}")
        assert (missing.status, missing.json()["near"]) == (404, ["canary"])

    with_router(test)


def test_what_waits_for_a_revision_without_traffic_goes_where_the_traffic_goes() -> None:
    async def test(harness: Harness) -> None:
        harness.route(traffic={"rev-1": 100})
        connection = await open_request(harness, "/predict")
        await until(lambda: harness.router.core.endpoints["predict"].queued == 1)
        worker = await harness.worker("rev-2")
        harness.route(worker, traffic={"rev-2": 100})
        assert (await connection.reply()).json()["worker"] == "w0"
        assert "rev-1" not in harness.router.core.endpoints["predict"].revisions

    with_router(test)


# --- mirror


def test_mirror_copies_its_share_without_a_trace_for_the_caller() -> None:
    async def test(harness: Harness) -> None:
        main, shadow = await harness.worker("rev-1"), await harness.worker("rev-2")
        harness.route(main, shadow, traffic={"rev-1": 100}, mirror={"rev-2": 50})
        replies = [await harness.call("POST", "/predict", b"%d" % n) for n in range(10)]
        assert by_worker(replies) == {"w0": 10}
        await until(lambda: len(shadow.seen) == 5)
        assert [seen.body for seen in shadow.seen] == [b"1", b"3", b"5", b"7", b"9"]
        await until(lambda: harness.router.core.endpoints["predict"].mirror.under_way == 0)

    with_router(test)


def test_a_mirror_that_hangs_or_dies_never_slows_the_caller() -> None:
    async def test(harness: Harness) -> None:
        main, shadow = await harness.worker("rev-1"), await harness.worker("rev-2")
        main.gate.set()
        harness.route(main, shadow, traffic={"rev-1": 100}, mirror={"rev-2": 100})
        mirror = harness.router.core.endpoints["predict"].mirror
        for _ in range(100):
            assert (await harness.call("POST", "/predict/gate", b"{}")).status == 200
        assert (mirror.under_way, mirror.dropped) == (64, 36)
        shadow.kill()
        await until(lambda: mirror.under_way == 0)
        assert (await harness.call("POST", "/predict/gate", b"{}")).status == 200

    with_router(test)


def test_under_load_a_mirror_that_never_answers_stays_bounded_and_every_caller_is_served() -> None:
    """40 callers at once send 2,000 requests; only the callers' worker answers. No call waits for the mirror: its
    gate never opens, so a single wait would end the test by its deadline."""

    async def test(harness: Harness) -> None:
        main, shadow = await harness.worker("rev-1"), await harness.worker("rev-2")
        main.gate.set()
        harness.route(main, shadow, mirror={"rev-2": 100}, concurrency={"rev-1": 1, "rev-2": 1000})
        endpoint = harness.router.core.endpoints["predict"]
        most = 0

        async def caller() -> int:
            nonlocal most
            connection, served = await harness.connect(), 0
            for _ in range(50):
                await connection.send(message("POST", "/predict/gate", b"x" * 1000))
                served += (await connection.reply()).body == b"opened"
                most = max(most, endpoint.mirror.under_way, len(shadow.seen))
            connection.close()
            return served

        assert sum(await asyncio.gather(*(caller() for _ in range(40)))) == 2000
        assert most <= 64 and (endpoint.mirror.under_way, endpoint.mirror.dropped) == (64, 2000 - 64)
        assert endpoint.queued == 0 and endpoint.in_flight() == {"w0": 0, "w1": 64}

    with_router(test)


def test_a_mirrored_copy_ends_with_the_endpoints_timeout() -> None:
    async def test(harness: Harness) -> None:
        main, shadow = await harness.worker("rev-1"), await harness.worker("rev-2")
        main.gate.set()
        harness.route(main, shadow, mirror={"rev-2": 100}, limits=Limits(timeout_s=1.0))
        mirror = harness.router.core.endpoints["predict"].mirror
        assert (await harness.call("POST", "/predict/gate", b"{}")).status == 200
        await until(lambda: mirror.sent == 1 and mirror.under_way == 0, "the copy to be given up")
        await until(lambda: not shadow.connections, "its connection to be closed")

    with_router(test)


# --- bounds


def test_each_revision_has_its_own_bound_per_replica() -> None:
    async def test(harness: Harness) -> None:
        one, many = await harness.worker("rev-1"), await harness.worker("rev-2")
        harness.route(one, many, traffic={"rev-1": 50, "rev-2": 50}, concurrency={"rev-1": 1, "rev-2": 3})
        endpoint = harness.router.core.endpoints["predict"]
        connections = [await open_request(harness, "/predict/gate") for _ in range(8)]
        await until(lambda: endpoint.in_flight() == {"w0": 1, "w1": 3} and endpoint.queued == 4)
        one.gate.set()
        many.gate.set()
        assert [(await connection.reply()).status for connection in connections] == [200] * 8
        assert len(one.seen) == len(many.seen) == 4

    with_router(test)


def test_an_endpoint_without_traffic_says_so_and_when_to_come_again() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker, traffic={}, tags={"next": "rev-1"})
        reply = await harness.call("POST", "/predict", b"{}", x_request_id="mine")
        problem = reply.json()
        assert (reply.status, reply.header("content-type")) == (503, "application/problem+json")
        assert (problem["title"], problem["status"], problem["request_id"]) == ("Unavailable", 503, "mine")
        assert "endpoint 'predict' has no revision that serves" in problem["detail"]
        assert "mlfuncs logs predict" in problem["detail"] and int(reply.header("retry-after")) >= 1
        assert (await harness.call("POST", "/predict--next", b"{}")).status == 200
        harness.route(worker)
        assert (await harness.call("POST", "/predict", b"{}")).status == 200

    with_router(test)


def test_too_many_connections_are_told_to_come_again_and_a_flood_is_hung_up_on() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        held = [await harness.connect() for _ in range(4)]
        for connection in held:
            await connection.send(message("POST", "/predict", b"{}"))
            assert (await connection.reply()).status == 200
        fifth = await harness.connect()
        await fifth.send(message("POST", "/predict", b"{}"))
        reply = await fifth.reply()
        assert (reply.status, reply.header("connection"), reply.header("retry-after")) == (503, "close", "1")
        assert "4 connections" in reply.json()["detail"]
        assert await (await harness.connect()).rest() == b""  # while the fifth lingers
        fifth.close()
        await until(lambda: len(harness.router.core.clients) == 4)
        await held[0].send(message("POST", "/predict", b"{}"))  # who is in is served all the while
        assert (await held[0].reply()).status == 200
        held.pop().close()
        await until(lambda: len(harness.router.core.clients) == 3)
        assert (await harness.call("POST", "/predict", b"{}")).status == 200
        assert harness.router.core.refused[503] == 2

    with_router(test, RouterOptions(max_clients=4))


# --- the end of a router


def test_draining_finishes_what_is_in_flight_and_closes_politely() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        idle, busy = await harness.connect(), await harness.connect()
        for connection in (idle, busy):
            await connection.send(message("POST", "/predict", b"{}"))
            await connection.reply()
        await busy.send(message("GET", "/predict/gate"))
        await until(lambda: len(worker.seen) == 3)
        draining = asyncio.create_task(harness.router.drain())
        await asyncio.sleep(0)
        await idle.send(message("POST", "/predict", b"{}"))  # on its way when the order came
        last = await idle.reply()
        assert (last.status, last.header("connection")) == (200, "close")
        assert await idle.rest() == b""
        assert not draining.done()
        worker.gate.set()
        reply = await busy.reply()
        assert (reply.body, reply.header("connection")) == (b"opened", "close")
        await draining

    with_router(test, RouterOptions(drain_timeout_s=60.0))
