"""Kernels are compiled ahead: after the warm-up a new process compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORKLOAD = """
import datetime, sys, tempfile
from pathlib import Path
import pyarrow as pa
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureStore, FeatureView
from mlfuncs_featurestore.declarations import FUNCTIONS
from mlfuncs_featurestore.kernels import dispatchers

now = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
with tempfile.TemporaryDirectory() as home:
    store = FeatureStore(Settings(home=Path(home), project="p"))
    windows = [Aggregation(name, FUNCTIONS, windows=["1h"]) for name in ("x", "n")]
    for name, entity in [("a", Entity("k", int)), ("b", Entity("two", keys={"k": int, "s": str}))]:
        fields = {"x": float, "n": int, "tx": "string"}
        for view in (
            FeatureView(name, entities=[entity], fields=fields, aggregations=windows, ttl="1d"),
            FeatureView(name + "_tx", entities=[entity], fields=fields, event_id="tx", created_timestamp="c"),
        ):
            store.apply(view)
            rows = {"k": [1, 2], "s": ["", "b"], "x": [0.5, None], "n": [1, 2], "tx": ["t", "u"]}
            store.ingest(view.name, pa.table({**rows, "event_timestamp": [now, now]}))
            spine = pa.table({"k": [2, 1, None], "s": ["b", "", "c"], "event_timestamp": [now] * 3})
            store.get_historical_features(spine, [view.name], status=True).to_pandas()
compiled = [k.__name__ for k in dispatchers() if k.stats.cache_misses]
print(compiled)
"""


def run(code, **environ):
    path = os.pathsep.join(path for path in sys.path if path)
    env = {**os.environ, "PYTHONPATH": path, **environ}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_new_process_compiles_nothing_after_the_warm_up():
    main = "import runpy; runpy.run_module('mlfuncs_featurestore.kernels', run_name='__main__')"
    assert "kernels are compiled" in run(main)
    assert run(WORKLOAD) == "[]"


def test_importing_the_feature_store_is_light():
    """What makes an import heavy is not loaded until it is needed; `benchmarks/featurestore_import.py` has the time."""
    heavy = {"numba", "numpy", "pandas", "pyarrow", "deltalake", "redis", "polars", "duckdb", "dask", "sqlalchemy"}
    code = "import sys, mlfuncs_featurestore as f; f.FeatureStore; f.FeatureView; print(*sys.modules)"
    assert heavy & set(run(code).split()) == set()


def test_who_meets_a_kernel_that_was_never_compiled_is_told_so_once(tmp_path):
    code = """
import contextlib, io, numpy as np
from mlfuncs_featurestore.hash_kernels import hash_ints
from mlfuncs_featurestore.kernels import compiling, is_compiled
said = []
for _ in range(2):
    with contextlib.redirect_stderr(io.StringIO()) as shown, compiling(hash_ints):
        hash_ints(np.zeros(2, np.int64))
    said.append("Compiling" in shown.getvalue())
print(said, is_compiled(hash_ints))
"""
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)) == "[True, False] True"
