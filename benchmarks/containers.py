"""Images and containers: sizes, build times cold and after a change, 0 to 1 and a warm request, against processes.

    python benchmarks/containers.py [--rounds 5] [--json FILE]

Needs a Docker Engine (scripts/docker-engine). Wall times: what a user waits for; run it on a quiet machine. Containers
and processes take turns in every round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlfuncs.loading import load_target
from mlfuncs.settings import read_settings

SOURCE = """
import mlfuncs as ml

@ml.function(requirements=["numpy>=1.26", "scikit-learn>=1.5"], scale=ml.Scale(min=0, max=1, window_s=4, grace_s=0))
def predict(x: list[float]) -> float:
    import sklearn.linear_model
    return {factor} * sum(x)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlf-bench-", dir="/tmp") as folder:
        os.environ.update(MLFUNCS_HOME=f"{folder}/home", MLFUNCS_PORT="0", MLFUNCS_PROJECT="bench")
        try:
            found = {**images(Path(folder), options.rounds), **starts(Path(folder), options.rounds)}
        finally:
            subprocess.run([sys.executable, "-m", "mlfuncs", "down"], check=True, capture_output=True)
    for name, value in found.items():
        print(f"{name:42} {value:10.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def function(folder: Path, factor: int) -> Any:
    """The function with another constant, which is a change of its code."""
    path = folder / f"served{factor}.py"
    path.write_text(SOURCE.format(factor=factor))
    return load_target(f"{path}:predict")


def images(folder: Path, rounds: int) -> dict[str, float]:
    """Sizes in MB and times in s of builds: base, the first of a lock, and after a change of one line."""
    from mlfuncs_runtime.images.docker_builder import DockerBuilder
    from mlfuncs_runtime.rendering import build_image

    settings = read_settings()
    builder = DockerBuilder(settings)
    base, base_s = timed(lambda: builder.base(lambda _note: None))
    os.environ["MLFUNCS_BASE_IMAGE"] = base.name
    settings = read_settings()
    cold, cold_s = timed(lambda: build(build_image, function(folder, 1), settings))
    changed = [
        timed(lambda factor=factor: build(build_image, function(folder, factor), settings))[1]
        for factor in range(2, 2 + rounds)
    ]
    _, same_s = timed(lambda: build(build_image, function(folder, 1), settings))
    return {
        "base image, MB": base.size_bytes / 1e6,
        "function above its base, MB": cold.new_bytes / 1e6,
        "base build or look-up, s": base_s,
        "first build of a lock (numpy, sklearn), s": cold_s,
        "build after a change of one line, s": statistics.median(changed),
        "build of the same again, s": same_s,
    }


def build(build_image: Any, made: Any, settings: Any) -> Any:
    """One build through a client of its own, as the command line does it."""
    return build_image([made], None, False, settings, lambda _note: None)


def starts(folder: Path, rounds: int) -> dict[str, float]:
    """Seconds from a request at zero to its answer, and of a request to a warm replica, by target."""
    endpoints = {
        target: function(folder, 1).deploy(target=target, name=f"predict-{target}", wait_s=600)
        for target in ("process", "docker")
    }
    cold: dict[str, list[float]] = {target: [] for target in endpoints}
    warm: dict[str, list[float]] = {target: [] for target in endpoints}
    for _ in range(rounds):
        for target, endpoint in endpoints.items():
            while any(replica.state in ("starting", "ready", "draining") for replica in endpoint.status().replicas):
                time.sleep(0.1)
            cold[target].append(timed(lambda endpoint=endpoint: endpoint.invoke(x=[1.0]))[1])
            warm[target].append(
                statistics.median(timed(lambda endpoint=endpoint: endpoint.invoke(x=[1.0]))[1] for _ in range(200))
            )
    for endpoint in endpoints.values():
        endpoint.delete()
    return {
        **{f"0 to 1 as a {target}, s": statistics.median(values) for target, values in cold.items()},
        **{f"a warm request to a {target}, ms": 1000 * statistics.median(values) for target, values in warm.items()},
    }


def timed(work: Any) -> tuple[Any, float]:
    """What the work gave, and the seconds it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
