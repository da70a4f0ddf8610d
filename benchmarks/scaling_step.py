"""A step of load from nothing to 200 requests a second and back: what the endpoint's replicas and latencies do.

    python benchmarks/scaling_step.py [--rate 200] [--seconds 20] [--plot docs/images/scaling_step.svg] [--json FILE]

The load is open: request k is due at k / rate seconds whatever became of the others, and its latency counts from when
it was due, so a stall is seen by every request that it delayed. The handler waits 20 ms, as for a database, and a
replica takes two requests at once; sending and serving share this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

from mlfuncs.loading import load_target

SOURCE = """
import asyncio
import mlfuncs as ml

@ml.function(scale=ml.Scale(min=0, max=8, concurrency=2, window_s=6, grace_s=2))
async def answer(x: int) -> int:
    await asyncio.sleep(0.02)
    return x
"""
BEFORE_S = 2.0  # silence in front of the step
SAMPLE_S = 0.1
ZERO_S = 120.0  # when the way back to zero is given up
ANSWER_S = 60.0


@dataclass
class Sent:
    """One request: when it was due, in seconds from the start, how long it took from then, and its status."""

    due_s: float
    latency_s: float
    status: str


@dataclass
class Replicas:
    """What the endpoint's status said, sampled in a thread: (seconds, ready, starting)."""

    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def at_zero_since(self) -> float | None:
        """When the last replica had gone, or None."""
        busy = [at for at, ready, starting in self.samples if ready + starting]
        after = [at for at, ready, starting in self.samples if not ready + starting and busy and at > busy[-1]]
        return after[0] if after else None


class Load:
    """Sends POSTs on pooled keep-alive connections, each at the moment it is due."""

    def __init__(self, url: str, began: float) -> None:
        parts = urlsplit(url)
        self._address = (str(parts.hostname), int(parts.port or 80))
        body = b'{"x": 1}'
        self._request = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._began = began
        self.sent: list[Sent] = []

    async def run(self, rate: float, seconds: float, from_s: float) -> None:
        """Send `rate` requests a second from `from_s` on, and return when all are answered."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(int(rate * seconds)):
                due_s = from_s + number / rate
                await asyncio.sleep(self._began + due_s - time.monotonic())
                tasks.create_task(self._send(due_s))
        for _, writer in self._idle:
            writer.close()

    async def _send(self, due_s: float) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await self._exchange()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as exc:
            status = type(exc).__name__
        self.sent.append(Sent(due_s, time.monotonic() - self._began - due_s, status))

    async def _exchange(self) -> str:
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
        reader, writer = connection
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]))
        self._idle.append(connection)
        return head.split(b" ", 2)[1].decode()


def watch(endpoint: Any, began: float, replicas: Replicas, ending: threading.Event) -> None:
    """Sample the endpoint's replicas until `ending`."""
    while not ending.wait(SAMPLE_S):
        states = Counter(replica.state for replica in endpoint.status().replicas)
        replicas.samples.append((time.monotonic() - began, states["ready"], states["starting"]))


def step(endpoint: Any, rate: float, seconds: float) -> tuple[list[Sent], Replicas]:
    """Run the step on an endpoint at zero, and wait until it is back there."""
    replicas, ending, began = Replicas(), threading.Event(), time.monotonic()
    watcher = threading.Thread(target=watch, args=(endpoint, began, replicas, ending))
    watcher.start()
    load = Load(endpoint.url, began)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(load.run(rate, seconds, BEFORE_S))
        deadline = time.monotonic() + ZERO_S
        while replicas.at_zero_since() is None and time.monotonic() < deadline:
            time.sleep(SAMPLE_S)
        time.sleep(1.0)  # the plot shows that it stays there
    finally:
        ending.set()
        watcher.join()
    return sorted(load.sent, key=lambda one: one.due_s), replicas


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def summary(sent: list[Sent], replicas: Replicas, seconds: float) -> dict[str, float | None]:
    """The figures of the table."""
    zero_s = replicas.at_zero_since()
    settled = [one.latency_s for one in sent if one.due_s > BEFORE_S + seconds / 2]
    return {
        "requests": len(sent),
        "failures": sum(one.status != "200" for one in sent),
        "first answer from zero, ms": sent[0].latency_s * 1000,
        "p50, ms": quantile([one.latency_s for one in sent], 0.5) * 1000,
        "p99, ms": quantile([one.latency_s for one in sent], 0.99) * 1000,
        "p99 in the second half, ms": quantile(settled, 0.99) * 1000,
        "most replicas ready": max(ready for _, ready, _ in replicas.samples),
        "back at zero after the last request, s": None if zero_s is None else zero_s - BEFORE_S - seconds,
    }


def draw(sent: list[Sent], replicas: Replicas, path: Path) -> None:
    """The offered load, the replicas and the p99 of each second, one above the other."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mlfuncs", "font.size": 9})
    from matplotlib import pyplot as plt

    by_second: dict[int, list[float]] = {}
    for one in sent:
        by_second.setdefault(int(one.due_s), []).append(one.latency_s * 1000)
    end = math.ceil(replicas.samples[-1][0])
    figure, (load, count, delay) = plt.subplots(3, 1, sharex=True, figsize=(7, 5), layout="constrained")
    load.step(range(end + 1), [len(by_second.get(at, ())) for at in range(end + 1)], where="post", color="#444444")
    load.set_ylabel("requests due / s")
    at, ready, starting = zip(*_changes(replicas.samples), strict=True)
    both = [one + other for one, other in zip(ready, starting, strict=True)]
    count.step(at, both, where="post", color="#dd8452", label="with those starting", linewidth=1)
    count.step(at, ready, where="post", color="#4c72b0", label="ready")
    count.set_ylabel("replicas")
    count.legend(frameon=False)
    worst = [quantile(latencies, 0.99) for latencies in by_second.values()]
    delay.plot([second + 0.5 for second in by_second], worst, ".-", color="#4c72b0")
    delay.set(ylabel="p99 of each second, ms", yscale="log", xlabel="seconds", xlim=(0, end))
    delay.set_ylim(10 ** math.floor(math.log10(min(worst))), 10 ** math.ceil(math.log10(max(worst))))
    for axes in (load, count, delay):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _changes(samples: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """The samples at which something changed, and the last."""
    kept = [one for before, one in zip([None, *samples], samples, strict=False) if not before or before[1:] != one[1:]]
    return [(0.0, *kept[0][1:]), *kept, samples[-1]]


def main() -> None:
    """Deploy, wait for zero, run the step, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlf-step-", dir="/tmp") as folder:
        os.environ.update(MLFUNCS_HOME=f"{folder}/home", MLFUNCS_PORT="0", MLFUNCS_PROJECT="bench")
        path = Path(folder) / "served.py"
        path.write_text(SOURCE)
        try:
            endpoint = load_target(f"{path}:answer").deploy()
            while endpoint.status().state != "idle":
                time.sleep(SAMPLE_S)
            sent, replicas = step(endpoint, options.rate, options.seconds)
        finally:
            subprocess.run([sys.executable, "-m", "mlfuncs", "down"], check=True, capture_output=True)
    figures = summary(sent, replicas, options.seconds)
    print("| what | value |\n|---|---:|")
    for name, value in figures.items():
        print(f"| {name} | {'never' if value is None else f'{value:,.4g}'} |")
    if options.plot:
        draw(sent, replicas, options.plot)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["failures"]:
        raise SystemExit(f"requests failed: {Counter(one.status for one in sent)}")


if __name__ == "__main__":
    main()
