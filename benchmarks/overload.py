"""Half to ten times the load that an endpoint can take: how long who is let in waits, and how fast the rest is refused.

    python benchmarks/overload.py [--seconds 5] [--queue 50] [--json FILE]

One replica that takes two requests at once, each of which waits 20 ms: 100 requests a second at most. The load is open
(see scaling_step.py), latencies count from when a request was due. A queue of n lets a request wait n / 100 s.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import uvloop
from scaling_step import Load, quantile

from mlfuncs.loading import load_target

SOURCE = """
import asyncio
import mlfuncs as ml

@ml.function(scale=ml.Scale(min=1, max=1, concurrency=2))
async def answer(x: int) -> int:
    await asyncio.sleep(0.02)
    return x
"""
CAPACITY = 100  # requests a second
STEPS = (0.5, 1, 2, 5, 10)  # of the capacity


def step(url: str, factor: float, seconds: float) -> dict[str, float]:
    """What became of a load of `factor` times the capacity."""
    load = Load(url, time.monotonic())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(load.run(factor * CAPACITY, seconds, 0.1))
    by_status = Counter(one.status for one in load.sent)
    if unexpected := set(by_status) - {"200", "429"}:
        raise SystemExit(f"answers other than 200 and 429: {unexpected} in {by_status}")
    admitted = [one.latency_s * 1000 for one in load.sent if one.status == "200"]
    refused = [one.latency_s * 1000 for one in load.sent if one.status == "429"]
    return {
        "load, requests/s": factor * CAPACITY,
        "answered, /s": len(admitted) / seconds,
        "refused, /s": len(refused) / seconds,
        "admitted p50, ms": quantile(admitted, 0.5),
        "admitted p99, ms": quantile(admitted, 0.99),
        "refused p99, ms": quantile(refused, 0.99),
    }


def main() -> None:
    """Deploy, run the steps, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--queue", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlf-over-", dir="/tmp") as folder:
        os.environ.update(MLFUNCS_HOME=f"{folder}/home", MLFUNCS_PORT="0", MLFUNCS_PROJECT="bench")
        path = Path(folder) / "served.py"
        path.write_text(SOURCE)
        try:
            endpoint = load_target(f"{path}:answer").deploy(queue_size=options.queue)
            found = [step(endpoint.url, factor, options.seconds) for factor in STEPS]
        finally:
            subprocess.run([sys.executable, "-m", "mlfuncs", "down"], check=True, capture_output=True)
    print(f"| {' | '.join(found[0])} |\n|{'---:|' * len(found[0])}")
    for row in found:
        print("| " + " | ".join("-" if value != value else f"{value:,.0f}" for value in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
