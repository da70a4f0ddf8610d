"""Rows as JSON has them: on the command line, over HTTP, from streams."""

from __future__ import annotations

import datetime
import decimal
import json

import pytest
from fastapi.testclient import TestClient

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore import Entity, FeatureView
from mlfuncs_featurestore.json_rows import read_row
from mlfuncs_featurestore.online_server import make_app
from mlfuncs_featurestore.stream import consume

UTC = datetime.UTC
FIELDS = {
    "price": "decimal(10,2)",
    "day": "date",
    "seen": "timestamp",
    "raw": "bytes",
    "place": "struct<lat:float64,at:timestamp>",
    "prices": "list<decimal(5,1)>",
}
VIEW = FeatureView("trips", [Entity("k", "bytes")], FIELDS, online=True, buckets=2, source="redis-stream:trips")
WHEN = "2024-05-01T12:00:00Z"
ROW = {
    "k": "AAE=", "event_timestamp": WHEN, "price": "1.50", "day": "2024-01-31", "seen": "2024-05-01T14:00:00+02:00",
    "raw": "/w==", "place": {"lat": 1, "at": WHEN}, "prices": [0.1, None],
}  # fmt: skip
MOMENT = datetime.datetime(2024, 5, 1, 12, tzinfo=UTC)
VALUES = {
    "price": decimal.Decimal("1.50"),
    "day": datetime.date(2024, 1, 31),
    "seen": MOMENT,
    "raw": b"\xff",
    "place": {"lat": 1.0, "at": MOMENT},
    "prices": [decimal.Decimal("0.1"), None],
}


def test_text_becomes_what_the_types_say():
    assert read_row(VIEW, ROW) == {"k": b"\x00\x01", "event_timestamp": MOMENT, **VALUES}
    assert read_row(VIEW, {"other": "x", "price": None}) == {"other": "x", "price": None}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("price", "1.505", "more digits than decimal"),
        ("price", "123456789.5", "does not fit"),
        ("price", "much", "does not fit"),
        ("day", "1st of May", "ISO 8601"),
        ("raw", "not base64!", "base64"),
        ("seen", "now", "ISO 8601"),
    ],
)
def test_text_that_is_none_of_these_is_named(name, value, reason):
    with pytest.raises(InvalidInput, match=f"{name!r}.*{reason}") as caught:
        read_row(VIEW, {name: value})
    assert caught.value.fields[0]["field"] == name


@pytest.mark.parametrize("way", ["http", "stream"])
def test_every_type_comes_in_over_http_and_from_a_stream(online_store, way):
    online_store.apply(VIEW)
    if way == "http":
        with TestClient(make_app(online_store)) as client:
            body = {"push_source_name": "trips", "df": {name: [value] for name, value in ROW.items()}}
            assert client.post("/push", json=body).json()["rows"] == 1
    else:
        online_store.online.client.xadd("trips", {"row": json.dumps(ROW)})
        assert consume(online_store, "trips").rows == 1
    found = online_store.get_online_features("trips", {"k": [b"\x00\x01"]}).to_dict()
    assert {name: found[name][0] for name in VALUES} == VALUES
