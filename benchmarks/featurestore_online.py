"""Online features against raw Redis and Feast: reads of 1 and 100 entities x 20 floats, writes, materialize.

    python benchmarks/featurestore_online.py [--seconds 1.0] [--rounds 5] [--no-feast] [--plot FILE] [--json FILE]

One redis-server without persistence for all, over TCP on loopback. Raw is what a careful engineer writes by hand:
packed values, MGET, one numpy.frombuffer; a blind MSET of 1000 for writes, which lets an older row win. Rounds are
interleaved; wall time is the best round, CPU time (of the client process) the median of its rounds, and the ratio that
of the same round's pairs, in the median. Writes are measured into an empty Redis and over older rows, with Redis's own
CPU beside. To materialize is from a stored table (Feast: a Parquet file) to Redis, in a process of its own. Feast runs
in an environment of its own, made on first use.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contest import OURS, child_command, cost_of, finish, parse, run, say, show
from peers import FEAST, peer_python

FEATURES = 20
WRITE_ROWS = 200_000
MATERIALIZE_ROWS = 100_000
NAMES = [f"f{place}" for place in range(FEATURES)]
Figures = dict[str, dict[str, Any]]


def measure(action: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Microseconds of wall and CPU time per call."""
    for _ in range(20):
        action()
    done, begun, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < seconds:
        for _ in range(10):
            action()
        done += 10
    return (time.perf_counter() - begun) / done * 1e6, (time.process_time() - cpu) / done * 1e6


def compare(raw: Callable[[], Any], ours: Callable[[], Any], options: argparse.Namespace) -> dict[str, Any]:
    """Both in turns: microseconds per call, and the ratios."""
    pairs = [(measure(raw, options.seconds), measure(ours, options.seconds)) for _ in range(options.rounds)]

    def figures(which: int) -> dict[str, float]:
        wall, cpu = zip(*(pair[which] for pair in pairs), strict=True)
        return {"wall_us": min(wall), "cpu_us": statistics.median(cpu)}

    ratios = {
        f"{key}_ratio": statistics.median(pair[1][at] / pair[0][at] for pair in pairs)
        for at, key in enumerate(("wall", "cpu"))
    }
    return {"raw": figures(0), OURS: figures(1), **ratios}


