"""The router as a process: its command line, its control socket, its metrics, and restarts under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlfuncs_runtime.router.core import RouterOptions
from mlfuncs_runtime.router.meter import LoadMeter, RequestCounts
from mlfuncs_runtime.routes import Access, Limits, Replica, Route
from tests.runtime.router_harness import Connection, Harness, Worker, message, run, until, with_router

Require = Callable[[str, object], None]


# --- the control socket


def test_stats_tell_load_by_second_and_empty_what_they_told() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        harness.route(worker)
        pending = [await harness.connect() for _ in range(3)]
        for connection in pending:
            await connection.send(message("POST", "/predict/gate", b"{}"))
        await until(lambda: len(worker.seen) == 3)
        await asyncio.sleep(1.05)
        told = await harness.control({"op": "stats"})
        endpoint = told["endpoints"]["predict"]
        assert endpoint["in_flight"] == {"w0": 3}
        assert (endpoint["queued"], endpoint["queued_bytes"]) == (0, 0)
        revision = endpoint["revisions"]["rev-1"]
        buckets = revision["buckets"]
        assert sum(bucket[2] for bucket in buckets) == 3
        assert 0 < buckets[-1][1] <= 3.0
        assert buckets[-1][0] <= told["now_s"] < buckets[-1][0] + 2
        assert revision["active"] == 3
        worker.gate.set()
        for connection in pending:
            await connection.reply()
        again = (await harness.control({"op": "stats"}))["endpoints"]["predict"]["revisions"]["rev-1"]
        assert sum(bucket[2] for bucket in again["buckets"]) == 0
        assert 1.0 <= again["p50_s"] <= again["p99_s"] <= 2.5

    with_router(test)


def test_configure_keeps_the_table_for_the_next_router_and_refuses_nonsense() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        route = Route("predict", "test", {"rev-1": 1}, (worker.replica,), Limits(queue_size=3), Access(("ab",), 1.5, 2))
        assert await harness.control({"op": "configure", "routes": [route.to_dict()]}) == {"routes": 1}
        assert (await harness.control({"op": "ping"}))["endpoints"] == ["predict"]
        kept = json.loads((harness.folder / "routes.json").read_text())
        assert [Route.from_dict(values) for values in kept["routes"]] == [route]
        for order in ({"op": "configure"}, {"op": "configure", "routes": [{"endpoint": "a"}]}, {"op": "fly"}, {}):
            assert (await harness.control(order))["error"] == "InvalidInput"
        assert (await harness.control({"op": "ping"}))["endpoints"] == ["predict"]

    with_router(test)


def test_load_meter_averages_over_time() -> None:
    meter = LoadMeter(100.0)
    meter.enter(100.25)
    meter.enter(100.5)
    meter.leave(101.5)
    assert meter.take(102.0) == [(100, 0.75 + 0.5, 2), (101, 1.5, 0)]
    assert meter.take(104.0) == [(102, 1.0, 0), (103, 1.0, 0)]
    meter.leave(104.0)
    assert len(meter.take(100_000.0)) <= 121


def test_quantiles_are_those_since_the_last_question() -> None:
    counts = RequestCounts()
    assert counts.recent_quantiles_s([0.5]) == [None]
    for _ in range(99):
        counts.count(200, 0.003)
    counts.count(200, 7.0)
    p50, p99, worst = counts.recent_quantiles_s([0.5, 0.99, 1.0])
    assert 0.0025 <= (p50 or 0) <= 0.005
    assert 0.0025 <= (p99 or 0) <= 0.005
    assert 5 < (worst or 0) <= 10
    assert counts.recent_quantiles_s([0.5]) == [None]


# --- pages


def test_metrics_pass_promtool_and_hold_those_of_the_workers(require: Require, monkeypatch: pytest.MonkeyPatch) -> None:
    require("promtool", shutil.which("promtool"))
    monkeypatch.setattr("mlfuncs_runtime.router.metrics._SCRAPE_S", 60.0)  # these workers do answer

    async def test(harness: Harness) -> None:
        workers = [await harness.worker("rev-1"), await harness.worker("rev-2")]
        harness.route(*workers, traffic={"rev-1": 1, "rev-2": 1}, mirror={"rev-2": 10}, limits=Limits(queue_size=0))
        for _ in range(4):
            await harness.call("POST", "/predict", b"{}")
        await harness.call("POST", "/predict/die", b"{}")
        await harness.call("POST", "/nobody", b"{}")
        reply = await harness.call("GET", "/-/metrics")
        text = reply.body.decode()
        checked = subprocess.run(["promtool", "check", "metrics"], input=reply.body, capture_output=True, check=False)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, b""), text
        assert 'up{endpoint="predict",revision="rev-1",replica="w0"} 1' in text
        assert 'up{endpoint="predict",revision="rev-2",replica="w1"} 1' in text
        assert text.count("# TYPE up gauge") == 1
        assert 'mlfuncs_requests_total{endpoint="predict",revision="rev-1",code="200"} 2' in text
        assert 'mlfuncs_requests_refused_total{code="404"} 1' in text
        assert 'mlfuncs_request_duration_seconds_bucket{endpoint="predict",revision="rev-1",le="+Inf"}' in text

    with_router(test)


def test_a_worker_that_hangs_is_left_out_of_the_metrics() -> None:
    async def test(harness: Harness) -> None:
        worker = await harness.worker()
        silent = socket.socket(socket.AF_UNIX)
        silent.bind(str(harness.folder / "silent.sock"))
        silent.listen()
        other = Replica("silent", "rev-1", str(harness.folder / "silent.sock"))
        harness.router.core.configure([Route("predict", "test", {"rev-1": 1}, (worker.replica, other))])
        text = (await harness.call("GET", "/-/metrics")).body.decode()
        silent.close()
        assert 'replica="w0"' in text
        assert 'replica="silent"' not in text

    with_router(test)


def test_pages_list_endpoints_and_refuse_other_methods() -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker(), tags={"canary": "rev-1"})
        listing = (await harness.call("GET", "/-/api/endpoints")).json()["endpoints"]
        assert [(entry["name"], entry["traffic"], entry["tags"]) for entry in listing] == [
            ("predict", {"rev-1": 100}, {"canary": "rev-1"})
        ]
        assert (await harness.call("GET", "/-/healthz?x=1")).json() == {"status": "ok"}
        assert (await harness.call("GET", "/v2/health/ready")).json() == {"ready": True}
        assert (await harness.call("GET", "/v2")).json()["name"] == "mlfuncs"
        assert (await harness.call("POST", "/-/healthz", b"{}")).status == 405
        assert (await harness.call("GET", "/-/healthy")).json()["near"][0] == "/-/healthz"

    with_router(test)


def test_access_log_is_json_when_asked(caplog: Any) -> None:
    async def test(harness: Harness) -> None:
        harness.route(await harness.worker())
        await harness.call("POST", "/predict", b"{}", x_request_id="mine")

    caplog.set_level("INFO", logger="mlfuncs.router")
    with_router(test, RouterOptions(access_log="json"))
    (line,) = [json.loads(r.getMessage()) for r in caplog.records if r.getMessage().startswith("{")]
    assert line["duration_ms"] > 0
    del line["duration_ms"]
    assert line == {
        "method": "POST",
        "target": "/predict",
        "status": 200,
        "endpoint": "predict",
        "revision": "rev-1",
        "request_id": "mine",
    }


# --- the process


@contextlib.asynccontextmanager
async def process(listener: socket.socket, folder: Path, *more: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A router process on an inherited listener, once it answers; ended with SIGTERM."""
    control = folder / "control.sock"
    control.unlink(missing_ok=True)
    command = ["-m", "mlfuncs_runtime.router.process", "--fd", str(listener.fileno()), "--control", str(control)]
    running = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--state", str(folder / "routes.json"), *more, pass_fds=[listener.fileno()]
    )
    try:
        await until(lambda: control.exists() or running.returncode is not None, "the router to start")
        yield running
    finally:
        if running.returncode is None:
            running.send_signal(signal.SIGTERM)
        await asyncio.wait_for(running.wait(), 60)


