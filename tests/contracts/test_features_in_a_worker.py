"""A real worker process whose handler takes online features: keys in, predictions out."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlfuncs as ml
from mlfuncs.bundles.bundle import build_bundle
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureStore, FeatureView
from mlfuncs_featurestore.redis_embedded import stop_embedded
from mlfuncs_featurestore.skew import check_skew
from mlfuncs_runtime.worker.config import WorkerConfig

ROOT = Path(__file__).parents[2]
FEATURES = ("spend:amount_sum_1h", "spend:amount")


@ml.function(features=FEATURES)
def share(amount_sum_1h: float | None, amount: float | None, limit: float) -> float | None:
    return None if amount_sum_1h is None else amount_sum_1h / limit


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("worker", timeout=60)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.path)


def ask(path, method, url, body=None):
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request(method, url, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_a_worker_reads_the_features_of_its_callers_keys(tmp_path):
    settings = Settings(home=tmp_path / "home", project="shop")
    store = FeatureStore(settings)
    windows = [Aggregation("amount", ["sum"], ["1h"])]
    user = Entity("user_id", "int64")
    store.apply(FeatureView("spend", [user], {"amount": "float64"}, online=True, aggregations=windows, buckets=1))
    now = datetime.datetime.now(datetime.UTC)
    store.push("spend", [{"user_id": 7, "event_timestamp": now, "amount": amount} for amount in (2.0, 4.0)])
    bundle = build_bundle(share.target, share.spec, settings)
    path = str(tmp_path / "w.sock")
    config = WorkerConfig(
        "share", "shop", "rev-1", bundle.digest, socket=path, features=FEATURES, feature_sample_rate=1.0
    )
    (tmp_path / "worker.json").write_text(json.dumps(config.to_dict()))
    environ = {**os.environ, **settings.to_environ()}
    environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "runtime", "featurestore"))
    command = [sys.executable, "-m", "mlfuncs_runtime.worker.process", "--config", str(tmp_path / "worker.json")]
    process = subprocess.Popen(command, env=environ, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not is_ready(path):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert ask(path, "POST", "/", {"user_id": 7, "limit": 3.0}) == (200, b"2.0")
        assert ask(path, "POST", "/", {"user_id": 8, "limit": 3.0}) == (200, b"null")
        status, answer = ask(path, "POST", "/", {"limit": 3.0})
        assert status == 422 and b"user_id" in answer
        schema = json.loads(ask(path, "GET", "/openapi.json")[1])
        assert "user_id" in json.dumps(schema) and "amount_sum_1h" not in json.dumps(schema)
        metrics = ask(path, "GET", "/-/metrics")[1].decode()
        labels = 'endpoint="share",revision="rev-1",replica=""'
        assert f'mlfuncs_features_cells_total{{{labels},status="PRESENT"}} 2' in metrics
        assert f'mlfuncs_features_cells_total{{{labels},status="NOT_FOUND"}} 2' in metrics
        assert f"mlfuncs_features_read_duration_seconds_count{{{labels}}} 2" in metrics
        checked = check_skew(store)  # every served vector was kept
        assert checked.cells == 4 and checked.is_equal, str(checked)
    finally:
        process.kill()
        process.wait(60)
        store.online.close()
        stop_embedded(settings)


def is_ready(path):
    try:
        return ask(path, "GET", "/-/ready")[0] == 200
    except OSError:
        return False
