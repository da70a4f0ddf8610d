"""Numbers are stored as they are or refused by name: none becomes inf, none is refused for its Python type alone."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal

import pyarrow as pa
import pytest

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore import Entity, FeatureView
from mlfuncs_featurestore.tables import cast_column
from mlfuncs_featurestore.types import parse_type

NOW = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC)
FIELDS = {"small": "float32", "vector": "vector<float32,3>", "price": "decimal(8,2)", "prices": "list<decimal(8,2)>"}


@pytest.fixture(scope="module")
def store(shared_store):
    shared_store.apply(FeatureView("ranges", [Entity("user_id", "int64")], FIELDS, online=True))
    return shared_store


def row(**values):
    return {"user_id": 1, "event_timestamp": NOW, **dict.fromkeys(FIELDS), **values}


@pytest.mark.parametrize("write", ["push", "ingest"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"small": 1e300}, r"'small' does not fit float32: value 1e\+300 not in range"),
        ({"vector": [0.0, -1e300, 0.0]}, r"'vector' does not fit vector<float32,3>: value -1e\+300 not in range"),
        ({"small": 2**24 + 1}, r"'small' does not fit float32: Integer value 16777217 "),
        (
            {"vector": [0, 2**24 + 1, 0]},
            r"'vector' does not fit vector<float32,3>: Integer value 16777217 not in range",
        ),
        ({"price": 1_000_000}, r"'price' does not fit decimal\(8,2\): value 1000000 not in range: -999999 to 999999"),
        ({"prices": [1, -1_000_000]}, r"'prices' does not fit list<decimal\(8,2\)>: value -1000000 not in range"),
    ],
)
def test_a_number_out_of_range_is_refused_and_named(store, write, values, said):
    with pytest.raises(InvalidInput, match=said):
        getattr(store, write)("ranges", [row(**values)], now=NOW)


def test_inf_is_a_float32_and_integers_are_decimals(store):
    given = row(small=math.inf, vector=[math.inf, 0.0, -math.inf], price=3, prices=[-999_999, None])
    store.push("ranges", [given], now=NOW)
    expected = {
        "small": math.inf,
        "vector": [math.inf, 0.0, -math.inf],
        "price": Decimal("3.00"),
        "prices": [Decimal("-999999.00"), None],
    }
    served = store.get_online_features([f"ranges:{name}" for name in FIELDS], {"user_id": [1]}, now=NOW).to_dict()
    spine = pa.table({"user_id": [1], "event_timestamp": pa.array([NOW])})
    trained = store.get_historical_features(spine, "ranges").to_arrow()
    for name, value in expected.items():
        assert served[name] == [value] and trained[name].to_pylist() == [value]


@pytest.mark.parametrize(
    ("values", "arrow", "kind"),
    [
        ([2**63 - 1, -(2**63), None], "int64", "decimal(38,19)"),
        ([2**64 - 1], "uint64", "decimal(20,0)"),
        ([0], "int8", "decimal(38,38)"),
        ([[9, None], None], "list<int64>", "list<decimal(3,2)>"),
    ],
)
def test_integers_that_fit_a_decimal_are_exact(values, arrow, kind):
    have = pa.uint64() if arrow == "uint64" else parse_type(arrow).arrow
    column = pa.chunked_array([pa.array(values, have)] * 2)
    assert cast_column("x", column, parse_type(kind)).to_pylist() == values * 2


def test_a_struct_is_looked_into_and_may_lack_a_member():
    given = pa.array([{"a": 5, "b": None}, None])
    kind = parse_type("struct<a:decimal(3,1),b:list<float32>>")
    assert cast_column("x", given, kind).to_pylist() == [{"a": Decimal("5.0"), "b": None}, None]
    with pytest.raises(InvalidInput, match="value 100 not in range: -99 to 99"):
        cast_column("x", pa.array([{"a": 100, "b": [1.0]}]), kind)