def listen() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    return listener


async def hammer(port: int, ending: asyncio.Event, statuses: list[int | str]) -> None:
    """Requests one after another over kept connections; a connection that ends before an answer is a failure."""
    connection = None
    while not ending.is_set():
        if connection is None:
            connection = Connection(*await asyncio.open_connection("127.0.0.1", port))
        await connection.send(message("POST", "/predict", b"{}"))
        reply = await connection.reply()
        statuses.append(reply.status if reply.complete else "cut")
        if not reply.complete or reply.header("connection") == "close":
            connection.close()
            connection = None
    if connection is not None:
        connection.close()


def test_restarts_on_the_same_listener_lose_no_request(home: Path) -> None:
    """The supervisor's part is played here: it holds the listener while one router follows another."""

    async def main() -> None:
        folder = home.parent
        worker = Worker(folder / "w.sock", "rev-1", "w0")
        await worker.start()
        table = {"routes": [Route("predict", "test", {"rev-1": 1}, (worker.replica,)).to_dict()]}
        (folder / "routes.json").write_text(json.dumps(table))
        listener = listen()
        statuses: list[int | str] = []
        ending = asyncio.Event()
        hammers = [asyncio.create_task(hammer(listener.getsockname()[1], ending, statuses)) for _ in range(8)]
        for _ in range(3):  # each router ends in the middle of the load, and the next one takes it up
            async with process(listener, folder):
                answered = len(statuses)
                await until(lambda: len(statuses) >= answered + 100, "100 more answers")  # noqa: B023
        async with process(listener, folder):
            ending.set()
            await asyncio.gather(*hammers)
        worker.kill()
        listener.close()
        assert set(statuses) == {200}

    run(main(), timeout_s=120)


