"""Redis at its worst: forgotten scripts, replicas, a full memory, answers that never came, a cluster's every script."""

from __future__ import annotations

import datetime
import socket
import threading

import pytest
import redis

from mlfuncs.errors import Unavailable
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureStore, FeatureView
from mlfuncs_featurestore.online_write import compact_key
from mlfuncs_featurestore.stream_windows import NEVER, STATE, new_header, read_value
from mlfuncs_featurestore.verify import verify
from tests.featurestore import redis_servers as servers
from tests.ports import free_port

NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=datetime.UTC)
NOW_US = int(NOW.timestamp()) * 10**6
USER = Entity("user_id", "int64")
pytestmark = pytest.mark.filterwarnings("ignore:view .* lies in the future")


def store_at(home, url):
    store = FeatureStore(Settings(home=home, project="shop", redis_url=url))
    windows = [Aggregation("amount", ["sum", "count"], ["1h"])]
    fields = {"amount": "float64", "id": "string"}
    plain = FeatureView("spend", [USER], {"amount": "float64"}, online=True, buckets=2)
    busy = FeatureView("busy", [USER], fields, online=True, buckets=2, aggregations=windows, event_id="id")
    store.apply([plain, busy])
    return store


def spend(value, seconds=0, users=40):
    when = NOW + datetime.timedelta(seconds=seconds)
    return {"user_id": list(range(users)), "event_timestamp": [when] * users, "amount": [value] * users}


def busy(seconds, users=40):
    rows = spend(float(seconds), -seconds, users)
    return {**rows, "id": [f"{user}-{seconds}" for user in range(users)]}


def amounts(store, at=NOW, users=40):
    found = store.get_online_features("spend:amount", {"user_id": list(range(users))}, now=at)
    return set(found.to_dict()["amount"])


@pytest.fixture
def server(tmp_path):
    port = free_port()
    with servers.running(tmp_path / "redis", "--port", str(port)):
        client = servers.answers(redis.Redis(port=port))
        store = store_at(tmp_path / "home", f"redis://127.0.0.1:{port}")
        yield store, client
        store.online.close()
        client.close()


def test_every_script_on_a_cluster(tmp_path):
    with servers.cluster(tmp_path) as port:
        store = store_at(tmp_path / "home", f"redis+cluster://127.0.0.1:{port}")
        store.push("spend", spend(1.0), now=NOW)
        store.push("spend", spend(2.0, 30), now=NOW)  # waits until it is due
        assert amounts(store) == {1.0} and amounts(store, NOW + datetime.timedelta(seconds=30)) == {2.0}
        for seconds in (7200, 3000, 50):
            store.push("busy", busy(seconds), now=NOW)
        read = store.online.plan("busy").reads["busy"]
        keys = read.keys.of([b"i%d" % user for user in range(40)])
        for key in keys:
            assert compact_key(store.online, read, key, NOW_US)
        rows = store.online.rows
        assert rows.append(keys, [b""] * 40, new_header(NOW_US - 10), 10**6) == []  # raises each horizon, on each node
        assert {STATE.unpack_from(value)[1] for value in rows.read(keys)} == {NOW_US - 10}
        assert rows.append(keys, [b""] * 40, new_header(NOW_US - 20), 10**6) == []  # an earlier one does not
        assert {STATE.unpack_from(value)[1] for value in rows.read(keys)} == {NOW_US - 10}
        store.materialize("busy", backfill=True, now=NOW)
        assert {STATE.unpack_from(value)[1] < NOW_US - 20 for value in rows.read(keys)} == {True}
        store.push("busy", busy(50), deleted=True, now=NOW)
        found = store.get_online_features("busy:amount_sum_1h", {"user_id": [0, 39]}, now=NOW).to_dict()
        assert found["amount_sum_1h"] == [3000.0, 3000.0]
        for node in store.online.client.get_primaries():
            with redis.Redis(port=node.port) as client:
                client.script_flush()
        store.push("busy", busy(40), now=NOW)
        for view in ("spend", "busy"):
            assert verify(store, view, now=NOW).is_equal
        store.online.close()


def test_forgotten_scripts_are_sent_again(server):
    store, client = server
    store.push("spend", spend(1.0), now=NOW)
    store.push("busy", busy(50), now=NOW)
    client.script_flush()
    store.push("spend", spend(2.0), now=NOW)
    store.push("busy", busy(40), now=NOW)
    read = store.online.plan("busy").reads["busy"]
    client.script_flush()
    assert compact_key(store.online, read, read.keys.of([b"i7"])[0], NOW_US)
    assert amounts(store) == {2.0} and verify(store, "busy", now=NOW).is_equal


