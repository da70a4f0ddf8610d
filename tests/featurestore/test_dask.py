"""The join on a Dask cluster of two worker processes equals the local one."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest

from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureStore, FeatureView

START = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def client():
    import dask
    import distributed

    patience = {"distributed.comm.timeouts.connect": "120s", "distributed.comm.timeouts.tcp": "120s"}
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        dask.config.set(patience),
        distributed.LocalCluster(host="127.0.0.1", **options) as cluster,
        distributed.Client(cluster) as one,
    ):
        yield one


def test_two_worker_processes_give_the_same_as_threads(client, tmp_path):
    store = FeatureStore(Settings(home=tmp_path, project="shop"))
    windows = [Aggregation("amount", ["sum", "count", "max"], windows=["10m"])]
    keys = {"user_id": "int64", "shop": "string"}
    fields = {"amount": "float64", "note": "string"}
    store.apply(FeatureView("spend", entities=[Entity("pair", keys=keys)], fields=fields, aggregations=windows))
    random = np.random.default_rng(0)

    def rows(n):
        times = [START + datetime.timedelta(seconds=int(s)) for s in random.integers(0, 5000, n)]
        shops = random.choice(["a", "b"], n).tolist()
        return {"user_id": random.integers(0, 50, n), "shop": shops, "event_timestamp": pa.array(times)}

    history = rows(3000)
    store.ingest("spend", pa.table({**history, "amount": random.normal(size=3000), "note": ["é"] * 3000}))
    spine = pa.table(rows(500))
    local = store.get_historical_features(spine, "spend", status=True)
    spread = store.get_historical_features(spine, "spend", status=True, engine="dask")
    assert spread.to_arrow().equals(local.to_arrow())
    assert any(client.run(lambda: "mlfuncs_featurestore.asof" in __import__("sys").modules).values())
    assert len(client.scheduler_info()["workers"]) == 2
