"""Tables on Azure's Blob API, spoken by Azurite (`npm install -g azurite`); skipped where that is not installed."""

from __future__ import annotations

import base64
import datetime
import email.utils
import hashlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import uuid

import pytest

from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureStore, FeatureView

NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)
ACCOUNT = "devstoreaccount1"  # Azurite's own, published in its manual, as is its key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
API = "2021-08-06"
VIEW = FeatureView(
    "spend", [Entity("user_id", "int64")], {"amount": "float64"}, buckets=2,
    aggregations=[Aggregation("amount", ["sum"], ["1h"])],
)  # fmt: skip


@pytest.fixture(scope="module")
def azurite(tmp_path_factory):
    """The address of a server of this module's own."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not installed (npm install -g azurite)")
    folder = tmp_path_factory.mktemp("azurite")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--silent", "--skipApiVersionCheck", "--location", str(folder), "--blobPort", str(port)]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def container(azurite, monkeypatch):
    """The URL of an empty container of the test's own; the environment has what reaches it."""
    for name, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_USE_EMULATOR": "true",
        "AZURITE_BLOB_STORAGE_URL": azurite,
        "AZURE_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    name, date = f"c{uuid.uuid4().hex}", email.utils.formatdate(usegmt=True)
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{API}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    mac = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": API,
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(mac).decode()}",
        "Content-Length": "0",
        "Content-Type": "",
    }
    url = f"{azurite}/{ACCOUNT}/{name}?restype=container"
    request = urllib.request.Request(url, data=b"", headers=headers, method="PUT")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 201
    return f"az://{name}"


def rows(*users):
    return [{"user_id": user, "event_timestamp": NOW, "amount": 1.0} for user in users]


def test_the_whole_way_of_a_table_on_azure(container, tmp_path):
    store = FeatureStore(Settings(home=tmp_path, project="shop", warehouse_url=f"{container}/tables"))
    store.apply(VIEW)
    assert store.ingest("spend", rows(1, 2, 3), now=NOW).version == 1
    store.ingest("spend", rows(1, 4), now=NOW)
    spine = {"user_id": [1, 9, 1], "event_timestamp": [NOW] * 3}
    found = store.get_historical_features(spine, ["spend:amount_sum_1h"])
    assert found.to_arrow()["amount_sum_1h"].to_pylist() == [2.0, None, 2.0]
    record = found.record
    assert store.offline.compact(store.catalog.view("spend")) >= 2
    assert store.rebuild(record).to_arrow().equals(found.to_arrow())
    assert store.offline.snapshot("spend", 1).rows == 3
    assert store.offline.vacuum("spend", 0)
    assert store.offline.snapshot("spend").rows == 5