def test_a_replica_refuses_writes_and_the_push_is_completed_by_its_primary(server):
    store, client = server
    store.push("spend", spend(1.0), now=NOW)
    client.replicaof("127.0.0.1", free_port())  # a fail-over made another one the primary
    with pytest.raises(Unavailable, match="is a replica"):
        store.push("spend", spend(2.0), push_id="over", now=NOW)
    assert store.get_online_features("spend:amount", {"user_id": [7]}, now=NOW).to_numpy().tolist() == [[1.0]]
    client.replicaof("NO", "ONE")
    assert store.push("spend", spend(2.0), push_id="over", now=NOW).repeated
    assert amounts(store) == {2.0} and verify(store, "spend", now=NOW).is_equal


def test_a_full_memory_refuses_the_push_and_what_was_there_stays(server):
    store, client = server
    store.push("spend", spend(1.0), now=NOW)
    store.push("busy", busy(50), now=NOW)
    client.config_set("maxmemory", 1)
    for view, rows in (("spend", spend(2.0)), ("busy", busy(40))):
        with pytest.raises(Unavailable, match=r"logged but not acknowledged.*maxmemory"):
            store.push(view, rows, now=NOW)
    assert amounts(store) == {1.0}
    client.config_set("maxmemory", 0)
    store.flush()
    assert amounts(store) == {2.0} and verify(store, "busy", now=NOW).is_equal


def test_rows_that_redis_threw_away_are_told_by_verify_and_come_back(server):
    store, client = server
    store.push("spend", spend(1.0), now=NOW)
    client.flushall()  # as eviction does, and a server without persistence that restarts
    assert amounts(store) == {None} and verify(store, "spend", now=NOW).different == 40
    store.materialize("spend", now=NOW)
    assert amounts(store) == {1.0} and verify(store, "spend", now=NOW).is_equal


class Proxy:
    """A way to the Redis at `upstream`, which new connections look up. It swallows the n-th answer to EVALSHA."""

    def __init__(self, upstream, swallow=0):
        self.upstream, self.left = upstream, swallow
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.pass_on, args=(client,), daemon=True).start()

    def pass_on(self, client):
        with client, socket.create_connection(("127.0.0.1", self.upstream)) as server:
            while asked := client.recv(1 << 20):
                server.sendall(asked)
                answer = server.recv(1 << 20)
                self.left -= b"EVALSHA" in asked
                if b"EVALSHA" in asked and self.left == 0:
                    return  # Redis has done it; nobody hears of it
                client.sendall(answer)


def test_a_fail_over_behind_one_address_is_followed(server, tmp_path):
    direct, client = server
    with servers.running(tmp_path / "other", "--port", str(other := free_port())):
        servers.answers(redis.Redis(port=other)).close()
        proxy = Proxy(client.get_connection_kwargs()["port"])
        store = FeatureStore(Settings(home=direct.settings.home, project="shop", redis_url=proxy.url))
        store.push("spend", spend(1.0, users=1), now=NOW)
        client.replicaof("127.0.0.1", other)
        proxy.upstream = other  # the connections that are open still lead to the one before
        store.push("spend", spend(2.0, users=1), now=NOW)
        assert amounts(store, users=1) == {2.0}
        store.online.close()
        proxy.listener.close()


@pytest.mark.parametrize("swallowed", [1, 2])
def test_a_write_whose_answer_was_lost_counts_once(server, tmp_path, swallowed):
    direct, client = server
    direct.push("busy", busy(50, 1), now=NOW)  # the script is known, so one EVALSHA is one write
    proxy = Proxy(client.get_connection_kwargs()["port"], swallowed)
    store = FeatureStore(Settings(home=direct.settings.home, project="shop", redis_url=proxy.url))
    for seconds in (40, 30):
        store.push("busy", busy(seconds, 1), now=NOW)
    proxy.listener.close()
    found = direct.get_online_features(["busy:amount_count_1h", "busy:amount_sum_1h"], {"user_id": [0]}, now=NOW)
    assert found.to_dict() == {"user_id": [0], "amount_count_1h": [3], "amount_sum_1h": [120.0]}
    key = direct.online.plan("busy").keys({"user_id": [0]})[0]
    horizon, rows = read_value(client.get(key))
    assert horizon == NEVER and len(rows) == 4  # one event is there twice, and counts once
    assert verify(direct, "busy", now=NOW).is_equal
    store.online.close()
