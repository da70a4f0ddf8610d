"""Under load, nothing that the platform does to itself is seen from outside: not one request fails.

Eight keep-alive connections send without a pause while revisions, processes and scales change. The one loss by design
is a POST that a worker was answering when it was killed: it may have had its effect, so it is not sent again and gets
502. Everything idempotent, and everything that was not yet handed to the worker, goes to another one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mlfuncs import adapters
from mlfuncs.serving.endpoints import Endpoint, deploy, endpoint
from mlfuncs.settings import read_settings
from mlfuncs.spec import Scale

CONNECTIONS = 8
WARM_REQUESTS = 50

SERVED = """
import time

def answer(x: int) -> int:
    return x + {n}

def handler(context, event):
    time.sleep(0.002)
    return str({n})
"""


class Load:
    """Requests without a pause, from before the `with` block to after it; `answers` counts them by status."""

    def __init__(self, url: str, method: str = "POST") -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 80)
        body = b'{"x": 1}' if method == "POST" else b""
        self._request = (
            f"{method} {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self.answers: Counter[str] = Counter()
        self.bodies: Counter[bytes] = Counter()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        self.wait_for(WARM_REQUESTS)
        return self

    def __exit__(self, *_: object) -> None:
        self.wait_for(WARM_REQUESTS)  # what was changed last has been asked, too
        self._ending.set()
        self._thread.join(timeout=60)

    def wait_for(self, more: int) -> None:
        """Return when that many more requests were answered."""
        wanted = sum(self.answers.values()) + more
        wait_until(lambda: sum(self.answers.values()) >= wanted, f"{more} more answers, have {self.answers}")

    @property
    def failed(self) -> dict[str, int]:
        """Everything that is not a 200, by what it was."""
        return {status: count for status, count in self.answers.items() if status != "200"}

    async def _run(self) -> None:
        await asyncio.gather(*(self._connection() for _ in range(CONNECTIONS)))

    async def _connection(self) -> None:
        while not self._ending.is_set():
            try:
                reader, writer = await asyncio.open_connection(self._host, self._port)
                while not self._ending.is_set():
                    writer.write(self._request)
                    async with asyncio.timeout(120):
                        await self._answer(reader)
                    await asyncio.sleep(0.001)  # leaves some of two cores to what is tested
                writer.close()
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as exc:
                self.answers[type(exc).__name__] += 1
                await asyncio.sleep(0.05)

    async def _answer(self, reader: asyncio.StreamReader) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = head.split(b" ", 2)[1].decode()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await reader.readexactly(length)
        self.answers[status] += 1
        self.bodies[body] += 1


def wait_until(holds: Callable[[], Any], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """One home for this module's tests, stopped at the end by the ids of its processes."""
    folder = Path(tempfile.mkdtemp(prefix="mlf-zf-", dir="/tmp"))
    yield folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFUNCS_HOME", str(folder / "home"))
        patch.setenv("MLFUNCS_PORT", "0")
        adapters.load("target:process")(read_settings()).stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def live(shared: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFUNCS_HOME", str(shared / "home"))
    monkeypatch.setenv("MLFUNCS_PORT", "0")


def put(folder: Path, kind: str, n: int, **options: Any) -> Endpoint:
    """Deploy version `n` of the function or handler as an endpoint of its own name."""
    from mlfuncs.loading import load_file

    path = folder / f"served_{n}.py"
    path.write_text(SERVED.format(n=n))
    options = {"scale": Scale(min=2, max=4), "name": kind, **options}
    return deploy(getattr(load_file(path), kind), **options)


def overview() -> dict[str, Any]:
    return adapters.load("target:process")(read_settings()).overview()


def pids(name: str) -> list[int]:
    return [replica.pid for replica in endpoint(name).status().replicas if replica.state == "ready" and replica.pid]


def kill_and_wait(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in running(), f"{pid} to end")


def running() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text()
        except OSError:
            continue
        if stat[stat.rindex(")") + 2] not in "ZX":
            found.add(int(path.parent.name))
    return found


def zygotes(shared: Path, name: str) -> list[int]:
    import json

    state = json.loads((shared / "home" / "run" / "state.json").read_text())
    return [z["process"]["pid"] for z in state["zygotes"] if z["endpoint"] == name and z["process"]]


def test_deploys_canaries_rollbacks_and_scales(shared: Path):
    served = put(shared, "answer", 1)
    with Load(served.url) as load:
        assert put(shared, "answer", 2).revision == "rev-2"
        put(shared, "answer", 3, traffic=10)
        load.wait_for(200)
        for share in (50, 90):
            served.traffic({"rev-2": 100 - share, "rev-3": share})
            load.wait_for(100)
        served.promote("rev-3")
        served.rollback()
        load.wait_for(50)
        put(shared, "answer", 2, scale=Scale(min=1, max=1))
        put(shared, "answer", 2, scale=Scale(min=3, max=4))
    assert load.failed == {}
    assert set(load.bodies) == {b"2", b"3", b"4"}  # every version was asked


def test_death_of_the_supervisor_and_of_the_zygote(shared: Path):
    served = put(shared, "answer", 1)
    before = pids("answer")
    with Load(served.url) as load:
        first = overview()["supervisor"]["pid"]
        kill_and_wait(first)
        load.wait_for(200)  # answered while the supervisor is away
        wait_until(lambda: (overview()["supervisor"] or {}).get("pid") not in (None, first), "another supervisor")
        assert set(before) <= set(pids("answer"))  # it went on with what ran
        for pid in zygotes(shared, "answer"):
            kill_and_wait(pid)
        load.wait_for(100)
        put(shared, "answer", 4)
        served.rollback()
    assert load.failed == {}


def test_death_of_workers_loses_nothing_idempotent(shared: Path):
    served = put(shared, "handler", 1)
    with Load(served.url, "GET") as load:
        for _ in range(2):
            victim = pids("handler")[0]
            kill_and_wait(victim)
            load.wait_for(200)
            wait_until(lambda: len(pids("handler")) == 2, "a new worker")
    assert load.failed == {}


def test_a_killed_worker_costs_at_most_the_posts_it_was_answering(shared: Path):
    served = put(shared, "handler", 1)
    with Load(served.url) as load:
        kill_and_wait(pids("handler")[0])
        load.wait_for(300)
    assert set(load.failed) <= {"502"}
    assert sum(load.failed.values()) <= CONNECTIONS


@pytest.mark.slow
def test_containers_are_deployed_rolled_back_and_killed(shared: Path, docker_base: str, monkeypatch):
    from mlfuncs_runtime.docker.engine import DockerEngine
    from mlfuncs_runtime.docker.launch import home_mark
    from mlfuncs_runtime.docker.replica import HOME_LABEL

    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", docker_base)
    engine, options = DockerEngine(), {"target": "docker", "name": "contained", "scale": Scale(min=2, max=2)}
    served = put(shared, "handler", 1, **options)
    with Load(served.url, "GET") as load:
        assert put(shared, "handler", 2, **options).revision == "rev-2"
        put(shared, "handler", 3, traffic=50, **options)
        load.wait_for(200)
        served.promote("rev-3")
        served.rollback()
        load.wait_for(100)
        for _ in range(2):
            wait_until(lambda: len(pids("contained")) == 2, "two containers")
            victim = engine.containers({HOME_LABEL: home_mark(read_settings())})[0]["Id"]
            engine.call("POST", f"/containers/{victim}/kill?signal=KILL")
            load.wait_for(200)
    served.delete()
    assert load.failed == {}
    assert set(load.bodies) == {b"1", b"2", b"3"}


def test_from_zero_and_back(shared: Path):
    served = put(shared, "answer", 5, scale=Scale(min=0, max=2, window_s=1, grace_s=0))
    with Load(served.url) as load:
        load.wait_for(100)
    wait_until(lambda: served.status().state == "idle" and not pids("answer"), "zero replicas")
    started = time.perf_counter()
    assert served.invoke(x=1) == 6
    took_s = time.perf_counter() - started
    print(f"from zero in {took_s * 1000:.0f} ms", file=sys.stderr)
    assert took_s < 5.0  # 20 ms on an idle machine
    with Load(served.url) as again:
        again.wait_for(100)
    assert load.failed == again.failed == {}
