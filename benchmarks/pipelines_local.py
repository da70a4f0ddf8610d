"""Local pipeline runs beside kfp.local: time per warm step, fan-out, loops, cache hits, compiling, a large table.

    python benchmarks/pipelines_local.py [--chain 50] [--fan 100] [--kfp-steps 10] [--table-mib 100] [--rounds 3]

Rounds of the two engines alternate. kfp.local takes far longer per step, so it gets fewer steps; figures are per step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("MLFUNCS_HOME", tempfile.mkdtemp(prefix="bench-home-"))

from benchmarks_pipeline_components import kfp_add  # noqa: E402
from kfp import compiler, dsl, local  # noqa: E402

import mlfuncs as ml  # noqa: E402
from mlfuncs.settings import read_settings  # noqa: E402
from mlfuncs_pipelines.engine import Options  # noqa: E402
from mlfuncs_pipelines.runner import run_pipeline  # noqa: E402
from mlfuncs_pipelines.validate import load_pipeline  # noqa: E402


@ml.function
def add(a: int, b: int = 1) -> int:
    return a + b


@ml.function
def table(mib: int) -> Any:
    import numpy as np
    import pyarrow as pa

    rows = mib * 2**20 // 80
    rng = np.random.default_rng(0)
    return pa.table({f"c{i}": rng.normal(size=rows) for i in range(10)})


@ml.function
def consume(data: Any) -> int:
    return data.num_rows


def chain(component: Callable[..., Any], steps: int, ours: bool) -> Any:
    def body():
        last = component(0) if ours else component(a=0)
        for _ in range(steps - 1):
            last = component(last.output) if ours else component(a=last.output)

    return dsl.pipeline(name="chain")(body)


def fan(component: Callable[..., Any], steps: int, ours: bool) -> Any:
    def body():
        for number in range(steps):
            component(number) if ours else component(a=number)

    return dsl.pipeline(name="fan")(body)


def loop(component: Callable[..., Any], steps: int, ours: bool) -> Any:
    def body():
        with dsl.ParallelFor(list(range(steps))) as item:
            component(item) if ours else component(a=item)

    return dsl.pipeline(name="loop")(body)


def ours(pipeline: Any, cache: bool = False) -> float:
    """Seconds for one run on the local engine, from the compiled file's values to the finished run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        loaded = load_pipeline(path)
        began = time.perf_counter()
        done = run_pipeline(loaded, {}, read_settings(), Options(cache=cache))
        spent = time.perf_counter() - began
        assert done.status == "succeeded", done.error
    return spent


def theirs(pipeline: Any) -> float:
    """Seconds for one run with kfp.local."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=folder)
        began = time.perf_counter()
        pipeline()
        return time.perf_counter() - began


def measure(rounds: int, cases: dict[str, tuple[Callable[[], float], int]]) -> dict[str, float]:
    """Median milliseconds per step of each case, the cases taking turns."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (run, steps) in cases.items():
            found[name].append(run() / steps * 1000)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def large_table(mib: int) -> dict[str, float]:
    def body():
        consume(table(mib).output)

    run = dsl.pipeline(name="table")(body)
    ours(run)
    spent = ours(run)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"table_mib": mib, "seconds": round(spent, 2), "peak_child_mib": round(children, 0)}


def compile_ms(steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        compiler.Compiler().compile(fan(add, steps, True), f"{folder}/p.yaml")
        return round((time.perf_counter() - began) * 1000, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("chain", 50), ("fan", 100), ("kfp-steps", 10), ("table-mib", 100), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    few = given.kfp_steps
    for warm in (chain(add, 2, True), chain(kfp_add, 2, False)):
        ours(warm)
    cases: dict[str, tuple[Callable[[], float], int]] = {
        "chain, decorated": (lambda: ours(chain(add, given.chain, True)), given.chain),
        "chain, kfp lightweight": (lambda: ours(chain(kfp_add, given.chain, False)), given.chain),
        "independent, decorated": (lambda: ours(fan(add, given.fan, True)), given.fan),
        "ParallelFor, decorated": (lambda: ours(loop(add, given.fan, True)), given.fan),
        "ParallelFor, kfp lightweight": (lambda: ours(loop(kfp_add, given.fan, False)), given.fan),
        "kfp.local chain": (lambda: theirs(chain(kfp_add, few, False)), few),
        "kfp.local ParallelFor": (lambda: theirs(loop(kfp_add, few, False)), few),
    }
    result: dict[str, Any] = {"ms_per_step": measure(given.rounds, cases)}
    ours(chain(add, given.chain, True), cache=True)
    result["ms_per_cache_hit"] = round(ours(chain(add, given.chain, True), cache=True) / given.chain * 1000, 2)
    result["compile_200_steps_ms"] = compile_ms(200)
    result["table"] = large_table(given.table_mib)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
