"""What a user may hand in by mistake is refused with what it was and what to write, never with a traceback."""

from __future__ import annotations

import datetime
from decimal import Decimal

import pandas as pd
import pytest
from click.testing import CliRunner

from mlfuncs.errors import InvalidInput, NotFound, SpecError
from mlfuncs_featurestore import Aggregation, Entity, FeatureService, FeatureStore, FeatureView, OnDemandView
from mlfuncs_featurestore.cli import features as command

USER = Entity("user_id", "int64")
NOW = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC)
AMOUNT = {"amount": "float64"}
SUM = Aggregation("amount", ["sum"], ["1h"])


@pytest.fixture(scope="module")
def store(shared_store):
    store = FeatureStore(shared_store.settings)
    store.apply(FeatureView("refused", [USER], AMOUNT, online=True))
    store.apply(FeatureView("named", [Entity("name", "string")], {"price": "decimal(38,2)"}, online=True))
    return store


def online(store, entities, **options):
    return store.get_online_features(["refused:amount"], entities, **options).to_dict()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda store: online(store, None), InvalidInput, r"\{'user_id': \[...\]\}"),
        (lambda store: online(store, "7"), InvalidInput, "columns of keys"),
        (lambda store: online(store, [1, 2]), InvalidInput, "1 is not a row of keys"),
        (lambda store: online(store, []), InvalidInput, "'user_id' is missing"),
        (lambda store: online(store, {"user": [1]}), InvalidInput, "'user' was given"),
        (lambda store: online(store, {"user_id": 1}), InvalidInput, "list of values"),
        (lambda store: online(store, {"user_id": [1]}, now="noon"), InvalidInput, "now must be a datetime"),
        (lambda store: store.apply("refused"), SpecError, "not 'refused'"),
        (lambda store: store.apply(None), SpecError, "not None"),
        (lambda store: store.ingest("refused", {"user_id": 1}), InvalidInput, "list of values"),
        (lambda store: store.ingest("refused", "rows.csv"), InvalidInput, "SELECT \\* FROM read_csv"),
        (lambda store: store.ingest("refused"), SpecError, "mlfuncs features ingest refused FILE"),
        (lambda store: store.push("refused", []), InvalidInput, "no rows were given"),
        (lambda store: store.materialize("refused", start="2024"), InvalidInput, "start must be a datetime"),
        (lambda store: store.materialize("refusd"), NotFound, "no view is named 'refusd'; did you mean 'refused'"),
        (lambda store: store.catalog.delete("vew", "refused"), SpecError, "one of entity, view"),
        (lambda store: store.offline.compact("refusd"), NotFound, "refused"),
        (lambda _: FeatureView("v", ["user"], AMOUNT), SpecError, "ml.Entity; 'user' is none"),
        (lambda _: FeatureView("v", [USER], ["amount"]), SpecError, "mapping like"),
        (lambda _: FeatureView("v", [USER], AMOUNT, aggregations={"amount": "sum"}), SpecError, "ml.Aggregation"),
        (lambda _: Aggregation("amount", ["sum"], windows=[3600]), SpecError, "window 3600 is not a duration: write"),
        (lambda _: Aggregation("amount", ["sum"], windows=[None]), SpecError, "window None is not a duration"),
        (lambda _: OnDemandView("v", ["a:b"], ["amount"]), SpecError, "mapping like"),
        (lambda _: FeatureService("s", "refused:amount"), SpecError, r"features=\['refused:amount'\]"),
        (lambda _: FeatureService("s", 3), SpecError, "list of names"),
    ],
)
def test_a_mistake_is_named(store, call, error, said):
    with pytest.raises(error, match=said):
        call(store)


def test_one_aggregation_need_not_be_a_list():
    assert FeatureView("v", USER, AMOUNT, aggregations=SUM) == FeatureView("v", [USER], AMOUNT, aggregations=[SUM])


HALF = "a\ud800"  # what json.loads makes of "a\\ud800"


def row_of(view, key, value):
    names = ("user_id", "amount") if view == "refused" else ("name", "price")
    return {names[0]: key, "event_timestamp": NOW, names[1]: value}


