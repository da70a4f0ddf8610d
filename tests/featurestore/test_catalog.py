"""Apply: idempotent, planned, all or nothing, and it refuses what would corrupt."""

from __future__ import annotations

import pytest

from mlfuncs.errors import Conflict, NotFound
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureService, FeatureStore, FeatureView

USER = Entity("user_id", "int64")


@pytest.fixture
def store(tmp_path):
    return FeatureStore(Settings(home=tmp_path, project="shop"))


def view(**changes):
    options = {"entities": [USER], "fields": {"amount": "float32", "merchant": "string"}, "owner": "ann"}
    return FeatureView("spend", **{**options, **changes})


def test_applying_twice_changes_nothing(store):
    first = store.apply([view()])
    assert [(change.kind, change.action) for change in first.changes] == [("entity", "create"), ("view", "create")]
    assert "+ amount: float32" in str(first) and "<table>" in first._repr_html_()
    again = store.apply([view()])
    assert again.is_empty and store.catalog.version("view", "spend") == 1
    assert store.catalog.view("spend") == view()


def test_a_dry_run_shows_the_plan_and_records_nothing(store):
    assert not store.apply(view(), dry_run=True).is_empty
    with pytest.raises(NotFound):
        store.catalog.view("spend")


def test_fields_may_be_added_widened_and_deprecated(store):
    store.apply(view())
    wider = view(fields={"amount": "float64", "merchant": "string", "city": "string"}, deprecated=["merchant"])
    plan = str(store.apply(wider))
    assert "~ amount: float32 -> float64 (widened)" in plan and "+ city: string" in plan
    store.apply(view(fields={"amount": "float64", "city": "string"}))  # merchant was deprecated, so it may go
    assert store.catalog.version("view", "spend") == 3
    assert list(store.catalog.earlier_fields("spend")[0]) == ["amount", "merchant", "city"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fields": {"amount": "int32", "merchant": "string"}}, "cannot become int32"),
        ({"fields": {"amount": "float32"}}, "deprecate it first"),
        ({"entities": [Entity("user", "int64")]}, "its key is"),
        ({"entities": [USER, Entity("shop")]}, "its key is"),
        ({"timestamp": "at"}, "timestamp is"),
        ({"created_timestamp": "created"}, "created_timestamp is"),
        ({"buckets": 3}, "buckets is"),
    ],
)
def test_a_change_that_would_corrupt_is_refused_and_nothing_is_recorded(store, changes, reason):
    store.apply(view())
    with pytest.raises(Conflict, match=reason):
        store.apply([view(**changes), FeatureView("other", entities=[USER], fields={"x": "int64"})])
    assert store.catalog.view("spend") == view()
    with pytest.raises(NotFound):
        store.catalog.view("other")


def test_a_field_that_comes_back_keeps_the_type_that_is_stored(store):
    store.apply(view(deprecated=["merchant"]))
    store.apply(view(fields={"amount": "float32"}))
    with pytest.raises(Conflict, match="stored as string"):
        store.apply(view(fields={"amount": "float32", "merchant": "int64"}))


def test_a_key_of_another_type_is_refused(store):
    store.apply(view())
    with pytest.raises(Conflict, match="its keys are"):
        store.apply(view(entities=[Entity("user_id", "string")]))


def test_services_are_versioned_and_must_name_features_that_exist(store):
    store.apply([view(), FeatureService("churn", ["spend:amount"])])
    store.apply(FeatureService("churn", ["spend:amount", "spend:merchant"]))
    assert store.catalog.service("churn").features == ("spend:amount", "spend:merchant")
    assert store.catalog.service("churn@1").features == ("spend:amount",)
    with pytest.raises(NotFound, match="did you mean 'amount'"):
        store.apply(FeatureService("churn", ["spend:amuont"]))


def test_a_feature_that_a_service_uses_cannot_vanish(store):
    with_sums = view(aggregations=[Aggregation("amount", ["sum"], windows=["1h"])])
    store.apply([with_sums, FeatureService("churn", ["spend:amount_sum_1h"])])
    with pytest.raises(NotFound, match="service 'churn' uses it"):
        store.apply(view())
    with pytest.raises(Conflict, match="used by churn"):
        store.catalog.delete("view", "spend")


def test_projects_do_not_see_each_other(store, tmp_path):
    store.apply(view())
    with pytest.raises(NotFound):
        FeatureStore(Settings(home=tmp_path, project="bank")).catalog.view("spend")


def test_features_are_found_by_text_tag_and_owner(store):
    store.apply([view(tags={"team": "risk"}, description="card payments"), FeatureService("s", ["spend:amount"])])
    names = [row["feature"] for row in store.catalog.search("PAYMENTS")]
    assert names == ["spend:amount", "spend:merchant"]
    assert len(store.catalog.search(tag="team=risk", owner="ann")) == 2
    assert store.catalog.search(tag="team=other") == [] and store.catalog.search(owner="bob") == []
    lineage = store.catalog.lineage("spend")
    assert lineage == {"upstream": ["entity:user_id"], "downstream": ["service:s"]}
