"""How long it takes to bundle a function of a notebook cell: changed code, requirements inferred, warm caches.

    python benchmarks/bundle_build.py [--json]

Each round changes the function, so that its bundle is walked, packed, signed and written anew; the table of installed
distributions and the lock are remembered from the first round, which is reported apart.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mlfuncs.bundles.bundle import build_bundle
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec

CELL = """
import numpy as np
from sklearn.linear_model import LogisticRegression
SCALE = {number}
def prepare(x):
    return np.asarray(x, dtype=float) * SCALE
def train(x: list[list[float]], y: list[int], c: float = 1.0) -> float:
    model = LogisticRegression(C=c).fit(prepare(x), y)
    return float(model.score(prepare(x), y))
"""


def measure(rounds: int = 30) -> dict[str, float]:
    """Milliseconds per bundle: the first, and the median and CPU median of `rounds` changed ones."""
    wall, cpu = [], []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder), project="benchmark")
        for number in range(rounds + 1):
            cell: dict[str, object] = {"__name__": "__main__"}
            exec(compile(CELL.format(number=number), f"<cell {number}>", "exec"), cell)
            started, spent = time.perf_counter(), time.process_time()
            build_bundle(cell["train"], FunctionSpec("train"), settings)
            wall.append(1e3 * (time.perf_counter() - started))
            cpu.append(1e3 * (time.process_time() - spent))
    return {"first_ms": wall[0], "median_ms": statistics.median(wall[1:]), "cpu_median_ms": statistics.median(cpu[1:])}


if __name__ == "__main__":
    result = measure()
    if "--json" in sys.argv:
        print(json.dumps(result))
    else:
        print(
            " · ".join(f"{name.removesuffix('_ms').replace('_', ' ')} {value:.1f} ms" for name, value in result.items())
        )
