"""The point-in-time join against polars, DuckDB and pandas: CPU, wall time and peak memory, each in its own process.

    python benchmarks/featurestore_join.py                        # 1 M spine rows x 10 M history rows x 10 floats
    python benchmarks/featurestore_join.py --spine 100000 --history 1000000

Reading is included for all; writing the tables is not, and importing the library (for mlfuncs: and loading its compiled
kernels) is a column of its own. All contenders must give the same values. Rounds are
interleaved and the median is reported, as the machine may be shared; CPU seconds are what repeats.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTENDERS = ("mlfuncs", "polars", "duckdb", "pandas")


def make_data(folder: Path, options: argparse.Namespace) -> None:
    """History and spine as Parquet files and the history as an offline table."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mlfuncs_featurestore import Entity, FeatureStore, FeatureView

    random = np.random.default_rng(0)
    second = 10**6
    history = {
        "user_id": random.integers(0, options.entities, options.history),
        "event_timestamp": np.sort(random.integers(0, 90 * 86400, options.history)) * second,
        **{f"f{i}": random.normal(size=options.history) for i in range(options.features)},
    }
    spine = {
        "user_id": random.integers(0, options.entities, options.spine),
        "event_timestamp": random.integers(0, 90 * 86400, options.spine) * second,
    }
    tables = {"history": pa.table(history), "spine": pa.table(spine)}
    for name, table in tables.items():
        times = table["event_timestamp"].cast(pa.timestamp("us", "UTC"))
        tables[name] = table.set_column(1, "event_timestamp", times)
        pq.write_table(tables[name], folder / f"{name}.parquet", use_dictionary=False)
    fields = {f"f{i}": "float64" for i in range(options.features)}
    store = FeatureStore(settings_of(folder))
    store.apply(FeatureView("spend", entities=[Entity("user_id", int)], fields=fields))
    started = time.perf_counter(), time.process_time()
    store.ingest("spend", str(folder / "history.parquet"))
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"ingest: {options.history / wall:,.0f} rows/s, {cpu:.1f} CPU s (peak of this process {peak:,.0f} MiB)")
    store.offline.compact(store.catalog.view("spend"))


def settings_of(folder: Path) -> Any:
    """Settings whose home is the benchmark's folder."""
    from mlfuncs.settings import Settings

    return Settings(home=folder / "home", project="bench")


def run_mlfuncs(folder: Path) -> Any:
    """The feature store's join."""
    from mlfuncs_featurestore import FeatureStore

    store = FeatureStore(settings_of(folder))
    return store.get_historical_features(str(folder / "spine.parquet"), "spend").to_arrow()


def run_polars(folder: Path) -> Any:
    """polars' join_asof, which wants both sides sorted by time; the spine's order is put back."""
    import polars as pl

    spine = pl.read_parquet(folder / "spine.parquet").with_row_index("row").sort("event_timestamp")
    history = pl.read_parquet(folder / "history.parquet").sort("event_timestamp")
    return spine.join_asof(history, on="event_timestamp", by="user_id").sort("row").drop("row").to_arrow()


def run_duckdb(folder: Path) -> Any:
    """DuckDB's ASOF LEFT JOIN."""
    import duckdb

    return duckdb.sql(f"""
        SELECT s.user_id, s.event_timestamp, h.* EXCLUDE (user_id, event_timestamp)
        FROM (SELECT *, row_number() OVER () AS n FROM '{folder}/spine.parquet') s
        ASOF LEFT JOIN '{folder}/history.parquet' h
        ON s.user_id = h.user_id AND s.event_timestamp >= h.event_timestamp ORDER BY n
    """).to_arrow_table()


def run_pandas(folder: Path) -> Any:
    """pandas' merge_asof."""
    import pandas as pd
    import pyarrow as pa

    spine = pd.read_parquet(folder / "spine.parquet").reset_index(names="row").sort_values("event_timestamp")
    history = pd.read_parquet(folder / "history.parquet").sort_values("event_timestamp")
    joined = pd.merge_asof(spine, history, on="event_timestamp", by="user_id").sort_values("row")
    return pa.Table.from_pandas(joined.drop(columns="row"), preserve_index=False)


def load(name: str) -> None:
    """Import what the contender needs."""
    if name != "mlfuncs":
        __import__(name)
        return
    import deltalake  # noqa: F401
    import pyarrow.dataset  # noqa: F401

    from mlfuncs_featurestore.kernels import warm_up

    warm_up()
    for module in ("mlfuncs.registry", "mlfuncs_featurestore.history"):
        __import__(module)


RUNNERS: dict[str, Callable[[Path], Any]] = {
    "mlfuncs": run_mlfuncs,
    "polars": run_polars,
    "duckdb": run_duckdb,
    "pandas": run_pandas,
}


def child(name: str, folder: Path) -> None:
    """Run one contender and print what it cost as JSON."""
    import pyarrow.compute as pc

    load(name)
    wall, before = time.perf_counter(), time.process_time()
    result = RUNNERS[name](folder)
    cost = {"start": before, "wall": time.perf_counter() - wall, "cpu": time.process_time() - before}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    last = result.column_names[-1]
    found = len(result) - pc.sum(pc.or_kleene(pc.is_null(result[last]), pc.is_nan(result[last]))).as_py()
    total = pc.sum(pc.if_else(pc.is_nan(result[last]), None, result[last])).as_py()
    print(json.dumps({**cost, "mib": peak, "rows": len(result), "found": found, "sum": round(total, 4)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spine", type=int, default=1_000_000)
    parser.add_argument("--history", type=int, default=10_000_000)
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        # in a process of its own: a child starts with its parent's peak memory
        maker = multiprocessing.get_context("spawn").Process(target=make_data, args=(Path(name), options))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the data could not be made")
        costs: dict[str, list[dict[str, float]]] = {one: [] for one in CONTENDERS}
        for _ in range(options.rounds):
            for one in CONTENDERS:
                done = subprocess.run(
                    [sys.executable, __file__, "--child", one, name], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{one} failed:\n{done.stderr}")
                costs[one].append(json.loads(done.stdout.splitlines()[-1]))
    answers = {(cost["rows"], cost["found"], cost["sum"]) for found in costs.values() for cost in found}
    if len(answers) != 1:
        raise SystemExit(f"the contenders disagree: {answers}")
    print(f"{options.spine:,} x {options.history:,} rows, {options.features} floats, {options.entities:,} entities")
    print(f"{'':10}{'wall s':>8}{'CPU s':>8}{'peak MiB':>10}{'start CPU s':>13}")
    for one, found in costs.items():
        median = {key: statistics.median(cost[key] for cost in found) for key in ("wall", "cpu", "mib", "start")}
        line = f"{one:10}{median['wall']:8.2f}{median['cpu']:8.2f}{median['mib']:10,.0f}{median['start']:13.2f}"
        print(line)


if __name__ == "__main__":
    main()
