"""Definitions are right once they exist, have a JSON form, and load no table library."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from mlfuncs.errors import SpecError
from mlfuncs_featurestore import Aggregation, Entity, Expectation, FeatureService, FeatureView, feature_view, on_demand
from mlfuncs_featurestore.definitions import definition_from_dict
from mlfuncs_featurestore.types import SCALARS, parse_type
from mlfuncs_featurestore.views import KEY_TYPES

USER = Entity("user_id", "int64")


def view(**changes):
    options = {
        "entities": [USER],
        "fields": {"amount": "float64", "merchant": "string", "embedding": "vector<float32,4>"},
        "aggregations": [Aggregation("amount", ["sum", "mean"], windows=["1h", "24h"])],
        "ttl": "30d",
    }
    return FeatureView("spend", **{**options, **changes})


def test_every_definition_comes_back_from_json_with_sorted_keys():
    @feature_view(entities=[USER], fields={"z": "int64", "a": list[str]}, source="data/*.parquet")
    def clean(frame):
        return frame

    @on_demand(sources=["spend:amount"], request={"z": float, "a": int}, fields={"share": "float64"})
    def share(amount, z, a):
        return {"share": amount / z}

    card = Entity("card", keys={"number": "int64", "bank": "string", "token": uuid.UUID, "raw": bytes})
    expectations = [Expectation("amount", minimum=0, maximum=1.5, one_of=[1, 2], action="warn")]
    service = FeatureService("churn", [view(), "other:x"], tags={"team": "a"})
    for one in (USER, card, view(expectations=expectations), clean, share, service):
        text = json.dumps(one.to_dict(), sort_keys=True)
        again = definition_from_dict(one.kind, json.loads(text))
        assert again == one and again.digest == one.digest
        assert list(getattr(again, "fields", {})) == list(getattr(one, "fields", {}))


def test_a_view_names_its_features_stored_and_computed():
    assert list(view().features) == [
        "amount",
        "merchant",
        "embedding",
        "amount_sum_1h",
        "amount_mean_1h",
        "amount_sum_24h",
        "amount_mean_24h",
    ]
    assert view().ttl_us == 30 * 86400 * 10**6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"entities": []}, "needs entities"),
        ({"fields": {}}, "no fields"),
        ({"fields": {"x": "flaot64"}}, "not a feature type"),
        ({"fields": {"x": "uint64"}}, "next wider signed"),
        ({"fields": {"__x": "int64"}}, "not valid"),
        ({"fields": {"user_id": "int64"}, "aggregations": []}, "twice"),
        ({"ttl": "soon"}, "not a duration"),
        ({"deprecated": ["nothing"]}, "not one of its fields"),
        ({"deprecated": "amount"}, "must be a list"),
        ({"aggregations": [Aggregation("merchant", ["sum"], windows=["1h"])]}, "needs numbers"),
        ({"aggregations": [Aggregation("amuont", ["sum"], windows=["1h"])]}, "did you mean 'amount'"),
        ({"aggregations": [Aggregation("amount", ["sum"], windows=["1h"])] * 2}, "two features named"),
        ({"expectations": [Expectation("nothing", not_null=True)]}, "does not have"),
        ({"event_id": "nothing"}, "one of its fields"),
        ({"fields": {"amount": "float64", "ids": "list<string>"}, "event_id": "ids"}, "known by one value"),
        ({"source": "somewhere"}, "is not known"),
        ({"buckets": 0}, "1 to 4096"),
    ],
)
def test_a_view_that_cannot_be_right_is_refused_with_the_reason(changes, reason):
    with pytest.raises(SpecError, match=reason):
        view(**changes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Entity("a b"),
        lambda: Entity("user", "float64"),
        lambda: Aggregation("x", ["median"], windows=["1h"]),
        lambda: Aggregation("x", "sum", windows=["1h"]),
        lambda: Aggregation("x", ["sum"], windows=["24h", "1d"]),
        lambda: Expectation("x"),
        lambda: Expectation("x", regex="("),
        lambda: Expectation("x", not_null=True, action="ignore"),
        lambda: FeatureService("s", []),
    ],
)
def test_parts_that_cannot_be_right_are_refused(make):
    with pytest.raises(SpecError):
        make()


def test_defining_views_loads_no_table_library():
    code = (
        "import sys, mlfuncs_featurestore as fs\n"
        "fs.FeatureView('v', entities=[fs.Entity('k', int)], fields={'x': float}); fs.FeatureStore\n"
        "heavy = ('pandas', 'pyarrow', 'numba', 'deltalake', 'numpy', 'redis', 'polars')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environ(), check=True)
    assert done.stdout.strip() == "[]"


def _environ():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_the_page_lists_every_type_of_features_and_keys():
    page = (Path(__file__).parents[2] / "docs" / "featurestore.md").read_text()
    types, keys = page.split("## Types")[1].split("\n## ")[0].split("| Key type")
    listed = [re.findall(r"`([^`]+)`", line.split(" | ")[0]) for line in types.splitlines() if line.startswith("| `")]
    spelled = [one.replace("<T", "<int64").replace(",n>", ",3>") for row in listed for one in row]
    assert {parse_type(one).kind for one in spelled} == {*SCALARS, "decimal", "list", "vector", "struct"}
    assert re.findall(r"^\| `(\w+)`", keys, re.MULTILINE) == list(KEY_TYPES)
