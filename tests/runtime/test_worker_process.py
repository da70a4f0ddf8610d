"""A worker process from a real bundle, over its Unix socket."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.artifacts import ArtifactStore
from mlfuncs.bundles.bundle import build_bundle
from mlfuncs.settings import Settings
from mlfuncs.spec import Resources
from mlfuncs_runtime.worker.config import WorkerConfig

JSON_TYPE = {"Content-Type": "application/json"}
ROOT = Path(__file__).parents[2]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("worker", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.path)


class Worker:
    """One worker process under test."""

    def __init__(self, config: WorkerConfig, settings: Settings, folder: Path) -> None:
        self.config = config
        path = folder / "worker.json"
        path.write_text(json.dumps(config.to_dict()))
        environ = {**os.environ, **settings.to_environ()}
        environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "runtime"))
        command = [sys.executable, "-m", "mlfuncs_runtime.worker.process", "--config", str(path)]
        self.process = subprocess.Popen(command, env=environ, cwd=folder, stderr=subprocess.PIPE, text=True)

    def wait_ready(self, timeout_s: float = 60) -> Worker:
        wait_for(lambda: self.process.poll() is not None or self.status("/-/ready") == 200, timeout_s)
        assert self.process.poll() is None, self.log()
        return self

    def status(self, path: str) -> int:
        try:
            return self.request("GET", path)[0]
        except OSError:
            return 0

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(UnixConnection(self.config.socket)) as connection:
            payload = json.dumps(body) if body is not None and not isinstance(body, bytes) else body
            given = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, payload, given)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def log(self) -> str:
        return Path(self.config.log_path).read_text() if Path(self.config.log_path).exists() else ""

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        assert self.process.stderr is not None
        self.process.stderr.close()


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "h", project="shop", log_format="json")


@pytest.fixture
def start(tmp_path: Path, settings: Settings) -> Iterator[Any]:
    workers: list[Worker] = []

    def begin(function: Any, init: dict[str, Any] | None = None, **overrides: Any) -> Worker:
        function = function if isinstance(function, ml.Function) else ml.function(function)
        bundle = build_bundle(function.target, function.spec, settings)
        store = ArtifactStore.open(settings)
        config = WorkerConfig(
            endpoint="demo",
            project="shop",
            revision="rev-1",
            replica=f"r{len(workers)}",
            bundle=bundle.digest,
            socket=str(tmp_path / f"w{len(workers)}.sock"),
            log_path=str(tmp_path / f"w{len(workers)}.log"),
            init_args={name: store.put(value).to_dict() for name, value in (init or {}).items()},
            requested_at=time.monotonic(),
            **overrides,
        )
        workers.append(Worker(config, settings, tmp_path))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.stop()


def test_serves_a_bundle_until_sigterm_and_ends_at_once_when_idle(start: Any) -> None:
    def mean(x: list[float]) -> float:
        return sum(x) / len(x)

    worker = start(mean, drain_s=600.0).wait_ready()
    status, headers, body = worker.request("POST", "/", {"x": [1, 2, 6]}, {"X-Request-Id": "abc"})
    assert (status, json.loads(body), headers["x-request-id"]) == (200, 3.0, "abc")
    assert b"mlfuncs_worker_cold_start_seconds" in worker.request("GET", "/-/metrics")[2]
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(60) == 0
    assert time.monotonic() - began < 1
    assert not os.path.exists(worker.config.socket)


def test_a_sigterm_that_does_not_wake_the_main_thread_ends_the_worker_all_the_same(start: Any) -> None:
    """The kernel may hand it to another thread, or before the main one begins to wait: Python then only notes it."""

    def slow(x: int) -> int:
        import time

        time.sleep(0.06)
        return x

    worker = start(slow).wait_ready()
    assert worker.request("POST", "/", {"x": 1})[0] == 200
    pid = worker.process.pid
    other = next(int(task) for task in os.listdir(f"/proc/{pid}/task") if int(task) != pid)
    assert ctypes.CDLL(None, use_errno=True).tgkill(pid, other, signal.SIGTERM) == 0
    assert worker.process.wait(60) == 0


@pytest.mark.parametrize("way", ["sync", "async", "awaiting", "stream", "async_stream"])
def test_a_fork_that_comes_back_from_the_function_ends_and_does_not_serve(start: Any, way: str) -> None:
    def split() -> int:
        import os

        return os.fork()

    async def split_later() -> int:
        return split()

    async def split_and_wait() -> int:
        import asyncio

        await asyncio.sleep(0)
        child = split()
        await asyncio.sleep(0.001)
        return child

    def split_stream() -> Iterator[int]:
        yield split()

    async def split_and_stream() -> AsyncIterator[int]:
        yield await split_and_wait()

    ways = {"sync": split, "async": split_later, "awaiting": split_and_wait, "stream": split_stream}
    worker = start({**ways, "async_stream": split_and_stream}[way]).wait_ready()
    status, _, body = worker.request("POST", "/", {})
    child = int(body)
    assert status == 200 and child > 0  # the answer is the parent's
    wait_for(lambda: Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z")
    assert worker.request("POST", "/", {})[0] == 200


def test_finishes_a_request_in_flight_after_sigterm_and_closes_its_connection(start: Any, tmp_path: Path) -> None:
    def slow(mark: str) -> str:
        import pathlib
        import time

        pathlib.Path(mark).touch()
        while not pathlib.Path(mark + ".go").exists():
            time.sleep(0.01)
        return "done"

    worker = start(slow).wait_ready()
    mark = tmp_path / "mark"
    connection = UnixConnection(worker.config.socket)
    connection.request("POST", "/", json.dumps({"mark": str(mark)}), {"Content-Type": "application/json"})
    idle = UnixConnection(worker.config.socket)
    idle.request("GET", "/-/live")
    assert idle.getresponse().read()
    wait_for(mark.exists)
    worker.process.send_signal(signal.SIGTERM)
    assert idle.sock.recv(1) == b""  # the worker has begun to end: what has no request is closed
    mark.with_name("mark.go").touch()
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read()), answer.getheader("connection")) == (200, "done", "close")
    connection.close()
    idle.close()
    assert worker.process.wait(60) == 0


def test_streams_on_while_its_quick_steps_move_onto_the_loop(start: Any) -> None:
    def count(n: int):
        yield from range(n)

    worker = start(count).wait_ready()
    for _ in range(3):
        assert worker.request("POST", "/", {"n": 500})[2] == b"".join(b"%d\n" % n for n in range(500))


def test_constructs_a_class_once_with_the_artifacts_bound_at_deploy(start: Any) -> None:
    class Scorer:
        def __init__(self, weights: list[float]) -> None:
            self.weights = weights
            self.calls = 0

        def __call__(self, x: list[float]) -> dict[str, float]:
            self.calls += 1
            return {"score": sum(a * b for a, b in zip(self.weights, x, strict=True)), "calls": self.calls}

    worker = start(Scorer, {"weights": [1.0, 10.0]}).wait_ready()
    worker.request("POST", "/", {"x": [1, 2]})
    assert json.loads(worker.request("POST", "/", {"x": [1, 2]})[2]) == {"score": 21.0, "calls": 2}


def test_a_handler_that_never_returns_gets_a_504_and_the_process_gives_up(start: Any) -> None:
    def hang(x: int) -> int:
        import time

        time.sleep(600)
        return x

    worker = start(hang, timeout_s=1.0, stuck_grace_s=0.5).wait_ready()
    status, headers, body = worker.request("POST", "/", {"x": 1})
    assert status == 504
    assert json.loads(body)["request_id"] == headers["x-request-id"]
    assert worker.status("/-/ready") in (503, 0)
    assert worker.process.wait(60) == 70


def test_a_quick_handler_that_hangs_inline_gets_a_504_and_the_health_check_still_answers(
    start: Any, tmp_path: Path
) -> None:
    def mostly_quick(x: int, mark: str = "") -> int:
        import pathlib
        import time

        if x < 0:
            pathlib.Path(mark).touch()
            time.sleep(600)
        return x

    worker = start(mostly_quick, timeout_s=3.0, stuck_grace_s=1.0).wait_ready()
    with contextlib.closing(UnixConnection(worker.config.socket)) as connection:
        for x in range(400):
            connection.request("POST", "/", json.dumps({"x": x}), {"Content-Type": "application/json"})
            assert connection.getresponse().read() == b"%d" % x
        hanging = json.dumps({"x": -1, "mark": str(tmp_path / "mark")})
        connection.request("POST", "/", hanging, {"Content-Type": "application/json", "X-Request-Id": "hung"})
        wait_for((tmp_path / "mark").exists)
        assert worker.status("/-/live") == 200  # while it hangs
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["request_id"]) == (504, "hung")
    assert worker.status("/-/ready") in (503, 0)
    assert worker.process.wait(60) == 70


def test_requests_that_come_while_the_loop_stands_still_are_answered_when_it_goes_on(start: Any) -> None:
    async def blocks(x: float) -> float:
        import time

        time.sleep(x)  # a mistake that users make
        return x

    worker = start(blocks).wait_ready()
    connections = [UnixConnection(worker.config.socket) for _ in range(4)]
    for connection in connections:
        connection.request("POST", "/", '{"x": 1.2}' if connection is connections[0] else '{"x": 0}', JSON_TYPE)
        time.sleep(0.2)  # the later ones meet the standing loop, and then the guard
    assert worker.status("/-/live") == 200
    assert [connection.getresponse().status for connection in connections] == [200] * 4
    for connection in connections:
        connection.close()


def test_logs_prints_and_tracebacks_as_json_with_the_request_id_and_without_secrets(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leak(x: int) -> int:
        import os

        print("the password is", os.environ["DB_PASSWORD"])
        os.system("echo from a child: $DB_PASSWORD")
        raise ValueError("bad " + os.environ["DB_PASSWORD"])

    monkeypatch.setenv("DB_PASSWORD", "correct-horse-battery")
    worker = start(leak, secrets=("DB_PASSWORD",)).wait_ready()
    status, _, body = worker.request("POST", "/", {"x": 1}, {"X-Request-Id": "req-7"})
    assert status == 500
    assert b"horse" not in body and b"Traceback" not in body
    wait_for(lambda: "from a child" in worker.log())
    text = worker.log()
    assert "correct-horse-battery" not in text
    records = [json.loads(line) for line in text.splitlines()]
    printed = next(r for r in records if r["source"] == "stdout")
    failed = next(r for r in records if "traceback" in r)
    assert printed["message"] == "the password is ***"
    assert printed["request_id"] == failed["request_id"] == "req-7"
    assert 'raise ValueError("bad ' in failed["traceback"]
    assert "mlfuncs_runtime" not in failed["traceback"]
    assert failed["endpoint"] == "demo"


def test_a_handler_over_its_memory_bound_answers_500_and_the_log_says_why(start: Any) -> None:
    def hungry(mib: int) -> int:
        return len(bytearray(mib * 2**20))

    worker = start(hungry, resources=Resources(memory="600Mi")).wait_ready()
    status, _, body = worker.request("POST", "/", {"mib": 2000})
    assert status == 500
    assert "out of memory" in json.loads(body)["detail"]
    assert "out of memory" in worker.log()
    assert worker.request("POST", "/", {"mib": 1})[0] == 200


def test_a_bundle_that_cannot_load_ends_the_process_and_leaves_the_reason(start: Any, settings: Settings) -> None:
    class Broken:
        def __init__(self) -> None:
            raise RuntimeError("no model here")

        def __call__(self, x: int) -> int:
            return x

    worker = start(Broken)
    assert worker.process.wait(60) == 78
    problem = json.loads(Path(worker.config.socket + ".error").read_text())
    assert problem["detail"] == "no model here"
    assert "no model here" in worker.log()
