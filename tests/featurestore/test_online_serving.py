"""Features over HTTP, in endpoints, from streams, on the command line; the skew check."""

from __future__ import annotations

import datetime
import json
import threading
import uuid
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient

from mlfuncs.errors import InvalidInput, NotFound, SpecError, Unauthorized, Unavailable
from mlfuncs.interface.signature import Signature
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec
from mlfuncs_featurestore import Aggregation, Entity, FeatureService, FeatureStore, FeatureView, feature_view, on_demand
from mlfuncs_featurestore.cli import features as command
from mlfuncs_featurestore.online_client import FeatureClient
from mlfuncs_featurestore.online_server import check_address, make_app
from mlfuncs_featurestore.serving import FeatureReader
from mlfuncs_featurestore.skew import check_skew, forget_served, sample
from mlfuncs_featurestore.stream import StreamReader, consume

UTC = datetime.UTC
USER = Entity("user_id", "int64")


def now():
    return datetime.datetime.now(UTC)


@on_demand(sources=["spend:amount"], request={"limit": float}, fields={"share": float})
def usage(amount, limit):
    return {"share": amount / limit}


@pytest.fixture
def store(online_store):
    view = FeatureView(
        "spend", [USER], {"amount": "float64", "merchant": "string"}, online=True, buckets=2,
        aggregations=[Aggregation("amount", ["sum"], ["1h"])],
    )  # fmt: skip
    profile = FeatureView("profile", [USER], {"amount": "int64", "city": "string"}, online=True, buckets=2)
    service = FeatureService("fraud", ["spend:amount_sum_1h", "profile:city", "usage:share"])
    online_store.apply([view, profile, usage, service])
    for amount in (3.0, 5.0):
        online_store.push("spend", {"user_id": 1, "event_timestamp": now(), "amount": amount, "merchant": "nan"})
    online_store.push("profile", {"user_id": 1, "event_timestamp": now(), "amount": 7, "city": "NaN"})
    return online_store


def test_views_services_and_on_demand_in_one_call_named_as_offline(store):
    wanted = ["spend:amount", "profile:amount", "fraud"]
    entities = {"user_id": [1, 2], "limit": [10.0, 10.0]}
    online = store.get_online_features(wanted, entities)
    spine = pd.DataFrame({**entities, "event_timestamp": [now()] * 2})
    offline = store.get_historical_features(spine, wanted, status=True).to_arrow()
    assert online.names == ["spend__amount", "profile__amount", "amount_sum_1h", "city", "share"]
    for name in online.names:
        assert online.to_dict()[name] == offline[name].to_pylist()
        assert online.statuses[name] == offline[f"{name}__status"].to_pylist()
    full = store.get_online_features(["fraud"], entities, full_feature_names=True)
    assert full.names == ["spend__amount_sum_1h", "profile__city", "usage__share"]


def test_results_come_in_every_form(store):
    found = store.get_online_features(["spend:amount_sum_1h", "profile:amount"], [{"user_id": 1}, {"user_id": 1}])
    assert found.to_numpy().tolist() == [[8.0, 7.0], [8.0, 7.0]] and len(found) == 2
    assert found.to_arrow()["amount"].to_pylist() == [7, 7] and found.to_pandas()["amount"].tolist() == [7, 7]
    assert store.get_online_features("profile:amount", {"user_id": np.array([1])}).to_numpy().dtype == np.int64
    assert store.online.client.ping()


def test_unknown_names_get_near_ones(store):
    with pytest.raises(NotFound, match="amount"):
        store.get_online_features(["profile:amont"], {"user_id": [1]})
    with pytest.raises(InvalidInput, match="'user_id' is missing: 'user' was given"):
        store.get_online_features(["profile:amount"], {"user": [1]})
    with pytest.raises(InvalidInput, match="write"):
        store.get_online_features(["profile:amount"], {"user_id": "1"})
    store.apply(FeatureView("cold", [USER], {"amount": "float64"}))
    with pytest.raises(SpecError, match="online=True"):
        store.get_online_features(["cold:amount"], {"user_id": [1]})


def test_a_changed_definition_is_seen_and_old_rows_are_widened(store):
    store.get_online_features(["profile:city"], {"user_id": [1]})
    fields = {"amount": "int64", "city": "string", "score": "float64"}
    store.apply(FeatureView("profile", [USER], fields, online=True, buckets=2))
    found = store.get_online_features(["profile:city", "profile:score"], {"user_id": [1]})
    assert found.to_dict() == {"user_id": [1], "city": ["NaN"], "score": [None]}
    assert found.statuses["score"] == ["NULL"]


