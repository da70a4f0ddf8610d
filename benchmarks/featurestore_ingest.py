"""Ingest of a table that is never in memory as a whole: rate, CPU, and peak memory against rows.

    python benchmarks/featurestore_ingest.py [--rows 10000000] [--plot FILE] [--json FILE]

Batches of 500,000 rows x 10 float64 are made on the fly and handed to `ingest` as an iterator; the peak of the process
is noted whenever it takes another one. mlfuncs checks every value, profiles, sorts by entity and time and commits once;
beside it `deltalake` alone writes the same batches as they come, and pandas collects them for one Parquet file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contest import OURS, child_command, cost_of, finish, in_turns, medians, parse, peak_mib, show

BATCH = 500_000
FEATURES = 10
CONTENDERS = (OURS, "deltalake", "pandas")


def batches(rows: int, curve: list[tuple[int, float]]) -> Iterator[Any]:
    """Tables of BATCH rows; (rows handed out and taken, peak MiB) goes into `curve`."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(0)
    curve.append((0, peak_mib()))
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        times = pa.array((start + np.arange(count)) * 777_777).cast(pa.timestamp("us", "UTC"))
        values = {f"f{place}": random.normal(size=count) for place in range(FEATURES)}
        yield pa.table({"user_id": random.integers(0, 100_000, count), "event_timestamp": times, **values})
        curve.append((start + count, peak_mib()))


def ingest_mlfuncs(folder: Path, tables: Iterator[Any]) -> None:
    """The feature store's ingest."""
    from mlfuncs.settings import Settings
    from mlfuncs_featurestore import Entity, FeatureStore, FeatureView

    store = FeatureStore(Settings(home=folder, project="bench"))
    fields = {f"f{place}": "float64" for place in range(FEATURES)}
    store.apply(FeatureView("spend", entities=[Entity("user_id", int)], fields=fields))
    store.ingest("spend", tables)


def ingest_deltalake(folder: Path, tables: Iterator[Any]) -> None:
    """deltalake's own writer: no checks, no order."""
    import pyarrow as pa
    from deltalake import write_deltalake

    first = next(tables)

    def flow() -> Iterator[Any]:
        yield from first.to_batches()
        for table in tables:
            yield from table.to_batches()

    write_deltalake(str(folder / "table"), pa.RecordBatchReader.from_batches(first.schema, flow()))


def ingest_pandas(folder: Path, tables: Iterator[Any]) -> None:
    """One frame, one file."""
    import pandas as pd

    pd.concat([table.to_pandas() for table in tables]).to_parquet(folder / "rows.parquet")


RUNNERS: dict[str, Callable[[Path, Iterator[Any]], None]] = {
    OURS: ingest_mlfuncs,
    "deltalake": ingest_deltalake,
    "pandas": ingest_pandas,
}


def child(name: str, rows: int) -> None:
    """Run one contender and print what it cost, with the curve, as JSON."""
    import deltalake  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.dataset  # noqa: F401

    if name == OURS:
        from mlfuncs_featurestore.kernels import warm_up

        warm_up()
    curve: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        cost, _ = cost_of(lambda: RUNNERS[name](Path(folder), batches(rows, curve)))
    curve.append((rows, cost["mib"]))  # with what came after the last batch
    print(json.dumps({**cost, "curve": curve}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    options = parse(parser)
    if options.child:
        child(options.child[0], int(options.child[1]))
        return
    costs = in_turns({one: child_command(__file__, one, options.rows) for one in CONTENDERS}, 1)
    figures: dict[str, dict[str, Any]] = {**medians(costs)}
    rows = []
    for name, one in figures.items():
        curve = costs[name][0]["curve"]
        one["curve"] = curve
        middle = next(mib for count, mib in curve if count >= options.rows // 2)
        cells = [f"{options.rows / one['cpu']:,.0f}", f"{one['wall']:.1f}", f"{one['cpu']:.1f}"]
        rows.append([name, *cells, *(f"{mib:,.0f}" for mib in (curve[0][1], middle, one["mib"]))])
    heads = ["rows/CPU s", "wall s", "CPU s", "MiB at start", "MiB halfway", "peak MiB"]
    show(f"{options.rows:,} rows x {FEATURES} float64 from an iterator", heads, rows)
    finish(options, figures, draw)


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Peak memory against rows."""
    from plots import curves

    lines = {name: [(rows / 1e6, mib) for rows, mib in one["curve"]] for name, one in figures.items()}
    curves(path, "million rows taken", "peak memory, MiB", lines)


if __name__ == "__main__":
    sys.exit(main())
