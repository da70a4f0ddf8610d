"""Sliding windows at every event: sum, count, mean and max over 1 h, 24 h and 7 d, against polars, DuckDB, pandas and
storey.

    python benchmarks/featurestore_windows.py [--events 1000000] [--entities 10000] [--plot FILE] [--json FILE]

Each contender runs in its own process, from an unsorted table in memory to twelve columns; importing (for mlfuncs: and
loading its compiled kernels) is a column of its own. The 7-day counts and maxima of all must be equal to the bit, row
by row, and the sums and means to 1e-9 (only mlfuncs rounds each sum once).

storey keeps no events: it counts in buckets of half an hour (its default), so its windows are up to a bucket longer
or shorter than asked for. It gets `--storey-events` of as many entities as make the same number each. Where that bucket
can make no difference (no event lies within one of the window's edge) its values must be ours; how often they are not,
elsewhere, is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contest import OURS, agree, child_command, cost_of, finish, in_turns, keyed_sum, medians, parse, say, show
from peers import peer_python

WINDOWS = {"1h": 3600, "24h": 86400, "7d": 7 * 86400}
FUNCTIONS = ("sum", "count", "mean", "max")
CONTENDERS = (OURS, "polars", "duckdb", "pandas")
STOREY = ["storey>=1.8", "packaging", "pandas"]
STOREY_BUCKET_S = 1800


def make_events(count: int, entities: int) -> tuple[Any, Any, Any]:
    """Entities, times and values of `count` events at different microseconds of 30 days, in no order of entity."""
    import numpy as np

    random = np.random.default_rng(0)
    spread = 30 * 86400 * 10**6 // count
    times = np.arange(count) * spread + random.integers(0, spread, count)
    return random.integers(0, entities, count), times, random.normal(50, 20, count)


def make_table(count: int, entities: int) -> Any:
    """The same as an Arrow table."""
    import pyarrow as pa

    users, times, amounts = make_events(count, entities)
    return pa.table({"user_id": users, "happened": pa.array(times).cast(pa.timestamp("us")), "amount": amounts})


def compute(table: Any, windows: dict[str, int]) -> dict[str, Any]:
    """The feature store's kernels: numpy columns by name, entities and times with them, in entity order."""
    import pyarrow as pa

    from mlfuncs_featurestore import Aggregation, asof_kernels
    from mlfuncs_featurestore.arrays import int64s, whole
    from mlfuncs_featurestore.types import parse_type
    from mlfuncs_featurestore.windows import Events, Moments, aggregate

    at, users = int64s(table["happened"]), int64s(table["user_id"])
    ids, n, _, _ = asof_kernels.number_ints(users)
    order, starts = asof_kernels.group_events(ids, n, at, at, at)
    moments = at[order]
    amounts = whole(table["amount"]).take(pa.array(order))
    events = Events(starts, moments, moments)
    chosen = Aggregation("amount", FUNCTIONS, windows=[f"{seconds}s" for seconds in windows.values()])
    features = chosen.features({"amount": parse_type("float64")})
    found = aggregate(features, events, {"amount": amounts}, Moments(starts, moments))
    columns = {
        f"{function}_{window}": found[f"amount_{function}_{seconds}s"].to_numpy(zero_copy_only=False)
        for function in FUNCTIONS
        for window, seconds in windows.items()
    }
    return {"user": users[order], "at": moments, **columns}


def run_mlfuncs(table: Any) -> dict[str, Any]:
    """All twelve, and which of them are compared."""
    return compute(table, WINDOWS)


def run_polars(table: Any) -> dict[str, Any]:
    """polars' rolling, one pass per window."""
    import polars as pl

    frame = pl.from_arrow(table).sort("happened")
    assert isinstance(frame, pl.DataFrame)
    amount = pl.col("amount")
    wanted = [getattr(amount, name)().alias(f"{name}_7d") for name in FUNCTIONS]
    for window in WINDOWS:
        result = frame.rolling("happened", period=window, group_by="user_id", closed="right").agg(wanted)
    columns = {name: result[name].to_numpy() for name in result.columns}
    return {"user": columns["user_id"], "at": columns["happened"].astype("int64"), **columns}