def test_fallback_values_only_when_asked(store):
    away = FeatureStore(Settings(home=store.settings.home, project="shop", redis_url="redis://:secret@127.0.0.1:1/0"))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1") as caught:
        away.get_online_features(["profile:amount"], {"user_id": [1]})
    assert "secret" not in str(caught.value)


@pytest.fixture
def client(store):
    with TestClient(make_app(store)) as client:
        yield client


def test_the_server_answers_in_feasts_shape(client):
    body = {"features": ["profile:amount", "profile:city"], "entities": {"user_id": [1, 2]}}
    answer = client.post("/get-online-features", json=body).json()
    assert answer["metadata"]["feature_names"] == ["user_id", "amount", "city"]
    assert answer["results"][1]["values"] == [7, None] and answer["results"][1]["statuses"] == ["PRESENT", "NOT_FOUND"]
    assert answer["results"][2]["event_timestamps"][1] == "1970-01-01T00:00:00Z"
    service = {"feature_service": "fraud", "entities": {"user_id": [1], "limit": [10.0]}}
    assert client.post("/get-online-features", json=service).json()["results"][2]["values"] == [8.0]


def test_the_server_pushes_and_says_what_is_wrong(client):
    rows = {"user_id": [5], "event_timestamp": [now().isoformat()], "amount": [1], "city": ["Rome"]}
    assert client.post("/push", json={"push_source_name": "profile", "df": rows}).json()["rows"] == 1
    body = {"features": ["profile:city"], "entities": {"user_id": [5]}}
    assert client.post("/get-online-features", json=body).json()["results"][1]["values"] == ["Rome"]
    for wrong, status in [
        ({"features": ["profile:cty"], "entities": {"user_id": [5]}}, 404),
        ({"features": ["profile:city"], "entities": {"user_id": [None]}}, 422),
        ({"entities": {"user_id": [5]}}, 422),
        ({"features": "profile:city", "entities": {}}, 422),
    ]:
        refused = client.post("/get-online-features", json=wrong)
        assert refused.status_code == status and refused.headers["content-type"] == "application/problem+json"
    assert 'code="404"} 1' in client.get("/metrics").text
    assert 'mlfuncs_features_cells_total{status="PRESENT"} 1' in client.get("/metrics").text
    assert "mlfuncs_features_read_duration_seconds_count 1" in client.get("/metrics").text


def test_every_route_but_health_needs_the_token(store):
    closed = FeatureStore(Settings(home=store.settings.home, project="shop", token="secret"))
    with TestClient(make_app(closed)) as client:
        for route in client.app.routes:
            for method in route.methods:
                status = client.request(method, route.path).status_code
                assert (status != 401) == (route.path == "/health"), route.path
        good = {"Authorization": "Bearer secret"}
        assert client.get("/metrics", headers=good).status_code == 200
    with pytest.raises(SpecError, match="MLFUNCS_TOKEN"):
        check_address("0.0.0.0", "")
    check_address("0.0.0.0", "secret")
    check_address("::1", "")


