"""Online features against raw Redis and Feast: reads of 1 and 100 entities x 20 float64, newest-wins writes, windows.

    python benchmarks/featurestore_online.py [--seconds 1.0] [--rounds 5] [--no-feast] [--json FILE]

One redis-server without persistence for all, over TCP on loopback. Raw is what a careful engineer writes by hand:
packed values, MGET, one numpy.frombuffer; MSET for writes. Rounds are interleaved; wall time is the best round, CPU
time (of the client process) the median of its rounds, and the ratio that of the same round's pairs, in the median.
Feast runs in an environment of its own, made on first use.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEATURES = 20
WRITE_ROWS = 200_000
FEAST = ["feast[redis]>=0.40", "redis>=5,<7", "hiredis", "setuptools<81"]
FEAST_SCRIPT = """
import datetime, json, sys, time, tempfile, pathlib
import numpy as np, pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64
port, seconds, rows = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
folder = pathlib.Path(tempfile.mkdtemp())
now = datetime.datetime.now(datetime.timezone.utc)
frame = pd.DataFrame({f"f{i}": np.random.rand(rows) for i in range(20)})
frame["user_id"], frame["event_timestamp"] = np.arange(rows), now - datetime.timedelta(hours=1)
frame.to_parquet(folder / "rows.parquet")
user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
view = FeatureView(name="spend", entities=[user], ttl=datetime.timedelta(days=2), online=True,
    schema=[Field(name=f"f{i}", dtype=Float64) for i in range(20)],
    source=FileSource(path=str(folder / "rows.parquet"), timestamp_field="event_timestamp"))
store = FeatureStore(config=RepoConfig(project="bench", provider="local", registry=str(folder / "registry.db"),
    online_store={"type": "redis", "connection_string": f"127.0.0.1:{port}"}, entity_key_serialization_version=3))
store.apply([user, view])
begun, cpu = time.perf_counter(), time.process_time()
store.materialize(now - datetime.timedelta(days=1), now)
def per(count):
    wall, spent = time.perf_counter() - begun, time.process_time() - cpu
    return {"wall_us": wall / count * 1e6, "cpu_us": spent / count * 1e6}
result = {"write": per(rows)}
names = [f"spend:f{i}" for i in range(20)]
for count in (1, 100):
    entities = [{"user_id": user} for user in range(count)]
    read = lambda: store.get_online_features(features=names, entity_rows=entities).to_dict()
    read()
    done, begun, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < 3 * seconds:
        read(); done += 1
    result[f"read {count}"] = per(done)
