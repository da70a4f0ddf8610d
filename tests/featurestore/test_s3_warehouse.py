"""Tables, spines and sources on an object store: a real S3 API over HTTP (moto's server)."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys

import pandas as pd
import pytest

from mlfuncs.errors import NotFound, StorageError
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, Expectation, FeatureStore, FeatureView
from mlfuncs_featurestore.verify import verify

NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)
VIEW = FeatureView(
    "spend", [Entity("user_id", "int64")], {"amount": "float64"}, online=True, buckets=2,
    aggregations=[Aggregation("amount", ["sum"], ["1h"])],
    expectations=[Expectation("amount", minimum=0, action="quarantine")],
)  # fmt: skip


@pytest.fixture
def store(online_store, s3_bucket):
    settings = Settings(home=online_store.settings.home, project="shop", warehouse_url=f"{s3_bucket}/tables/")
    store = FeatureStore(settings)
    store.apply(VIEW)
    return store


def rows(*users, amount=1.0):
    return [{"user_id": user, "event_timestamp": NOW, "amount": amount} for user in users]


def test_the_whole_way_of_a_table_on_s3(store, s3_bucket):
    assert store.offline.uri("spend") == f"{s3_bucket}/tables/shop/spend"
    assert store.ingest("spend", rows(1, 2, 3), now=NOW).version == 1
    store.ingest("spend", rows(4, amount=-1.0), now=NOW)
    assert store.offline.quarantined("spend").num_rows == 1
    store.push("spend", rows(1, amount=5.0), now=NOW)
    spine = {"user_id": [1, 9, 1], "event_timestamp": [NOW] * 3}
    found = store.get_historical_features(spine, ["spend:amount_sum_1h", "spend:amount"])
    assert found.to_arrow()["amount_sum_1h"].to_pylist() == [6.0, None, 6.0]
    store.materialize("spend", now=NOW)
    assert verify(store, "spend", now=NOW).is_equal
    record = found.record
    assert store.offline.compact(store.catalog.view("spend")) >= 2
    assert store.rebuild(record).to_arrow().equals(found.to_arrow())
    assert store.offline.snapshot("spend", 1).rows == 3
    assert store.offline.vacuum("spend", 0)
    assert store.offline.snapshot("spend").rows == 4


def test_a_source_on_s3_is_read(store, s3_bucket):
    pd.DataFrame(rows(7, 8)).to_parquet(f"{s3_bucket}/in/part.parquet")
    assert store.ingest("spend", f"{s3_bucket}/in/*.parquet", now=NOW).rows == 2
    with pytest.raises(NotFound, match="no file is there"):
        store.ingest("spend", f"{s3_bucket}/none/*.parquet")


WRITER = """
import datetime, sys
from pathlib import Path
from mlfuncs.settings import Settings
from mlfuncs_featurestore import FeatureStore

home, warehouse, number = sys.argv[1:]
store = FeatureStore(Settings(home=Path(home), project="shop", warehouse_url=warehouse))
now = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(8):
    store.ingest("spend", [{"user_id": int(number), "event_timestamp": now, "amount": float(turn)}], now=now)
"""


def test_two_writers_at_once_lose_no_commit(store):
    """Each commit puts its log entry only where none is (If-None-Match); who loses takes the next version."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    home, warehouse = str(store.settings.home), store.settings.warehouse_url
    store.ingest("spend", rows(0), now=NOW)
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WRITER, home, warehouse, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
        for number in (1, 2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=200)
        assert writer.returncode == 0
    snapshot = store.offline.snapshot("spend")
    assert snapshot.rows == 17 and snapshot.version == 17


def test_a_bucket_that_is_not_there_is_said(store, s3_server):
    lost = FeatureStore(Settings(home=store.settings.home, project="shop", warehouse_url="s3://no-such-bucket/tables"))
    with pytest.raises(StorageError, match="no-such-bucket"):
        lost.ingest("spend", rows(1), now=NOW)
