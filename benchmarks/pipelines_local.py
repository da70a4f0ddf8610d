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

from benchmarks_pipeline_components import kfp_add, kfp_consume, kfp_table  # noqa: E402
from kfp import compiler, dsl, local  # noqa: E402

import mlfuncs as ml  # noqa: E402
from mlfuncs.settings import read_settings  # noqa: E402
from mlfuncs_pipelines.engine import Options  # noqa: E402
from mlfuncs_pipelines.run_log import PipelineRun  # noqa: E402
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
    return pa.table({f"c{i}": rng.random(size=rows) for i in range(10)})


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
    return run_of(pipeline, cache)[0]


def run_of(pipeline: Any, cache: bool = False) -> tuple[float, float, PipelineRun]:
    """Seconds, CPU seconds of the engine, and the run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        loaded = load_pipeline(path)
        began, began_cpu = time.perf_counter(), time.process_time()
        done = run_pipeline(loaded, {}, read_settings(), Options(cache=cache))
        spent, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        assert done.status == "succeeded", done.error
    return spent, cpu, done


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


def cpu_per_step(steps: int) -> dict[str, float]:
    """CPU milliseconds per step of a chain: of the engine, of the step's process, and the peak MiB of that one."""
    _, engine, done = run_of(chain(add, steps, True))
    records = [step for step in done.steps.values() if not step.is_group]
    return {
        "engine_ms": round(engine / steps * 1000, 2),
        "step_ms": round(statistics.median(step.cpu_s for step in records) * 1000, 2),
        "step_peak_mib": max(step.max_rss_mib for step in records),
    }


def large_table(mib: int) -> dict[str, Any]:
    """A table handed from one step to the next: seconds for both steps, CPU and peak MiB of each of ours."""

    def body():
        consume(table(mib).output)

    def their_body():
        kfp_consume(data=kfp_table(mib=mib).outputs["out"])

    run_of(dsl.pipeline(name="table")(body))
    spent, _, done = run_of(dsl.pipeline(name="table")(body))
    theirs_s = theirs(dsl.pipeline(name="their-table")(their_body))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    steps = {step.id: {"cpu_s": step.cpu_s, "peak_mib": step.max_rss_mib} for step in done.steps.values()}
    kfp_local = {"seconds": round(theirs_s, 2), "peak_mib": round(children, 0)}
    return {"mib": mib, "seconds": round(spent, 2), "steps": steps, "kfp.local": kfp_local}


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
        "kfp.local independent": (lambda: theirs(fan(kfp_add, few, False)), few),
        "kfp.local ParallelFor": (lambda: theirs(loop(kfp_add, few, False)), few),
    }
    result: dict[str, Any] = {"ms_per_step": measure(given.rounds, cases)}
    result["cpu_per_step"] = cpu_per_step(given.chain)
    ours(chain(add, given.chain, True), cache=True)
    result["ms_per_cache_hit"] = round(ours(chain(add, given.chain, True), cache=True) / given.chain * 1000, 2)
    result["compile_200_steps_ms"] = compile_ms(200)
    result["engine_peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    result["table"] = large_table(given.table_mib)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
