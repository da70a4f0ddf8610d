"""What each of the router's checks and records costs by itself: Python time of one known request, without sockets.

    python benchmarks/router_parts.py [--rounds 5] [--json FILE]

A client's bytes go in, a worker's answer comes back, and both transports only keep the last write. The least of many
short batches is taken, which repeats within 2 % on a busy machine. router_hop.py has what kernel and loop take.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import json
import logging
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from router_hop import BODY, TOKEN

from mlfuncs_runtime.router.client import Client
from mlfuncs_runtime.router.core import Core, RouterOptions
from mlfuncs_runtime.router.spans import RouterSpans
from mlfuncs_runtime.router.upstream import Upstream
from mlfuncs_runtime.routes import Access, Replica, Route

TOKENS = (hashlib.sha256(TOKEN.encode()).hexdigest(),)
ORIGINS = ("https://example.org",)
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a token": {"access": Access(TOKENS)},
    "a rate limit": {"access": Access(rate_per_s=1e9, burst=10**9)},
    "a concurrency limit": {"concurrency": {"rev-1": 1000}},
    "CORS": {"access": Access(cors_origins=ORIGINS)},
    "all four: everything on": {
        "access": Access(TOKENS, rate_per_s=1e9, burst=10**9, cors_origins=ORIGINS),
        "concurrency": {"rev-1": 1000},
    },
    "spans for OpenTelemetry": {"spans": True},
    "access log as JSON": {"log": True},
}
REQUEST = (
    f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Length: {len(BODY)}\r\n"
    f"Content-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n\r\n{BODY}"
).encode()
ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4\r\n"
    b"x-request-id: 0123456789ab-00000001\r\n\r\n0.25"
)
BATCH, BATCHES = 100, 400


class LastWrite:
    """A transport that keeps the last bytes written and is always open."""

    def __init__(self) -> None:
        self.written: deque[bytes] = deque(maxlen=1)
        self.write = self.written.append

    def get_extra_info(self, name: str) -> None:
        """There is no socket."""

    def is_closing(self) -> bool:
        """Never."""
        return False

    def is_reading(self) -> bool:
        """Always."""
        return True


class Kept:
    """Takes spans up as the queue of an export does; nothing sends them."""

    def __init__(self) -> None:
        self.add = deque[Any](maxlen=4096).append


def router(part: dict[str, Any]) -> tuple[Client, Upstream]:
    """A client's and a worker's connection of a router with this part on."""
    log = logging.getLogger("benchmark")
    log.propagate = False
    log.handlers = [logging.FileHandler(os.devnull)]
    log.setLevel("INFO")
    spans = RouterSpans(Kept()) if "spans" in part else None  # type: ignore[arg-type]
    core = Core(RouterOptions(access_log="json" if "log" in part else "", log=log, spans=spans))
    options = {name: part[name] for name in ("access", "concurrency") if name in part}
    core.configure([Route("predict", "benchmark", {"rev-1": 1}, (Replica("one", "rev-1", "/nowhere"),), **options)])
    replica = core.endpoints["predict"].replicas["one"]
    client, upstream = Client(core), Upstream(replica)
    client.connection_made(LastWrite())  # type: ignore[arg-type]
    upstream.connection_made(LastWrite())  # type: ignore[arg-type]
    replica.park(upstream)
    return client, upstream


async def measure(part: dict[str, Any]) -> float:
    """The least nanoseconds of one request over all batches."""
    client, upstream = router(part)
    best = float("inf")
    for _ in range(BATCHES):
        began = time.perf_counter_ns()
        for _ in range(BATCH):
            client.data_received(REQUEST)
            upstream.data_received(ANSWER)
        best = min(best, (time.perf_counter_ns() - began) / BATCH)
    if client.transport.written[0] != ANSWER:  # type: ignore[attr-defined]
        raise SystemExit(f"the client was sent {client.transport.written[0]!r}")  # type: ignore[attr-defined]
    return best


def main() -> None:
    """Measure all parts in interleaved rounds and print the least of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gc.set_threshold(100_000)  # as the router's process does
    found = dict.fromkeys(PARTS, float("inf"))
    for _ in range(options.rounds):
        for name, part in PARTS.items():
            found[name] = min(found[name], asyncio.run(measure(part)))
    print("| on | Python us per request | more than plain |\n|---|---:|---:|")
    for name, nanoseconds in found.items():
        print(f"| {name} | {nanoseconds / 1000:.2f} | {(nanoseconds - found['plain']) / 1000:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({name: round(value) for name, value in found.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
