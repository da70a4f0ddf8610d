"""What the core costs beside peers: importing it, a tracked run around a function that does nothing, one metric.

    python benchmarks/core_overheads.py [--rounds 5] [--peers kfp,mlflow,feast,bentoml,mlrun]

CPU time of whole processes, rounds interleaved, medians. Peers are installed into environments of their own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from peers import peer_python

RUNS, METRICS = 200, 2_000
_TIMED = """
import time
def cost(work, times):
    work(); started = time.process_time()
    for _ in range(times): work()
    print((time.process_time() - started) / times * 1e6)
"""
_OURS_RUN = f"""{_TIMED}
import mlfuncs as ml
@ml.function
def add(a: int, b: int) -> int: return a + b
cost(lambda: add.run(a=1, b=2), {RUNS})
"""
_OURS_METRIC = f"""{_TIMED}
import mlfuncs as ml
@ml.function
def log() -> int:
    cost(lambda: ml.log_metric("loss", 0.5), {METRICS})
    return 0
ml.run(log)
"""
_MLFLOW = """
import logging, mlflow
logging.disable(logging.CRITICAL)
mlflow.set_tracking_uri("sqlite:///mlflow.db"); mlflow.set_experiment("benchmark")
def run():
    with mlflow.start_run():
        mlflow.log_params({"a": 1, "b": 2}); mlflow.log_metric("output", 3)
"""
_MLFLOW_RUN = f"{_TIMED}{_MLFLOW}cost(run, {RUNS // 10})"
_MLFLOW_METRIC = f"""{_TIMED}{_MLFLOW}
with mlflow.start_run():
    cost(lambda: mlflow.log_metric("loss", 0.5), {METRICS // 20})
"""


@dataclass(frozen=True)
class Case:
    """One measurement: `code` prints microseconds of CPU per unit; for an import the whole process's CPU counts."""

    what: str
    who: str
    code: str
    python: str
    whole_process: bool = False


def measure(case: Case, folder: str) -> float:
    """Microseconds of CPU. Raises CalledProcessError when the case fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [case.python, "-c", case.code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if case.whole_process:
        return 1e6 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return float(done.stdout.strip().splitlines()[-1])


def cases(peers: list[str]) -> list[Case]:
    """Ours first, then those peers that can be installed."""
    here = sys.executable
    found = [
        Case("import", "bare Python", "pass", here, True),
        Case("import", "mlfuncs", "import mlfuncs", here, True),
        Case("a tracked run", "mlfuncs", _OURS_RUN, here),
        Case("log_metric", "mlfuncs", _OURS_METRIC, here),
    ]
    packages = {"kfp": ["kfp"], "mlflow": ["mlflow-skinny", "sqlalchemy", "alembic", "mlflow"], "feast": ["feast"]}
    packages |= {"bentoml": ["bentoml"], "mlrun": ["mlrun"]}
    for peer in peers:
        python = peer_python(peer, packages[peer])
        if python:
            found.append(Case("import", peer, f"import {peer}", python, True))
            if peer == "mlflow":
                found.append(Case("a tracked run", peer, _MLFLOW_RUN, python))
                found.append(Case("log_metric", peer, _MLFLOW_METRIC, python))
    return found


def main() -> None:
    """Measure and print a markdown table: CPU and the ratio to ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="kfp,mlflow,feast,bentoml,mlrun")
    options = parser.parse_args()
    chosen = cases([peer for peer in options.peers.split(",") if peer])
    results: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds + 1):
            for case in chosen:
                taken = measure(case, folder)
                if number:  # the first round warms caches
                    results.setdefault((case.what, case.who), []).append(taken)
    print("| what | who | CPU | ratio to mlfuncs |\n|---|---|---:|---:|")
    for (what, who), taken in sorted(results.items()):
        median = statistics.median(taken)
        ours = statistics.median(results[what, "mlfuncs"])
        shown = f"{median / 1000:.2f} ms" if median > 500 else f"{median:.1f} us"
        print(f"| {what} | {who} | {shown} | {median / ours:.2f} |")


if __name__ == "__main__":
    main()
