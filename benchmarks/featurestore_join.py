"""The point-in-time join against polars, DuckDB, pandas and Feast: CPU, wall time and peak memory, a process each.

    python benchmarks/featurestore_join.py                        # 1 M spine rows x 10 M history rows x 10 floats
    python benchmarks/featurestore_join.py --spine 100000 --history 1000000 --feast [--plot FILE] [--json FILE]

The history file is in the order of time, which polars and pandas need, the offline table in that of entities (its own).
Reading is included for all; writing the tables is not, and importing the library (for mlfuncs: and loading its compiled
kernels) is a column of its own. All must give the same rows, bit by bit, in any order. Rounds are interleaved and the
median is reported, as the machine may be shared; CPU seconds are what repeats. Feast (on DuckDB) takes minutes and
10 GB at full size, so it runs when asked for, once, in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import OURS, agree, child_command, cost_of, finish, in_turns, keyed_sum, medians, parse, run, say, show
from peers import FEAST, peer_python

CONTENDERS = (OURS, "polars", "duckdb", "pandas")
FEAST_S = 1200
DAYS = 90


def make_data(folder: Path, sizes: dict[str, int]) -> None:
    """History and spine as Parquet files and the history as an offline table. No two rows of a user at one time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mlfuncs_featurestore import Entity, FeatureStore, FeatureView

    random, span = np.random.default_rng(0), DAYS * 86400 * 10**6
    history = {
        "user_id": random.integers(0, sizes["entities"], sizes["history"]),
        "event_timestamp": np.sort(random.integers(0, span, sizes["history"])),
        **{f"f{i}": random.normal(size=sizes["history"]) for i in range(sizes["features"])},
    }
    spine = {
        "user_id": random.integers(0, sizes["entities"], sizes["spine"]),
        "event_timestamp": random.integers(0, span, sizes["spine"]),
    }
    for name, columns in (("history", history), ("spine", spine)):
        times = pa.array(columns["event_timestamp"]).cast(pa.timestamp("us", "UTC"))
        table = pa.table({**columns, "event_timestamp": times})
        pq.write_table(table, folder / f"{name}.parquet", use_dictionary=False)
    fields = {f"f{i}": "float64" for i in range(sizes["features"])}
    store = FeatureStore(settings_of(folder))
    store.apply(FeatureView("spend", entities=[Entity("user_id", int)], fields=fields))
    store.ingest("spend", str(folder / "history.parquet"))
    store.offline.compact(store.catalog.view("spend"))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    print("{}")


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
    """polars' join_asof, which wants both sides sorted by time (the history is); the spine's order is put back."""
    import polars as pl

    spine = pl.read_parquet(folder / "spine.parquet").with_row_index("row").sort("event_timestamp")
    history = pl.read_parquet(folder / "history.parquet").set_sorted("event_timestamp")
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
    """pandas' merge_asof, as polars' above."""
    import pandas as pd
    import pyarrow as pa

    spine = pd.read_parquet(folder / "spine.parquet").reset_index(names="row").sort_values("event_timestamp")
    history = pd.read_parquet(folder / "history.parquet")
    joined = pd.merge_asof(spine, history, on="event_timestamp", by="user_id").sort_values("row")
    return pa.Table.from_pandas(joined.drop(columns="row"), preserve_index=False)


def run_feast(folder: Path) -> Any:
    """Feast's get_historical_features on its DuckDB offline store; it takes the spine as a pandas frame."""
    import datetime

    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64

    names = [f"f{i}" for i in range(json.loads((folder / "sizes.json").read_text())["features"])]
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(path=str(folder / "history.parquet"), timestamp_field="event_timestamp")
    schema = [Field(name=name, dtype=Float64) for name in names]
    view = FeatureView(
        name="spend", entities=[user], ttl=datetime.timedelta(days=36500), schema=schema, source=source, online=False
    )
    config = RepoConfig(
        project="bench",
        provider="local",
        registry=str(folder / "feast.db"),
        offline_store={"type": "duckdb"},
        online_store=None,
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    store.apply([user, view])
    spine = pd.read_parquet(folder / "spine.parquet")
    return store.get_historical_features(entity_df=spine, features=[f"spend:{name}" for name in names]).to_arrow()


def load(name: str) -> None:
    """Import what the contender needs."""
    if name != OURS:
        __import__(name)
        return
    import deltalake  # noqa: F401
    import pyarrow.dataset  # noqa: F401

    from mlfuncs_featurestore.kernels import warm_up

    warm_up()
    for module in ("mlfuncs.registry", "mlfuncs_featurestore.history"):
        __import__(module)


RUNNERS: dict[str, Callable[[Path], Any]] = {
    OURS: run_mlfuncs,
    "polars": run_polars,
    "duckdb": run_duckdb,
    "pandas": run_pandas,
    "feast": run_feast,
}


def child(name: str, folder: Path) -> None:
    """Run one contender and print what it cost, and a checksum of its answer, as JSON."""
    load(name)
    cost, result = cost_of(lambda: RUNNERS[name](folder))
    print(json.dumps({**cost, "rows": result.num_rows, **checksum(result)}))


def checksum(result: Any) -> dict[str, int]:
    """How many cells were found, and the bits of all of them with their user and time."""
    import numpy as np
    import pyarrow as pa

    users = result["user_id"].to_numpy()
    times = result["event_timestamp"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
    found, total = 0, 0
    for name in sorted(name for name in result.column_names if name.startswith("f")):
        values = result[name].to_numpy()
        found += int(len(values) - np.isnan(values).sum())
        total = (31 * total + keyed_sum(users, times, values)) % 2**64
    return {"found": found, "checksum": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spine", type=int, default=1_000_000)
    parser.add_argument("--history", type=int, default=10_000_000)
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--feast", action="store_true", help="measure Feast too, once")
    options = parse(parser)
    if options.child:
        name, folder, *sizes = options.child
        child(name, Path(folder)) if name != "data" else make_data(Path(folder), json.loads(sizes[0]))
        return
    sizes = {name: getattr(options, name) for name in ("spine", "history", "entities", "features")}
    with tempfile.TemporaryDirectory() as folder:
        say("  making the tables")
        run(child_command(__file__, "data", folder, json.dumps(sizes)))
        costs = in_turns({one: child_command(__file__, one, folder) for one in CONTENDERS}, options.rounds)
        python = peer_python("feast-stores", FEAST) if options.feast else None
        if python is not None:
            costs |= in_turns({"feast": child_command(__file__, "feast", folder, python=python)}, 1, FEAST_S)
    agree(costs, exact=("rows", "found", "checksum"))
    figures = medians(costs)
    title = f"{options.spine:,} x {options.history:,} rows, {options.features} floats, {options.entities:,} entities"
    rows = [
        [name, f"{one['wall']:.2f}", f"{one['cpu']:.2f}", f"{one['mib']:,.0f}", f"{one['start']:.2f}"]
        for name, one in figures.items()
    ]
    show(title, ["wall s", "CPU s", "peak MiB", "start CPU s"], rows)
    finish(options, figures, draw)


def draw(path: Path, figures: dict[str, dict[str, float]]) -> None:
    """CPU and memory side by side."""
    from plots import bars

    cpu = {name: one["cpu"] for name, one in figures.items()}
    bars(path, {"join: CPU s": cpu, "join: peak MiB": {name: one["mib"] for name, one in figures.items()}})


if __name__ == "__main__":
    sys.exit(main())