print(json.dumps(result))
"""


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


class Contest:
    """Pairs of a hand-written action and ours, run in turns."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, name: str, raw: Callable[[], Any], ours: Callable[[], Any], per: int = 1) -> None:
        """Measure both `rounds` times; times are per `per` things done in one call."""
        rounds = []
        for _ in range(self.options.rounds):
            rounds.append((measure(raw, self.options.seconds), measure(ours, self.options.seconds)))
        raw_us, raw_cpu = min(r[0][0] for r in rounds) / per, statistics.median(r[0][1] for r in rounds) / per
        our_us, our_cpu = min(r[1][0] for r in rounds) / per, statistics.median(r[1][1] for r in rounds) / per
        self.results[name] = {
            "raw": {"wall_us": raw_us, "cpu_us": raw_cpu},
            "mlfuncs": {"wall_us": our_us, "cpu_us": our_cpu},
            "wall_ratio": statistics.median(r[1][0] / r[0][0] for r in rounds),
            "cpu_ratio": our_cpu / raw_cpu,
        }


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-feast", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    server = shutil.which("redis-server")
    if server is None:
        raise SystemExit("skipped: redis-server is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([server, "--port", str(port), "--save", "", "--dir", folder], **quiet)  # type: ignore[call-overload]
        try:
            results = compare(Path(folder), port, options)
        finally:
            process.terminate()
            process.wait()
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def compare(folder: Path, port: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All measures, by what was done."""
    import numpy as np
    import pyarrow as pa
    import redis

    from mlfuncs.settings import Settings
    from mlfuncs_featurestore import Aggregation, Entity, FeatureStore, FeatureView
    from mlfuncs_featurestore.online_write import number_rows

    client = redis.Redis(port=port)
    wait_for(client)
    store = FeatureStore(Settings(home=folder, project="bench", redis_url=f"redis://127.0.0.1:{port}"))
    user = Entity("user_id", "int64")
    fields = {f"f{place}": "float64" for place in range(FEATURES)}
    view = FeatureView("spend", [user], fields, ttl="2d", online=True)
    windows = [Aggregation("f0", ["sum", "mean", "count", "max"], ["1h", "24h"])]
    busy = FeatureView("busy", [user], {"f0": "float64"}, online=True, aggregations=windows)
    store.apply([view, busy])
    now = time.time_ns() // 1000
    random = np.random.default_rng(0)
    users = np.arange(WRITE_ROWS)
    values = {name: random.random(WRITE_ROWS) for name in fields}
    times = pa.array(np.full(WRITE_ROWS, now - 1)).cast(pa.timestamp("us", "UTC"))
    rows = number_rows(pa.table({"user_id": users, "event_timestamp": times, **values}), 1)
    packed = [bytes(row) for row in np.column_stack(list(values.values()))]
    keys = [f"raw:{number}" for number in users]

    def write_raw() -> None:
        for start in range(0, WRITE_ROWS, 1000):
            client.mset(dict(zip(keys[start : start + 1000], packed[start : start + 1000], strict=True)))

    contest = Contest(options)
    best: dict[str, list[tuple[float, float]]] = {"raw": [], "mlfuncs": []}
    for _ in range(3):
        for name, action in (("raw", write_raw), ("mlfuncs", lambda: store.online.write(view, rows))):
            begun, cpu = time.perf_counter(), time.process_time()
            action()
            best[name].append((time.perf_counter() - begun, time.process_time() - cpu))
    write: dict[str, Any] = {
        name: {
            "wall_us": min(w for w, _ in runs) / WRITE_ROWS * 1e6,
            "cpu_us": min(c for _, c in runs) / WRITE_ROWS * 1e6,
        }
        for name, runs in best.items()
    }
    write["wall_ratio"] = write["mlfuncs"]["wall_us"] / write["raw"]["wall_us"]
    write["cpu_ratio"] = write["mlfuncs"]["cpu_us"] / write["raw"]["cpu_us"]
    contest.results["write, newest wins (raw: blind MSET)"] = write

    names = [f"spend:{name}" for name in fields]
    for count in (1, 100):
        wanted, entities = keys[:count], {"user_id": list(range(count))}

        def raw(wanted: list[str] = wanted, count: int = count) -> Any:
            stored: list[Any] = client.mget(wanted)
            return np.frombuffer(b"".join(stored)).reshape(count, FEATURES)

        def ours(entities: dict[str, list[int]] = entities) -> Any:
            return store.get_online_features(names, entities).to_numpy()

        assert (raw() == ours()).all()
        contest.run(f"read {count} x {FEATURES}", raw, ours)
    events = 200
    ages = np.sort(random.integers(0, 86_400 * 10**6, events))
    history = pa.array(np.tile(now - ages, 100)).cast(pa.timestamp("us", "UTC"))
    of_user = np.repeat(np.arange(100), events)
    store.online.write(
        busy,
        number_rows(pa.table({"user_id": of_user, "event_timestamp": history, "f0": random.random(len(of_user))}), 1),
    )
    blobs = store.online.plan(["busy"]).keys({"user_id": list(range(100))})
    for count in (1, 100):
        asked = {"user_id": list(range(count))}
        contest.run(
            f"read {count} x 8 windows of {events} events (raw: MGET)",
            lambda count=count: client.mget(blobs[:count]),  # type: ignore[misc]
            lambda asked=asked: store.get_online_features([f"busy:{one}" for one in busy.aggregates], asked).to_numpy(),  # type: ignore[misc]
        )
    if not options.no_feast:
        add_feast(contest.results, port, options)
    return contest.results


def add_feast(results: dict[str, dict[str, Any]], port: int, options: argparse.Namespace) -> None:
    """Feast's times beside ours."""
    from peers import peer_python

    python = peer_python("feast-redis", FEAST)
    if python is None:
        return
    run = subprocess.run(
        [python, "-W", "ignore", "-c", FEAST_SCRIPT, str(port), str(options.seconds), "20000"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if run.returncode:
        print(f"feast is left out: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return
    found = json.loads(run.stdout.strip().splitlines()[-1])
    for name, result in results.items():
        for key, measured in found.items():
            if name.startswith((key + " x 20", key + ",")):
                result["feast"] = measured


def wait_for(client: Any) -> None:
    """Until the server answers."""
    import redis

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            time.sleep(0.02)


def show(results: dict[str, dict[str, Any]]) -> None:
    """The table: microseconds per read or per row, wall and CPU of the client."""
    print(f"{'':58}{'raw':>16}{'mlfuncs':>16}{'ratio':>14}{'feast':>18}")
    print(f"{'us per read or row: wall / client CPU':58}")
    for name, one in results.items():
        cells = [f"{one[who]['wall_us']:.1f} / {one[who]['cpu_us']:.1f}" for who in ("raw", "mlfuncs")]
        feast = f"{one['feast']['wall_us']:.0f} / {one['feast']['cpu_us']:.0f}" if "feast" in one else ""
        ratio = f"{one['wall_ratio']:.2f} / {one['cpu_ratio']:.2f}"
        print(f"{name:58}{cells[0]:>16}{cells[1]:>16}{ratio:>14}{feast:>18}")


if __name__ == "__main__":
    main()