def test_the_client_gives_values_and_the_servers_errors(store):
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(make_app(store), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        client = FeatureClient(f"http://127.0.0.1:{port}")
        client.push(
            "spend", {"user_id": [3], "event_timestamp": [now().isoformat()], "amount": [1.5], "merchant": ["nan"]}
        )
        found = client.get_online_features(["profile:city", "spend:merchant", "spend:amount"], {"user_id": [1, 3]})
        assert found.columns["city"] == ["NaN", None] and found.columns["merchant"] == ["nan", "nan"]
        assert found.columns["amount"] == [5.0, 1.5] and found.statuses["city"] == ["PRESENT", "NOT_FOUND"]
        with pytest.raises(NotFound, match="city"):
            client.get_online_features(["profile:cty"], {"user_id": [1]})
    finally:
        server.should_exit = True
        thread.join(60)
    with pytest.raises(Unavailable):
        FeatureClient("http://127.0.0.1:1").get_online_features(["profile:city"], {"user_id": [1]})
    assert Unauthorized.status == 401


def score(limit: float, amount_sum_1h: float | None, features: dict) -> float:
    return (amount_sum_1h or 0.0) / limit + len(features)


def test_a_handler_receives_features_and_callers_send_keys(store):
    reader = FeatureReader(["spend:amount_sum_1h", "profile:city", "usage:share"], store.settings)
    reader.warm()
    bound = reader.bind(score)
    signature = Signature.of(bound)
    assert set(signature.input_schema()["properties"]) == {"user_id", "limit"}
    assert bound(**signature.validate_json(b'{"user_id": 1, "limit": 4}')) == 4.0
    with pytest.raises(InvalidInput, match="user_id"):
        signature.validate_json(b'{"limit": 4}')


def test_a_handler_of_many_entities_and_a_class(store):
    def total(user_id: list[int], features: np.ndarray) -> list[float]:
        return features.sum(axis=1).tolist()

    class Model:
        def __init__(self, weight: float):
            self.weight = weight

        def __call__(self, features: np.ndarray) -> float:
            return self.weight * float(features[0])

    reader = FeatureReader(["spend:amount_sum_1h", "profile:amount"], store.settings)
    assert reader.bind(total)(user_id=[1, 1]) == [15.0, 15.0]
    assert reader.bind(Model)(2.0)(user_id=1) == 16.0
    with pytest.raises(SpecError, match="none of its features"):
        reader.bind(lambda x: x)


def test_a_stream_is_pushed_once_whatever_happens(store):
    @feature_view(
        entities=[USER], fields={"double": "float64"}, online=True, source="redis-stream:clicks", buckets=2,
        aggregations=[Aggregation("double", ["count"], ["1h"])],
    )  # fmt: skip
    def doubled(frame):
        return frame.assign(double=frame["amount"] * 2)

    store.apply(doubled)
    client = store.online.client
    for user in range(5):
        row = {"user_id": user, "event_timestamp": now().isoformat(), "amount": float(user)}
        client.xadd("clicks", {"row": json.dumps(row)})
    client.xadd("clicks", {"row": "not json"})
    done = consume(store, "doubled")
    assert (done.rows, done.rejected) == (5, 1) and client.xlen("clicks:rejected") == 1
    found = store.get_online_features(["doubled:double"], {"user_id": [0, 4]})
    assert found.to_dict()["double"] == [0.0, 8.0]
    client.xadd("clicks", {"row": json.dumps({"user_id": 9, "event_timestamp": now().isoformat(), "amount": 1.0})})
    reader = StreamReader(store, "doubled")
    reader._link.client.xack, kept = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), client.xack
    with pytest.raises(KeyboardInterrupt):  # dies between push and acknowledgement
        reader.consume()
    reader._link.client.xack = kept
    StreamReader(store, "doubled").consume()
    assert store.get_online_features(["doubled:double_count_1h"], {"user_id": [9]}).to_dict()["double_count_1h"] == [1]
    spine = {"user_id": [9], "event_timestamp": [now()]}
    assert (
        store.get_historical_features(spine, ["doubled:double_count_1h"]).to_arrow()["double_count_1h"][0].as_py() == 1
    )


def test_served_vectors_are_those_of_training_and_skew_is_found(store):
    for user in (1, 2):
        found = store.get_online_features(["spend:amount_sum_1h", "profile:city"], {"user_id": [user]})
        assert sample(store, found, 1.0)
    assert not sample(store, found, 0.0)
    checked = check_skew(store)
    assert checked.is_equal and checked.entities == 2 and checked.cells == 4
    late = now() - datetime.timedelta(minutes=5)
    store.push("spend", {"user_id": 2, "event_timestamp": late, "amount": 4.0, "merchant": "m"})
    checked = check_skew(store)  # a row that came after it was asked for is late, not a fault
    assert checked.is_equal and checked.late == 1 and checked.late_differences[0].feature == "amount_sum_1h"
    assert "late: amount_sum_1h of user_id=2" in str(checked) and "offline 4.0" in str(checked)
    store.ingest("spend", [{"user_id": 1, "event_timestamp": late, "amount": 9.0, "merchant": "m"}])
    found = store.get_online_features(["spend:amount_sum_1h"], {"user_id": [1]})  # not materialized yet: a fault
    assert sample(store, found, 1.0)
    checked = check_skew(store)
    assert (checked.different, checked.late) == (1, 2) and checked.differences[0].offline == 17.0


