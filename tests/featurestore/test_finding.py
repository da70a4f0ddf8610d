"""Features are found with how their values lie, and lineage reaches from the view to the model."""

from __future__ import annotations

import datetime

import pandas as pd
from sklearn.linear_model import LinearRegression

import mlfuncs as ml
from mlfuncs.registry import open_registry
from mlfuncs.settings import read_settings
from mlfuncs_featurestore import Entity, FeatureService, FeatureStore, FeatureView
from mlfuncs_featurestore.finding import sparkline

NOW = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC)


def filled(settings):
    store = FeatureStore(settings)
    fields = {"amount": "float64", "note": "string"}
    view = FeatureView("spend", entities=[Entity("k", int)], fields=fields, owner="ann")
    store.apply([view, FeatureService("churn", ["spend:amount"])])
    rows = {"k": range(100), "event_timestamp": [NOW] * 100, "amount": range(100), "note": ["<b>"] * 50 + [None] * 50}
    store.ingest("spend", pd.DataFrame(rows).astype({"amount": float}), now=NOW)
    return store


def train() -> LinearRegression:
    """Trains on features inside a run."""
    store = FeatureStore(read_settings())
    spine = pd.DataFrame({"k": [1, 2], "event_timestamp": [NOW, NOW]})
    amounts = store.get_historical_features(spine, "churn").to_pandas()["amount"]
    return LinearRegression().fit(spine[["k"]], amounts)


def test_the_table_of_features_shows_types_owners_and_a_sparkline(tmp_path):
    store = filled(ml.Settings(home=tmp_path, project="shop"))
    table = store.search("spend")
    assert [row["feature"] for row in table.rows] == ["spend:amount", "spend:note"]
    assert table.rows[0]["median"] == 49.5 and table.rows[1]["nulls"] == "50 %"
    assert "<svg" in table._repr_html_() and "█" in str(table) and "ann" in str(table)
    assert len(store.search(owner="bob")) == 0


def test_a_sparkline_has_a_bar_per_bin():
    assert sparkline([0, 5, 10]).html.count("<rect") == 3
    assert sparkline([]).text == ""


def test_lineage_reaches_the_run_that_trained_on_a_view_and_the_function_that_is_served_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path))
    monkeypatch.setenv("MLFUNCS_PROJECT", "shop")
    store = filled(read_settings())
    run = ml.function(train).run()
    assert run.params["features.spend"] == 1
    registry = open_registry(store.settings)
    registry.functions.record("score", "d" * 64, {"spec": {"features": ["churn"]}})
    registry.endpoints.add_revision("score-live", "d" * 64, {})
    downstream = store.catalog.lineage("spend")["downstream"]
    assert downstream == [
        "service:churn",
        "function:score",
        "endpoint:score-live",
        f"run:{run.id}",
        f"model:{run.id}/output",
    ]
