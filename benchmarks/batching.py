"""CPU per request with and without greedy batching, for three scikit-learn models at 1, 32 and 64 clients.

    python benchmarks/batching.py [--seconds 2] [--rounds 2] [--clients 1,32,64]

Each request is one row of 20 floats. Inline: one call a request. Greedy: what queued while the last batch ran is the
next batch (max_size 64, max_wait_ms 0). Interleaved rounds under wrk; CPU time of the worker's process.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psutil

MODELS = {
    "LogisticRegression": "from sklearn.linear_model import LogisticRegression; model = LogisticRegression()",
    "HistGradientBoosting": (
        "from sklearn.ensemble import HistGradientBoostingClassifier; model = HistGradientBoostingClassifier()"
    ),
    "RandomForest-100": "from sklearn.ensemble import RandomForestClassifier; model = RandomForestClassifier(100)",
}
_SERVE = """
import os, socket, sys
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
import numpy as np
from mlfuncs.spec import Batch
from mlfuncs_runtime.worker.asgi import make_app
from mlfuncs_runtime.worker.invocation import AppOptions
from mlfuncs_runtime.worker.server import Service
MODEL
rows = np.random.default_rng(1).normal(size=(1000, 20))
model.fit(rows, (rows[:, 0] + rows[:, 1] > 0).astype(int))
def predict(rows: list[list[float]]) -> list[float]:
    return model.predict_proba(np.array(rows))[:, 1].tolist()
batch = Batch(max_size=64) if sys.argv[2] == "greedy" else None
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
Service(make_app(predict, AppOptions(batch=batch)), listener).run()
"""
_JSON = {"Content-Type": "application/json"}
BODY = json.dumps({"rows": [[round(0.1 * i, 1) for i in range(20)]]})


class Worker:
    """One worker of a model, with batching or without."""

    def __init__(self, model: str, mode: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        source = folder / f"{model}-{mode}.py"
        source.write_text(_SERVE.replace("MODEL", MODELS[model]))
        self.script = folder / "post.lua"
        self.script.write_text(
            f"wrk.method = 'POST'\nwrk.body = '{BODY}'\nwrk.headers['Content-Type'] = 'application/json'\n"
        )
        self.process = psutil.Popen([sys.executable, str(source), str(self.port), mode])
        end = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{self.port}/", BODY.encode(), _JSON)
                urllib.request.urlopen(request, timeout=60).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def measure(self, clients: int, seconds: int) -> tuple[float, float]:
        """CPU microseconds per request, and requests per second."""
        before = self.process.cpu_times()
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "-s", str(self.script)]
        output = subprocess.run(
            [*command, f"http://127.0.0.1:{self.port}/"], capture_output=True, text=True, check=True
        ).stdout
        after = self.process.cpu_times()
        count = int(re.search(r"(\d+) requests in", output)[1])  # type: ignore[index]
        if "Non-2xx" in output or not count:
            raise RuntimeError(f"the worker answered with errors:\n{output}")
        return (after.user + after.system - before.user - before.system) / count * 1e6, count / seconds

    def stop(self) -> None:
        """End the worker."""
        self.process.terminate()
        self.process.wait(10)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", default="1,32,64")
    options = parser.parse_args()
    print("| model | clients | inline us | greedy us | inline / greedy | inline req/s | greedy req/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            workers = {mode: Worker(model, mode, Path(folder)) for mode in ("inline", "greedy")}
            for worker in workers.values():
                stack.callback(worker.stop)
                worker.measure(8, 1)
            for clients in map(int, options.clients.split(",")):
                rounds = [
                    {mode: worker.measure(clients, options.seconds) for mode, worker in workers.items()}
                    for _ in range(options.rounds)
                ]
                _print_row(model, clients, rounds)


def _print_row(model: str, clients: int, rounds: list[dict[str, tuple[float, float]]]) -> None:
    median = {
        (mode, at): statistics.median(one[mode][at] for one in rounds) for mode in ("inline", "greedy") for at in (0, 1)
    }
    ratio = statistics.median(one["inline"][0] / one["greedy"][0] for one in rounds)
    print(
        f"| {model} | {clients} | {median['inline', 0]:,.0f} | {median['greedy', 0]:,.0f} | {ratio:.1f}x "
        f"| {median['inline', 1]:,.0f} | {median['greedy', 1]:,.0f} |"
    )


if __name__ == "__main__":
    main()
