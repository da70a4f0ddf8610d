"""Sliding windows at every event against polars, DuckDB and pandas: sum, count, mean and max over 1 h, 24 h and 7 d.

    python benchmarks/featurestore_windows.py                       # 1 M events of 10 k entities
    python benchmarks/featurestore_windows.py --events 200000 --entities 2000 --skip pandas

Each contender runs in its own process, from an unsorted table in memory to twelve columns; importing (for mlfuncs: and
loading its compiled kernels) is a column of its own. Sums must agree to 1e-9 (only mlfuncs rounds each sum once).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

WINDOWS = {"1h": 3600, "24h": 86400, "7d": 7 * 86400}
CONTENDERS = ("mlfuncs", "polars", "duckdb", "pandas")


def make_events(count: int, entities: int) -> Any:
    """`count` events at different microseconds of 30 days, in no order of entity."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(0)
    spread = 30 * 86400 * 10**6 // count
    times = np.arange(count) * spread + random.integers(0, spread, count)
    values = {"user_id": random.integers(0, entities, count), "amount": random.normal(50, 20, count)}
    return pa.table({"user_id": values["user_id"], "happened": pa.array(times).cast(pa.timestamp("us")), **values})


def run_mlfuncs(table: Any) -> float:
    """The feature store's kernels; results stay in entity order."""
    import pyarrow as pa

    from mlfuncs_featurestore import Aggregation, asof_kernels
    from mlfuncs_featurestore.arrays import int64s
    from mlfuncs_featurestore.types import parse_type
    from mlfuncs_featurestore.windows import FOREVER, Events, Moments, aggregate

    at = int64s(table["happened"])
    ids, n, _, _ = asof_kernels.number_ints(int64s(table["user_id"]))
    order, starts = asof_kernels.group_events(ids, n, at, at, at)
    moments = at[order]
    amounts = table["amount"].combine_chunks().take(pa.array(order))
    import numpy as np

    events = Events(starts, moments, moments, np.full(len(at), FOREVER))
    chosen = Aggregation("amount", ["sum", "count", "mean", "max"], windows=list(WINDOWS))
    features = chosen.features({"amount": parse_type("float64")})
    result = aggregate(features, events, {"amount": amounts}, Moments(starts, moments))
    return float(result["amount_sum_7d"].to_numpy().sum())


def run_polars(table: Any) -> float:
    """polars' rolling, one pass per window."""
    import polars as pl

    frame = pl.from_arrow(table).sort("happened")
    assert isinstance(frame, pl.DataFrame)
    amount = pl.col("amount")
    wanted = [getattr(amount, name)().alias(name) for name in ("sum", "count", "mean", "max")]
    for window in WINDOWS:
        result = frame.rolling("happened", period=window, group_by="user_id", closed="right").agg(wanted)
    return float(result["sum"].sum())


def run_duckdb(table: Any) -> float:
    """DuckDB's window functions; its ranges include their lower end, so they are one microsecond shorter."""
    import duckdb

    parts, frames = [], []
    for name, seconds in WINDOWS.items():
        parts += [f"{f}(amount) OVER w{name} AS {f}_{name}" for f in ("sum", "count", "avg", "max")]
        bounds = f"RANGE BETWEEN INTERVAL {seconds * 10**6 - 1} MICROSECONDS PRECEDING AND CURRENT ROW"
        frames.append(f"w{name} AS (PARTITION BY user_id ORDER BY happened {bounds})")
    connection = duckdb.connect()
    connection.register("events", table)
    result = connection.sql(f"SELECT {', '.join(parts)} FROM events WINDOW {', '.join(frames)}").to_arrow_table()
    return float(result["sum_7d"].to_numpy().sum())


def run_pandas(table: Any) -> float:
    """pandas' grouped rolling."""
    frame = table.to_pandas().sort_values("happened").set_index("happened")
    for window in WINDOWS:
        result = frame.groupby("user_id")["amount"].rolling(window).agg(["sum", "count", "mean", "max"])
    return float(result["sum"].sum())


RUNNERS: dict[str, Callable[[Any], float]] = {
    "mlfuncs": run_mlfuncs,
    "polars": run_polars,
    "duckdb": run_duckdb,
    "pandas": run_pandas,
}


def child(name: str, count: int, entities: int) -> None:
    """Run one contender and print what it cost as JSON."""
    if name == "mlfuncs":
        from mlfuncs_featurestore.kernels import warm_up

        warm_up()
    else:
        __import__(name)
    before = time.process_time()
    table = make_events(count, entities)
    started, wall = time.process_time(), time.perf_counter()
    total = RUNNERS[name](table)
    cost = {"cpu": time.process_time() - started, "wall": time.perf_counter() - wall, "start": before}
    print(json.dumps({**cost, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "sum": total}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=CONTENDERS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.events, options.entities)
        return
    sizes = ["--events", str(options.events), "--entities", str(options.entities)]
    costs: dict[str, list[dict[str, float]]] = {one: [] for one in CONTENDERS if one not in options.skip}
    for _ in range(options.rounds):
        for one, found in costs.items():
            command = [sys.executable, __file__, "--child", one, *sizes]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{one} failed:\n{done.stderr}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    sums = [cost["sum"] for found in costs.values() for cost in found]
    if max(sums) - min(sums) > 1e-9 * abs(max(sums)):
        raise SystemExit(f"the contenders disagree: {sums}")
    print(f"{options.events:,} events, {options.entities:,} entities, 4 functions x 3 windows at every event")
    print(f"{'':10}{'M events/CPU s':>15}{'wall s':>8}{'CPU s':>8}{'peak MiB':>10}{'start CPU s':>13}")
    for one, found in costs.items():
        median = {key: statistics.median(cost[key] for cost in found) for key in ("wall", "cpu", "mib", "start")}
        rate = options.events / median["cpu"] / 1e6
        rest = f"{median['wall']:8.2f}{median['cpu']:8.2f}{median['mib']:10,.0f}{median['start']:13.2f}"
        print(f"{one:10}{rate:15.2f}{rest}")


if __name__ == "__main__":
    main()
