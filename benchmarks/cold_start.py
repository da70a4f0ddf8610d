"""From zero to an answering worker: forked from a zygote against spawned, with numpy, pandas, scikit-learn and a model.

    python benchmarks/cold_start.py [--forks 30] [--spawns 3] [--realtime]

Timed from the wish to the first answered prediction, over the worker's Unix socket, polled every half millisecond.
Memory is what a replica adds: its private pages (USS) after that prediction. With `--realtime` (root) the forks run
before all other work of the machine, which stands in for an idle one.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

import mlfuncs as ml
from mlfuncs.artifacts import ArtifactStore
from mlfuncs.bundles.bundle import build_bundle
from mlfuncs.settings import Settings
from mlfuncs_runtime.worker.config import WorkerConfig

BODY = json.dumps({"x": [0.1] * 30})


class Classifier:
    """A pipeline on the breast-cancer columns, warmed with one row."""

    def __init__(self, model: Any) -> None:
        import pandas as pd

        self.model, self.pandas = model, pd

    def warmup(self) -> None:
        """One prediction."""
        self([0.0] * 30)

    def __call__(self, x: list[float]) -> float:
        return float(self.model.predict_proba(self.pandas.DataFrame([x]).to_numpy())[0, 1])


def train() -> Any:
    """A fitted scikit-learn pipeline."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_breast_cancer()
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(data.data, data.target)


class Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("worker", timeout=10)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def predict_when_ready(path: str, timeout_s: float = 60) -> None:
    """Return once the worker at `path` has answered a prediction."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError), contextlib.closing(Unix(path)) as connection:
            connection.request("POST", "/", BODY, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 200:
                answer.read()
                return
            raise RuntimeError(f"the worker answered {answer.status}: {answer.read().decode()}")
        time.sleep(0.0005)
    raise RuntimeError(f"nothing answers on {path}")


def order(control: str, message: dict[str, Any]) -> dict[str, Any]:
    """One order to the zygote."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(control)
        connection.sendall(json.dumps(message).encode() + b"\n")
        with connection.makefile("rb") as file:
            answer: dict[str, Any] = json.loads(file.readline())
    if "pid" not in answer:
        raise RuntimeError(str(answer))
    return answer


def timed(count: int, start: Callable[[int], tuple[str, int]]) -> tuple[list[float], list[float]]:
    """Milliseconds and private MiB of `count` workers, one at a time; `start` gives socket and pid."""
    times, memory = [], []
    for number in range(count):
        began = time.perf_counter()
        path, pid = start(number)
        predict_when_ready(path)
        times.append((time.perf_counter() - began) * 1000)
        memory.append(psutil.Process(pid).memory_full_info().uss / 2**20)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return times, memory


class Workers:
    """Starts workers of one revision in a folder, by fork from its zygote or by spawn; `stop` ends them all."""

    def __init__(self, folder: Path, config: WorkerConfig, environ: dict[str, str]) -> None:
        self._folder, self._config, self._environ = folder, config, environ
        self._children: list[subprocess.Popen[bytes]] = []
        self._forked: list[int] = []
        self._control = str(folder / "z.sock")

    def start_zygote(self) -> int:
        """Start the zygote, wait until it has loaded the bundle, and give its pid."""
        zygote = self._launch("zygote", self._config.to_dict(), "zygote", "--control", self._control)
        while not os.path.exists(self._control):
            if zygote.poll() is not None:
                raise RuntimeError((self._folder / "log").read_text())
            time.sleep(0.01)
        return zygote.pid

    def spawn(self, number: int) -> tuple[str, int]:
        """Socket and pid of a worker that loads the bundle itself."""
        path = str(self._folder / f"s{number}.sock")
        return path, self._launch("process", self._config.to_dict() | {"socket": path}, f"s{number}").pid

    def fork(self, number: int) -> tuple[str, int]:
        """Socket and pid of a worker forked from the zygote."""
        path = str(self._folder / f"f{number}.sock")
        message = {"op": "fork", "replica": f"f{number}", "socket": path, "requested_at": time.monotonic()}
        self._forked.append(order(self._control, message)["pid"])
        return path, self._forked[-1]

    def stop(self) -> None:
        """End every process that was started here."""
        for pid in self._forked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.kill()
            child.wait()

    def _launch(self, module: str, values: dict[str, Any], label: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = self._folder / f"{label}.json"
        path.write_text(json.dumps(values | {"log_path": str(self._folder / "log")}))
        command = [sys.executable, "-m", f"mlfuncs_runtime.worker.{module}", "--config", str(path), *arguments]
        self._children.append(subprocess.Popen(command, env=self._environ, cwd=self._folder))
        return self._children[-1]


@contextlib.contextmanager
def prepared() -> Iterator[Workers]:
    """The model trained and bundled in a home of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = Settings(home=folder / "home", project="bench")
        function = ml.function(requirements=["scikit-learn", "pandas"])(Classifier)
        bundle = build_bundle(function.target, function.spec, settings)
        model = ArtifactStore.open(settings).put(train()).to_dict()
        config = WorkerConfig("cold", "bench", "rev-1", bundle.digest, init_args={"model": model})
        workers = Workers(folder, config, {**os.environ, **settings.to_environ()})
        try:
            yield workers
        finally:
            workers.stop()


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forks", type=int, default=30)
    parser.add_argument("--spawns", type=int, default=3)
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    with prepared() as workers:
        both = (0, workers.start_zygote())
        for pid in both if options.realtime else ():
            os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
        forked = timed(options.forks, workers.fork)
        for pid in both if options.realtime else ():
            os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
        print_table(forked, timed(options.spawns, workers.spawn))


def print_table(forked: tuple[list[float], list[float]], spawned: tuple[list[float], list[float]]) -> None:
    """Medians, 99th percentiles and memory."""
    print("| start | p50 ms | p99 ms | private MiB |\n|---|---:|---:|---:|")
    for name, (times, memory) in (("fork from the zygote", forked), ("spawn", spawned)):
        times = sorted(times)
        p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
        print(f"| {name} | {statistics.median(times):.1f} | {p99:.1f} | {statistics.median(memory):.1f} |")
    print(f"\nfork is {statistics.median(spawned[0]) / statistics.median(forked[0]):.0f} times as fast")


if __name__ == "__main__":
    main()