@contextlib.contextmanager
def redis_server() -> Iterator[tuple[Any, int]]:
    """A redis-server of our own (its psutil process) and its port."""
    import psutil
    import redis

    server = shutil.which("redis-server")
    if server is None:
        raise SystemExit("skipped: redis-server is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [server, "--port", str(port), "--save", "", "--dir", folder]
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    redis.Redis(port=port).ping()
                    break
                if time.monotonic() > deadline:
                    raise SystemExit("redis-server does not answer")
                time.sleep(0.02)
            yield process, port
        finally:
            process.terminate()
            process.wait()


def new_store(folder: Path, port: int) -> tuple[Any, Any]:
    """A feature store on this Redis, and its view of 20 floats."""
    from mlfuncs.settings import Settings
    from mlfuncs_featurestore import Entity, FeatureStore, FeatureView

    store = FeatureStore(Settings(home=folder, project="bench", redis_url=f"redis://127.0.0.1:{port}"))
    view = FeatureView("spend", [Entity("user_id", "int64")], dict.fromkeys(NAMES, "float64"), ttl="2d", online=True)
    store.apply(view)
    return store, view


def make_rows(count: int, at_us: int) -> Any:
    """One row for each of `count` users, all at one time."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(0)
    times = pa.array(np.full(count, at_us)).cast(pa.timestamp("us", "UTC"))
    values = {name: random.random(count) for name in NAMES}
    return pa.table({"user_id": np.arange(count), "event_timestamp": times, **values})


def compare_writes(folder: Path, port: int, server: Any, options: argparse.Namespace) -> Figures:
    """Rows into an empty Redis and over older rows: microseconds a row of wall, client CPU and Redis CPU."""
    import numpy as np
    import redis

    from mlfuncs_featurestore.online_write import number_rows

    store, view = new_store(folder, port)
    client, first_us = redis.Redis(port=port), time.time_ns() // 1000 - 10**9
    table = make_rows(WRITE_ROWS, first_us)
    packed = [bytes(row) for row in np.column_stack([table[name].to_numpy() for name in NAMES])]
    keys = [f"raw:{number}" for number in range(WRITE_ROWS)]

    def write_raw(_: Any) -> None:
        for start in range(0, WRITE_ROWS, 1000):
            client.mset(dict(zip(keys[start : start + 1000], packed[start : start + 1000], strict=True)))

    def cost(action: Callable[[Any], Any], rows: Any) -> dict[str, float]:
        begun, cpu, theirs = time.perf_counter(), time.process_time(), sum(server.cpu_times()[:2])
        action(rows)
        spent = {
            "wall_us": time.perf_counter() - begun,
            "cpu_us": time.process_time() - cpu,
            "redis_us": sum(server.cpu_times()[:2]) - theirs,
        }
        return {key: value / WRITE_ROWS * 1e6 for key, value in spent.items()}

    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(options.rounds):
        say(f"  writes: round {number + 1} of {options.rounds}")
        client.flushall()
        for kind, age in (("an empty Redis", 0), ("older rows", 1)):
            rows = number_rows(make_rows(WRITE_ROWS, first_us + age), 1)
            for who, action in (("raw", write_raw), (OURS, lambda rows: store.online.write(view, rows))):
                found.setdefault(kind, {}).setdefault(who, []).append(cost(action, rows))
    assert store.get_online_features("spend:f0", {"user_id": [7]}).to_numpy()[0, 0] == table["f0"][7].as_py()
    return {f"write a row over {kind}, newest wins (raw: blind)": write_figures(runs) for kind, runs in found.items()}


def write_figures(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The best wall time and median CPU times of each, and the ratios of the same round."""

    def figures(who: str) -> dict[str, float]:
        best = {"wall_us": min(one["wall_us"] for one in runs[who])}
        return best | {key: statistics.median(one[key] for one in runs[who]) for key in ("cpu_us", "redis_us")}

    pairs = list(zip(runs["raw"], runs[OURS], strict=True))
    ratios = {
        f"{key}_ratio": statistics.median(o[f"{key}_us"] / r[f"{key}_us"] for r, o in pairs) for key in ("wall", "cpu")
    }
    ours = figures(OURS)
    return {"raw": figures("raw"), OURS: ours, **ratios, "rows_per_s": 1e6 / ours["wall_us"]}


def compare_reads(folder: Path, port: int, options: argparse.Namespace) -> Figures:
    """Reads of packed rows."""
    import numpy as np
    import redis

    store, _ = new_store(folder, port)
    client, table = redis.Redis(port=port), make_rows(100, time.time_ns() // 1000 - 10**6)
    store.ingest("spend", table)
    store.materialize("spend")
    packed = np.column_stack([table[name].to_numpy() for name in NAMES])
    keys = [f"raw:{number}" for number in range(100)]
    client.mset({key: bytes(row) for key, row in zip(keys, packed, strict=True)})
    names, results = [f"spend:{name}" for name in NAMES], {}
    for count in (1, 100):
        wanted, entities = keys[:count], {"user_id": list(range(count))}

        def raw(wanted: list[str] = wanted, count: int = count) -> Any:
            stored: list[Any] = client.mget(wanted)
            return np.frombuffer(b"".join(stored)).reshape(count, FEATURES)

        def ours(entities: dict[str, list[int]] = entities) -> Any:
            return store.get_online_features(names, entities).to_numpy()

        assert (raw() == ours()).all()
        say(f"  reads of {count}")
        results[f"read {count} x {FEATURES}"] = compare(raw, ours, options)
    return results


def compare_windows(folder: Path, port: int, options: argparse.Namespace) -> Figures:
    """Reads that evaluate windows over the events of each entity; raw is the MGET alone."""
    import numpy as np
    import pyarrow as pa
    import redis

    from mlfuncs_featurestore import Aggregation, Entity, FeatureView

    store, _ = new_store(folder, port)
    windows = [Aggregation("f0", ["sum", "mean", "count", "max"], ["1h", "24h"])]
    busy = FeatureView("busy", [Entity("user_id", "int64")], {"f0": "float64"}, online=True, aggregations=windows)
    store.apply(busy)
    client, events, random = redis.Redis(port=port), 200, np.random.default_rng(0)
    times = time.time_ns() // 1000 - np.tile(np.sort(random.integers(0, 86_400 * 10**6, events)), 100)
    rows = {"user_id": np.repeat(np.arange(100), events), "f0": random.random(100 * events)}
    store.ingest("busy", pa.table({**rows, "event_timestamp": pa.array(times).cast(pa.timestamp("us", "UTC"))}))
    store.materialize("busy")
    names, results = [f"busy:{one}" for one in busy.aggregates], {}
    blobs = store.online.plan(["busy"]).keys({"user_id": list(range(100))})
    assert all(client.mget(blobs))
    for count in (1, 100):
        asked = {"user_id": list(range(count))}
        say(f"  windows of {count}")
        results[f"read {count} x 8 windows of {events} events (raw: MGET)"] = compare(
            lambda count=count: client.mget(blobs[:count]),  # type: ignore[misc]
            lambda asked=asked: store.get_online_features(names, asked).to_numpy(),  # type: ignore[misc]
            options,
        )
    return results


def materialize_ours(port: int, rows: int) -> dict[str, Any]:
    """One `materialize` of a stored table."""
    with tempfile.TemporaryDirectory() as folder:
        store, _ = new_store(Path(folder), port)
        store.ingest("spend", make_rows(rows, time.time_ns() // 1000 - 10**6))
        cost, report = cost_of(lambda: store.materialize("spend"))
    assert report.rows == rows
    return cost


def measure_feast(port: int, rows: int, seconds: float) -> dict[str, Any]:
    """Feast's materialize and reads; runs in Feast's environment."""
    import numpy as np
    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64

    now = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as folder:
        frame = pd.DataFrame({name: np.random.default_rng(0).random(rows) for name in NAMES})
        frame["user_id"], frame["event_timestamp"] = np.arange(rows), now - datetime.timedelta(hours=1)
        frame.to_parquet(f"{folder}/rows.parquet")
        user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
        source = FileSource(path=f"{folder}/rows.parquet", timestamp_field="event_timestamp")
        schema = [Field(name=name, dtype=Float64) for name in NAMES]
        ttl = datetime.timedelta(days=2)
        view = FeatureView(name="spend", entities=[user], ttl=ttl, online=True, schema=schema, source=source)
        config = RepoConfig(
            project="bench",
            provider="local",
            registry=f"{folder}/registry.db",
            online_store={"type": "redis", "connection_string": f"127.0.0.1:{port}"},
            entity_key_serialization_version=3,
        )
        store = FeatureStore(config=config)
        store.apply([user, view])
        cost, _ = cost_of(lambda: store.materialize(now - datetime.timedelta(days=1), now))
        names = [f"spend:{name}" for name in NAMES]
        for count in (1, 100):
            entities = [{"user_id": user} for user in range(count)]

            def read(entities: list[dict[str, int]] = entities) -> Any:
                return store.get_online_features(features=names, entity_rows=entities).to_dict()

            assert read()["f3"][0] == frame["f3"][0]
            wall, cpu = measure(read, seconds)
            cost |= {f"read {count} x {FEATURES}": {"wall_us": wall, "cpu_us": cpu}}
    return cost


def compare_materialize(port: int, options: argparse.Namespace, results: Figures) -> Figures:
    """Rows a CPU second and peak memory of a `materialize`; Feast's reads are added to `results`."""
    say("  materialize: mlfuncs")
    costs = {OURS: run(child_command(__file__, OURS, port, MATERIALIZE_ROWS))}
    python = None if options.no_feast else peer_python("feast-stores", FEAST)
    if python is not None:
        say("  materialize and reads: feast")
        try:
            costs["feast"] = run(child_command(__file__, "feast", port, MATERIALIZE_ROWS, 3, python=python), 900)
        except RuntimeError as exc:
            say(f"  feast is left out: {exc}")
    for name in results:
        if name in costs.get("feast", {}):
            results[name]["feast"] = costs["feast"][name]
    return {
        who: {"rows_per_cpu_s": MATERIALIZE_ROWS / cost["cpu"], "wall": cost["wall"], "mib": cost["mib"]}
        for who, cost in costs.items()
    }


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-feast", action="store_true")
    options = parse(parser)
    if options.child:
        who, port, rows, *seconds = options.child
        ours = who == OURS
        print(
            json.dumps(
                materialize_ours(int(port), int(rows))
                if ours
                else measure_feast(int(port), int(rows), *map(float, seconds))
            )
        )
        return
    results: Figures = {}
    for part in (compare_reads, compare_windows):
        with redis_server() as (_, port), tempfile.TemporaryDirectory() as folder:
            results |= part(Path(folder), port, options)
    with redis_server() as (server, port), tempfile.TemporaryDirectory() as folder:
        results |= compare_writes(Path(folder), port, server, options)
    with redis_server() as (_, port):
        materialized = compare_materialize(port, options, results)
    report(results, materialized)
    finish(options, {"calls": results, "materialize": materialized}, draw)


def report(results: Figures, materialized: Figures) -> None:
    """The tables."""

    def cell(one: dict[str, float] | None) -> str:
        if one is None:
            return ""
        redis = f" / {one['redis_us']:.1f}" if "redis_us" in one else ""
        return f"{one['wall_us']:.1f} / {one['cpu_us']:.1f}{redis}"

    heads = ["raw", OURS, "wall / CPU ratio", "feast"]
    rows = [
        [cell(one["raw"]), cell(one[OURS]), f"{one['wall_ratio']:.2f} / {one['cpu_ratio']:.2f}", cell(one.get("feast"))]
        for one in results.values()
    ]
    print("us per read or row: wall / client CPU (/ Redis CPU)")
    for name, row in zip(["", *results], [heads, *rows], strict=True):
        print(f"  {name:58}" + "".join(f"{text:>20}" for text in row))
    for name, one in results.items():
        if "rows_per_s" in one:
            print(f"  {name}: {one['rows_per_s']:,.0f} rows/s")
    lines = [
        [who, f"{one['rows_per_cpu_s']:,.0f}", f"{one['wall']:.2f}", f"{one['mib']:,.0f}"]
        for who, one in materialized.items()
    ]
    show(f"materialize {MATERIALIZE_ROWS:,} rows x {FEATURES}", ["rows/CPU s", "wall s", "peak MiB"], lines)


def draw(path: Path, figures: dict[str, Figures]) -> None:
    """CPU of reads, and of materialize, on logarithmic scales."""
    from plots import bars

    panels = {}
    for count in (1, 100):
        one = figures["calls"][f"read {count} x {FEATURES}"]
        panels[f"read {count} x {FEATURES}: CPU us"] = {
            who: one[key]["cpu_us"]
            for who, key in ((OURS, OURS), ("MGET + frombuffer", "raw"), ("feast", "feast"))
            if key in one
        }
    panels["materialize: rows per CPU s"] = {who: one["rows_per_cpu_s"] for who, one in figures["materialize"].items()}
    bars(path, panels, logarithmic=True)


if __name__ == "__main__":
    sys.exit(main())