def test_vectors_served_elsewhere_are_kept_in_redis(store, tmp_path, caplog):
    url = f"unix://{store.online.client.get_connection_kwargs()['path']}"
    there = FeatureStore(Settings(home=tmp_path / "container", project="shop", redis_url=url))
    found = store.get_online_features(["spend:amount_sum_1h", "profile:city"], {"user_id": [1, 2]})
    assert sample(there, found, 1.0) and sample(there, found, 1.0)
    assert not (tmp_path / "container").exists()  # nothing is left where the container was
    checked = check_skew(store)
    assert checked.is_equal and (checked.entities, checked.cells) == (4, 8)
    forget_served(store)
    assert check_skew(store).cells == 0
    away = FeatureStore(Settings(home=store.settings.home, project="shop", redis_url="redis://127.0.0.1:1/0"))
    assert not sample(away, found, 1.0) and "could not be kept" in caplog.text
    mixed = store.get_online_features(["profile:city"], {"user_id": [1, 2], "mine": [1, "x"]})
    assert not sample(store, mixed, 1.0) and "'mine' holds values of different types" in caplog.text
    there.online.close()


def test_a_function_says_which_share_of_its_vectors_is_kept(store):
    spec = FunctionSpec("score", features=["profile:city"], feature_sample_rate=1.0)
    assert FunctionSpec.from_dict(spec.to_dict()) == spec
    assert "feature_sample_rate" not in FunctionSpec("score").to_dict()  # digests of others stay as they were
    with pytest.raises(SpecError, match="0 to 1, not 2"):
        FunctionSpec("score", feature_sample_rate=2)
    reader = FeatureReader(["profile:city"], store.settings, spec.feature_sample_rate)
    assert reader.bind(lambda city: city)(user_id=1) == "NaN"
    assert check_skew(store).cells == 1


def test_reads_are_counted_by_status_and_time(store):
    reader = FeatureReader(["profile:city", "profile:amount"], store.settings)
    bound = reader.bind(lambda city, amount: city)
    for user in (1, 1, 2):
        bound(user_id=user)
    lines = reader.metrics.lines('endpoint="e"')
    assert 'mlfuncs_features_cells_total{endpoint="e",status="PRESENT"} 4' in lines
    assert 'mlfuncs_features_cells_total{endpoint="e",status="NOT_FOUND"} 2' in lines
    assert 'mlfuncs_features_read_duration_seconds_count{endpoint="e"} 3' in lines
    assert 'mlfuncs_features_failed_reads_total{endpoint="e"} 0' in lines
    whole = store.get_online_features(["spend:amount_sum_1h", "profile:amount"], {"user_id": [1, 9]})
    assert whole.counts() == {"PRESENT": 2, "NOT_FOUND": 2}
    away = Settings(home=store.settings.home, project="shop", redis_url="redis://127.0.0.1:1/0")
    lost = FeatureReader(["profile:city"], away)
    with pytest.raises(Unavailable):
        lost.bind(lambda city: city)(user_id=1)
    assert "mlfuncs_features_failed_reads_total 1" in lost.metrics.lines()


def test_commands_print_json(store, tmp_path, monkeypatch):
    for name, value in store.settings.to_environ().items():
        monkeypatch.setenv(name, value)
    module = tmp_path / f"defs_{uuid.uuid4().hex[:8]}.py"
    module.write_text(
        "import mlfuncs as ml\nuser = ml.Entity('user_id', 'int64')\n"
        "trips = ml.FeatureView('trips', entities=[user], fields={'km': 'float64'}, online=True)\n"
    )
    frame = pd.DataFrame({"user_id": [1], "event_timestamp": [now()], "km": [4.5]})
    frame.to_parquet(tmp_path / "trips.parquet")

    def run(*arguments):
        result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
        return json.loads(result.stdout.strip().splitlines()[-1])

    assert run("apply", str(module))["applied"]
    assert run("ingest", "trips", str(tmp_path / "trips.parquet"))["rows"] == 1
    assert run("materialize", "trips", "--verify")["verified"]["trips"]["different"] == 0
    assert run("get", "trips:km", "--entities", '{"user_id": [1, 2]}')["features"]["km"] == [4.5, None]
    row = {"user_id": 2, "event_timestamp": now().isoformat(), "km": 1.0}
    assert run("push", "trips", "--data", json.dumps(row))["rows"] == 1
    assert run("verify", "trips")["entities"] == 2
    assert [one["feature"] for one in run("list", "km")["features"]] == ["trips:km"]
    assert run("down")["stopped"] and not run("down")["stopped"]


@on_demand(sources=["bag:items"], request={"n": int}, fields={"size": "int64"}, mode="numpy")
def bag_size(items, n):
    return {"size": np.array([len(one) for one in items]) + n}