@pytest.mark.slow
def test_100_000_requests_leak_neither_descriptors_nor_memory(home: Path, require: Require) -> None:
    require("wrk", shutil.which("wrk"))

    async def main() -> None:
        folder = home.parent
        worker = Worker(folder / "w.sock", "rev-1", "w0")
        await worker.start()
        route = Route("predict", "test", {"rev-1": 1}, (worker.replica,))
        (folder / "routes.json").write_text(json.dumps({"routes": [route.to_dict()]}))
        listener = listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/predict"

        async def requests(least: int) -> None:
            sent = 0
            while sent < least:
                load = await asyncio.create_subprocess_exec(
                    *("wrk", "-t1", "-c16", "-d1s", url), stdout=asyncio.subprocess.PIPE
                )
                out = (await load.communicate())[0].decode()
                assert "Non-2xx" not in out
                assert "Socket errors" not in out
                sent += next(int(line.split()[0]) for line in out.splitlines() if "requests in" in line)
                worker.seen.clear()

        async with process(listener, folder) as running:
            router = psutil.Process(running.pid)
            await requests(5_000)
            before = (router.num_fds(), router.memory_info().rss)
            await requests(100_000)
            await until(lambda: router.num_fds() <= before[0] + 2)  # the last connections take their time to close
            grown = router.memory_info().rss - before[1]
        worker.kill()
        listener.close()
        assert grown < 4 * 2**20

    run(main(), timeout_s=500)


def test_wakes_the_supervisor_and_serves_once_it_is_told_of_a_worker(home: Path) -> None:
    async def main() -> None:
        folder = home.parent
        orders: list[dict[str, Any]] = []

        async def supervise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                orders.append(json.loads(line))
                writer.write(b"{}\n")
            writer.close()

        supervisor = await asyncio.start_unix_server(supervise, str(folder / "supervisor.sock"))
        route = Route("predict", "test", {"rev-1": 1})
        (folder / "routes.json").write_text(json.dumps({"routes": [route.to_dict()]}))
        listener = listen()
        async with process(listener, folder, "--supervisor", str(folder / "supervisor.sock")):
            client = Connection(*await asyncio.open_connection("127.0.0.1", listener.getsockname()[1]))
            await client.send(message("POST", "/predict", b"{}"))
            await until(lambda: orders)
            assert orders[0] == {"event": "wake", "endpoint": "predict", "revision": "rev-1"}
            worker = Worker(folder / "w.sock", "rev-1", "w0")
            await worker.start()
            reader, writer = await asyncio.open_unix_connection(str(folder / "control.sock"))
            table = [Route("predict", "test", {"rev-1": 1}, (worker.replica,)).to_dict()]
            writer.write(json.dumps({"op": "configure", "routes": table}).encode() + b"\n")
            assert json.loads(await reader.readline()) == {"routes": 1}
            assert (await client.reply()).status == 200
            writer.close()
            client.close()
            worker.kill()
        supervisor.close()
        listener.close()

    run(main())


def test_command_line_refuses_an_open_address_without_a_token(home: Path) -> None:
    command = [sys.executable, "-m", "mlfuncs_runtime.router.process", "--host", "0.0.0.0", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ})
    assert ended.returncode == 1
    assert ended.stderr.startswith("mlfuncs router: ")
    assert "MLFUNCS_TOKEN" in ended.stderr
    assert "Traceback" not in ended.stderr