def run_duckdb(table: Any) -> dict[str, Any]:
    """DuckDB's window functions; its ranges include their lower end, so they are one microsecond shorter."""
    import duckdb

    parts, frames = ["user_id AS user", "epoch_us(happened) AS at"], []
    for name, seconds in WINDOWS.items():
        parts += [f"{'avg' if f == 'mean' else f}(amount) OVER w{name} AS {f}_{name}" for f in FUNCTIONS]
        bounds = f"RANGE BETWEEN INTERVAL {seconds * 10**6 - 1} MICROSECONDS PRECEDING AND CURRENT ROW"
        frames.append(f"w{name} AS (PARTITION BY user_id ORDER BY happened {bounds})")
    connection = duckdb.connect()
    connection.register("events", table)
    result = connection.sql(f"SELECT {', '.join(parts)} FROM events WINDOW {', '.join(frames)}").to_arrow_table()
    return {name: result[name].to_numpy() for name in result.column_names}


def run_pandas(table: Any) -> dict[str, Any]:
    """pandas' grouped rolling."""
    frame = table.to_pandas().sort_values("happened").set_index("happened")
    for window in WINDOWS:
        result = frame.groupby("user_id")["amount"].rolling(window).agg(list(FUNCTIONS))
    index = result.index
    columns = {f"{name}_7d": result[name].to_numpy() for name in FUNCTIONS}
    at = index.get_level_values(1).as_unit("us").astype("int64").to_numpy()
    return {"user": index.get_level_values(0).to_numpy(), "at": at, **columns}


RUNNERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    OURS: run_mlfuncs,
    "polars": run_polars,
    "duckdb": run_duckdb,
    "pandas": run_pandas,
}


def child(name: str, count: int, entities: int, answers: str = "") -> None:
    """Run one contender and print what it cost, and what it answered, as JSON."""
    if name == "storey":
        run_storey(count, entities, answers)
        return
    if name == OURS:
        from mlfuncs_featurestore.kernels import warm_up

        warm_up()
    else:
        __import__(name)
    table = make_table(count, entities)
    cost, columns = cost_of(lambda: RUNNERS[name](table))
    sums = {key: float(columns[f"{key}_7d"].sum()) for key in ("sum", "mean")}
    keyed = {key: keyed_sum(columns["user"], columns["at"], columns[f"{key}_7d"]) for key in ("count", "max")}
    print(json.dumps({**cost, **sums, **keyed}))


def run_storey(count: int, entities: int, answers: str) -> None:
    """storey's flow of single events; its answers go to the file `answers`."""
    import datetime

    from storey import AggregateByKey, FieldAggregator, NoopDriver, Reduce, SyncEmitSource, Table, build_flow
    from storey.dtypes import SlidingWindows

    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    users, times, amounts = (array.tolist() for array in make_events(count, entities))
    rows = [
        {"user_id": user, "at": epoch + datetime.timedelta(microseconds=at), "amount": amount, "at_us": at}
        for user, at, amount in zip(users, times, amounts, strict=True)
    ]
    windows = SlidingWindows(list(WINDOWS))
    assert windows.period_millis == STOREY_BUCKET_S * 1000

    def flow() -> list[dict[str, Any]]:
        wanted = FieldAggregator("amount", "amount", ["sum", "count", "avg", "max"], windows)
        steps = [
            SyncEmitSource(),
            AggregateByKey([wanted], Table("windows", NoopDriver()), key_field="user_id", time_field="at"),
            Reduce([], lambda found, event: [found.append(event), found][1]),
        ]
        controller = build_flow(steps).run()
        for row in rows:
            controller.emit(row, key=row["user_id"])
        controller.terminate()
        return controller.await_termination()

    cost, found = cost_of(flow)
    names = [f"amount_{f}_{window}" for f in ("sum", "count", "avg", "max") for window in WINDOWS]
    kept = {name: [event[name] for event in found] for name in ("user_id", "at_us", *names)}
    Path(answers).write_text(json.dumps(kept))
    print(json.dumps({**cost, "events": len(found)}))