@pytest.mark.parametrize("write", ["push", "ingest"])
@pytest.mark.parametrize(
    ("view", "key", "value", "said"),
    [
        ("refused", 2**70, 1.0, r"'user_id' holds 1180591620717411303424, which is outside int64"),
        ("refused", 1, 2**70, r"'amount' holds 1180591620717411303424, which is outside int64, and .* float64"),
        ("named", HALF, 1, r"'name' holds 'a\\ud800' \(str\) in row 0, which is not valid Unicode text"),
        ("named", "a", Decimal("NaN"), r"'price' holds Decimal\('NaN'\) \(Decimal\) in row 0, which is no number"),
        ("named", "a", Decimal("-Infinity"), r"'price' holds Decimal\('-Infinity'\) .* is no number"),
        ("named", "a", 10**36, r"'price' does not fit decimal\(38,2\): value 1000000\d* not in range"),
        ("named", "a", 10**40, r"'price' holds 10+\.*.* \(int\) in row 0, which is outside int64"),
    ],
)
def test_a_value_that_no_column_can_hold_is_named(store, write, view, key, value, said):
    with pytest.raises(InvalidInput, match=said):
        getattr(store, write)(view, [row_of(view, key, value)], now=NOW)


def test_values_of_different_types_are_both_named(store):
    rows = [row_of("refused", 1, None), row_of("refused", 2, 1.5), row_of("refused", 3, "x")]
    with pytest.raises(
        InvalidInput, match=r"'amount' .* different types: 1.5 \(float\) in row 1, 'x' \(str\) in row 2"
    ):
        store.push("refused", rows, now=NOW)


def test_an_integer_beyond_int64_fits_a_decimal_that_has_the_digits(store):
    store.push("named", [row_of("named", "wide", 2**70)], now=NOW)
    assert store.get_online_features(["named:price"], {"name": ["wide"]}).to_dict()["price"] == [Decimal(2**70)]


def test_a_key_that_is_no_text_is_refused_when_read(store):
    with pytest.raises(InvalidInput, match=r"entity key 'name': 'a\\ud800' \(str\) is not valid Unicode text"):
        store.get_online_features(["named:price"], {"name": [HALF]}).to_dict()
    frame = pd.DataFrame({"name": pd.Series([HALF], dtype=object), "event_timestamp": [NOW]})
    with pytest.raises(InvalidInput, match=r"'name' holds 'a\\ud800' \(str\) in row 0"):
        store.get_historical_features(frame, ["named:price"])


def test_a_window_may_be_a_timedelta():
    lengths = [datetime.timedelta(hours=1), datetime.timedelta(days=14)]
    assert Aggregation("amount", ["sum"], lengths) == Aggregation("amount", ["sum"], ["1h", "14d"])


def test_no_rows_are_no_commit_and_hide_no_statistics(store):
    store.ingest("refused", [{"user_id": 1, "event_timestamp": NOW, "amount": 1.0}], now=NOW)
    version = store.offline.snapshot("refused").version
    empty = pd.DataFrame({"user_id": [], "event_timestamp": [], "amount": []})
    for nothing in ([], empty, iter([])):
        report = store.ingest("refused", nothing, now=NOW)
        assert (report.rows, report.version) == (0, version)
    assert store.offline.snapshot("refused").version == version
    assert store.offline.statistics("refused")["amount"]["count"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["get", "refused:amount", "--entities", "x"], "--entities is not JSON"),
        (["get", "refused:amount", "--entities", "7"], "must be an object of columns"),
        (["push", "refused", "--data", "[]"], "no rows"),
        (["push", "refused", "--data", '{"user_id": 1, "event_timestamp": "noon", "amount": 1}'], "ISO 8601"),
        (["flush", "refusd"], "did you mean 'refused'"),
        (["materialize", "refused", "--start", "noon"], "ISO time"),
        (["materialize", "refused", "--window", "7x"], "not a duration"),
        (["lineage", "refusd"], "refusd"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(store, monkeypatch, arguments, said):
    for name, value in store.settings.to_environ().items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code and said in f"{result.output}{result.exception}"


def test_entities_may_be_rows_on_the_command_line(store, monkeypatch):
    for name, value in store.settings.to_environ().items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(command, ["get", "refused:amount", "--entities", '[{"user_id": 404}]', "--json"])
    assert '"NOT_FOUND"' in result.output
    shown = CliRunner().invoke(command, ["lineage", "refused"])
    assert "entity:user_id" in shown.output
