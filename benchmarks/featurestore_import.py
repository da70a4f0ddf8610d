"""CPU of importing the feature store beside its peers, and of its first join and window in a fresh install.

    python benchmarks/featurestore_import.py [--rounds 5] [--plot FILE] [--json FILE]

CPU is that of the whole process less that of a bare Python. Fresh means that no kernel was compiled yet: numba compiles
the ones that are called, once, and keeps them on disk; later is the same program again.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contest import OURS, finish, parse, say, show
from featurestore_windows import STOREY
from peers import FEAST, peer_python

IMPORT = "import mlfuncs_featurestore as f; f.FeatureStore; f.FeatureView; f.Entity"
FIRST = """
import tempfile, time
import pandas as pd
import mlfuncs as ml
from pathlib import Path
from mlfuncs.settings import Settings
import deltalake, numba
with tempfile.TemporaryDirectory() as home:
    store = ml.FeatureStore(Settings(home=Path(home), project="first"))
    user = ml.Entity("user_id", "int64")
    windows = [ml.Aggregation("x", ["sum", "mean", "count", "max"], windows=["1h"])]
    store.apply([ml.FeatureView("plain", entities=[user], fields={"x": "float64"}),
                 ml.FeatureView("windows", entities=[user], fields={"x": "float64"}, aggregations=windows)])
    at = pd.Timestamp("2024-01-01", tz="UTC")
    rows = pd.DataFrame({"user_id": [1, 1, 2], "event_timestamp": [at] * 3, "x": [1.0, 2.0, 3.0]})
    spent = []
    for view in ("plain", "windows"):
        begun = time.process_time()
        store.ingest(view, rows)
        store.get_historical_features(rows[["user_id", "event_timestamp"]], view).to_pandas()
        spent.append(time.process_time() - begun)
print(*spent)
"""


def cpu_ms(python: str, code: str) -> float:
    """CPU milliseconds of a process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([python, "-W", "ignore", "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def measure_imports(rounds: int) -> dict[str, float]:
    """Milliseconds over a bare Python, the median; the first round, which may write bytecode, does not count."""
    programs = {"bare": (sys.executable, "pass"), OURS: (sys.executable, IMPORT)}
    peers = {"feast": ("feast-stores", FEAST), "storey": ("storey", STOREY)}
    for name, (environment, packages) in peers.items():
        python = peer_python(environment, packages)
        if python is not None:
            programs[name] = (python, f"import {name}")
    spent: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        say(f"  imports: round {number} of {rounds}")
        for name, program in programs.items():
            spent[name].append(cpu_ms(*program))
    bare = statistics.median(spent.pop("bare")[1:])
    return {name: statistics.median(times[1:]) - bare for name, times in spent.items()}


def measure_first() -> dict[str, float]:
    """CPU seconds of the first ingest and join of a plain view, then of one with windows: fresh and later."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for when in ("fresh", "later"):
            say(f"  first join and window, {when}")
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            command = [sys.executable, "-W", "ignore", "-c", FIRST]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            join, window = map(float, done.stdout.split()[-2:])
            found |= {f"first join, {when}": join, f"first windows, {when}": window}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse(parser)
    imports, first = measure_imports(options.rounds), measure_first()
    show("import: CPU over a bare Python", ["ms"], [[name, f"{ms:,.0f}"] for name, ms in imports.items()])
    show("ingest and join of three rows", ["CPU s"], [[name, f"{seconds:.2f}"] for name, seconds in first.items()])
    finish(options, {"import_ms": imports, "first_s": first}, draw)


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Imports, and first uses."""
    from plots import bars

    first = {f"mlfuncs: {name}": seconds for name, seconds in figures["first_s"].items()}
    bars(path, {"import: CPU ms": figures["import_ms"], "three rows: CPU s": first})


if __name__ == "__main__":
    sys.exit(main())