def test_numpy_functions_get_no_floats_for_integers_beside_null(store):
    items = {"items": "list<int64>", "weights": "list<float64>"}
    store.apply([FeatureView("bag", [USER], items, online=True, buckets=2), bag_size])
    for user, given in [(1, [2**53 + 1, 7]), (2, [2**53 + 1, None])]:
        store.push("bag", {"user_id": [user], "event_timestamp": [now()], "items": [given], "weights": [[1.0]]})
    wanted = ["bag_size:size", "bag:items"]
    found = store.get_online_features(wanted, {"user_id": [1], "n": [2**53]}).to_dict()
    assert found["size"] == [2**53 + 2] and found["items"] == [[2**53 + 1, 7]]
    with pytest.raises(InvalidInput, match="'items' has nulls, which a numpy array of int64 cannot hold"):
        store.get_online_features(wanted, {"user_id": [2], "n": [1]}).to_dict()


def test_request_columns_keep_every_digit_in_frames(store):
    asked = {"user_id": [1, 1, 1], "limit": [10.0, None, float("nan")], "n": [2**53 + 1, None, 3]}
    frame = store.get_online_features(["usage:share"], asked).to_pandas()
    assert frame["n"].tolist()[0] == 2**53 + 1 and str(frame["n"].dtype) == "Int64" and frame["n"].isna()[1]
    assert frame["limit"].isna().tolist() == [False, True, False]  # null and NaN stay apart
    mixed = {"user_id": [1, 1], "mine": [object, "x"]}
    assert store.get_online_features(["profile:city"], mixed).to_pandas()["mine"].tolist() == [object, "x"]


@on_demand(sources=["profile:amount"], request={"at": "timestamp", "price": "decimal(10,2)"}, fields={"year": "int64"})
def when(amount, at, price):
    return {"year": at.dt.year + price.astype("float64").astype("int64") * 0}


def test_the_server_reads_request_columns_as_their_types(store, client):
    store.apply(when)
    body = {"features": ["when:year"], "entities": {"user_id": [1], "at": ["2024-05-01T12:00:00Z"], "price": ["1.10"]}}
    answer = client.post("/get-online-features", json=body)
    assert answer.status_code == 200 and answer.json()["results"][-1]["values"] == [2024], answer.text
    body["entities"]["at"] = ["yesterday"]
    assert client.post("/get-online-features", json=body).status_code == 422


def test_the_server_bears_what_callers_send_beside_keys(client):
    body = {"features": ["profile:city"], "entities": {"user_id": [1], "mine": [2**70]}}
    assert client.post("/get-online-features", json=body).json()["results"][1]["values"] == [2**70]
    refused = client.post("/push", content=iter([b"{", b"}"]))  # of no known length
    assert refused.status_code == 413 and "Content-Length" in refused.text
    for length in ("\u00b2", "-1", "1e3", str(2**40)):
        assert (
            client.post("/push", content=b"{}", headers={"Content-Length": length.encode("latin-1")}).status_code == 413
        )


def test_the_client_sends_what_python_has_and_a_push_once(store, monkeypatch):
    store.apply(FeatureView("bag", [Entity("key", "bytes")], {"seen": "date", "cost": "decimal(10,2)"}, online=True))
    with TestClient(make_app(store)) as app:
        client, lost = FeatureClient("http://there"), []

        def request(method, url, body, headers):
            answer = app.request(method, url.removeprefix("http://there"), content=body, headers=headers)
            if "/push" in url and not lost:  # urllib3 sends again when an answer does not come
                lost.append(answer)
                answer = app.request(method, url.removeprefix("http://there"), content=body, headers=headers)
            return SimpleNamespace(status=answer.status_code, data=answer.content)

        monkeypatch.setattr(client._pool, "request", request)
        row = {
            "key": [b"\0k"],
            "event_timestamp": [now()],
            "seen": [datetime.date(2024, 5, 1)],
            "cost": [Decimal("1.10")],
        }
        assert client.push("bag", row)["repeated"] and lost[0].json()["rows"] == 1
        found = client.get_online_features(["bag:seen", "bag:cost"], {"key": [b"\0k"]})
        assert found.columns["seen"] == ["2024-05-01"] and found.columns["cost"] == ["1.10"]
        assert client.get_online_features(["profile:amount"], {"user_id": np.array([1])}).columns["amount"] == [7]
        with pytest.raises(InvalidInput, match=r"object object.*cannot be sent"):
            client.get_online_features(["profile:amount"], {"user_id": [object()]})
        monkeypatch.setattr(client._pool, "request", lambda *_, **__: SimpleNamespace(status=502, data=b"<html>"))
        with pytest.raises(Unavailable, match="HTTP 502 without JSON"):
            client.get_online_features(["profile:amount"], {"user_id": [1]})