def judge_storey(count: int, entities: int, answers: Path) -> dict[str, Any]:
    """Compare storey's answers with ours; raises SystemExit where its buckets excuse no difference.

    Per window: how many results lie near an edge (buckets may matter), and the share of counts that differ.
    """
    import numpy as np

    theirs = {name: np.array(column) for name, column in json.loads(answers.read_text()).items()}
    places = np.lexsort((theirs["at_us"], theirs["user_id"]))
    report = {}
    for window, seconds in WINDOWS.items():
        spans = {"w": seconds, "short": seconds - STOREY_BUCKET_S, "long": seconds + STOREY_BUCKET_S}
        ours = compute(make_table(count, entities), spans)
        mine = np.lexsort((ours["at"], ours["user"]))
        ours = {name: column[mine] for name, column in ours.items()}
        clear = ours["count_short"] == ours["count_long"]
        for function in FUNCTIONS:
            name = f"amount_{'avg' if function == 'mean' else function}_{window}"
            same = np.isclose(theirs[name][places], ours[f"{function}_w"], rtol=1e-9, atol=1e-9)
            if not same[clear].all():
                raise SystemExit(f"storey's {name} differs where no event is near the window's edge")
        differs = theirs[f"amount_count_{window}"][places] != ours["count_w"]
        report[window] = {"near an edge": float((~clear).mean()), "counts differ": float(differs.mean())}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--storey-events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=[*CONTENDERS[1:], "storey"])
    options = parse(parser)
    if options.child:
        name, count, entities, *rest = options.child
        child(name, int(count), int(entities), *rest)
        return
    names = [one for one in CONTENDERS if one not in options.skip]
    commands = {one: child_command(__file__, one, options.events, options.entities) for one in names}
    costs = in_turns(commands, options.rounds)
    agree(costs, exact=("count", "max"), close=("sum", "mean"))
    figures = medians(costs)
    for one in figures.values():
        one["rate"] = options.events / one["cpu"] / 1e6
    if "storey" not in options.skip:
        add_storey(figures, options)
    rows = [
        [
            name,
            f"{one['rate']:.3f}",
            f"{one['wall']:.2f}",
            f"{one['cpu']:.2f}",
            f"{one['mib']:,.0f}",
            f"{one['start']:.2f}",
        ]
        for name, one in figures.items()
    ]
    title = f"{options.events:,} events, {options.entities:,} entities, 4 functions x 3 windows at every event"
    show(title, ["M events/CPU s", "wall s", "CPU s", "peak MiB", "start CPU s"], rows)
    finish(options, figures, draw)


def add_storey(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """storey's figures, where it can be installed, after its answers were judged."""
    import tempfile

    python = peer_python("storey", STOREY)
    if python is None:
        return
    count, entities = options.storey_events, max(1, options.storey_events * options.entities // options.events)
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        command = child_command(__file__, "storey", count, entities, answers, python=python)
        runs = in_turns({"storey": command}, 1)
        if "storey" not in runs:
            return
        report = judge_storey(count, entities, answers)
    figures["storey"] = {**medians(runs)["storey"], "rate": count / runs["storey"][0]["cpu"] / 1e6, "differs": report}
    for window, one in report.items():
        say(
            f"  storey, {window}: its buckets may matter in {one['near an edge']:.1%} of the results, "
            f"and {one['counts differ']:.1%} of the counts differ; all others are equal"
        )


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Events per CPU second and memory."""
    from plots import bars

    rates = {name: one["rate"] for name, one in figures.items()}
    bars(path, {"windows: million events per CPU second": rates}, logarithmic=True)


if __name__ == "__main__":
    sys.exit(main())
