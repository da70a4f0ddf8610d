"""Frames for training and for serving hold the same values of the same types, to the last digit."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest

from mlfuncs_featurestore import Entity, FeatureView

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, tzinfo=UTC)
BIG = 2**53 + 1
FIELDS = {
    "numbers": "list<int64>",
    "names": "list<string>",
    "place": "struct<a:int64,at:timestamp,more:list<int64>>",
    "vector": "vector<int64,2>",
    "plain": "int64",
}
ROWS = [
    {
        "user_id": 1,
        "event_timestamp": NOW,
        "numbers": [BIG, None],
        "names": ["a", None],
        "place": {"a": BIG, "at": NOW, "more": [BIG, None]},
        "vector": [BIG, -BIG],
        "plain": BIG,
    },
    {
        "user_id": 2,
        "event_timestamp": NOW,
        "numbers": [BIG],
        "names": [],
        "place": {"a": None, "at": None, "more": None},
        "vector": [0, 1],
        "plain": 0,
    },
    {"user_id": 3, "event_timestamp": NOW},
]


@pytest.fixture(scope="module")
def frames(shared_store):
    """The rows as a training set and as they are served."""
    shared_store.apply(FeatureView("frames", [Entity("user_id", "int64")], FIELDS, online=True))
    shared_store.push("frames", ROWS, now=NOW)
    spine = pa.table({"user_id": [1, 2, 3], "event_timestamp": pa.array([NOW] * 3)})
    trained = shared_store.get_historical_features(spine, "frames").to_pandas()
    served = shared_store.get_online_features(
        [f"frames:{name}" for name in FIELDS], {"user_id": [1, 2, 3]}, now=NOW
    ).to_pandas()
    return {"trained": trained, "served": served}


def typed(value):
    """A value with the types of all that is in it, to be compared."""
    if isinstance(value, dict):
        return {name: typed(one) for name, one in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return str(getattr(value, "dtype", "list")), [typed(one) for one in value]
    return type(value), value


@pytest.mark.parametrize("side", ["trained", "served"])
@pytest.mark.parametrize("name", ["numbers", "names", "place"])
def test_what_is_in_lists_and_structs_is_what_was_written(frames, side, name):
    values = frames[side][name].to_list()
    assert [typed(one) for one in values[:2]] == [typed(row[name]) for row in ROWS[:2]]
    assert values[2] is None


@pytest.mark.parametrize("side", ["trained", "served"])
def test_a_vector_is_an_array_of_its_type_also_beside_null(frames, side):
    first, second, third = frames[side]["vector"]
    assert first.dtype == second.dtype == np.int64 and third is None
    assert first.tolist() == [BIG, -BIG] and second.tolist() == [0, 1]


def test_training_and_serving_have_the_same_types(frames):
    assert frames["trained"][list(FIELDS)].dtypes.to_dict() == frames["served"][list(FIELDS)].dtypes.to_dict()


def test_columns_of_an_arrow_spine_lose_no_digit_either(shared_store, frames):
    spine = pa.table(
        {
            "user_id": [1, 2],
            "event_timestamp": pa.array([NOW] * 2),
            "label": [BIG, None],
            "clicks": [[BIG, None], [BIG]],
        }
    )
    frame = shared_store.get_historical_features(spine, ["frames:plain"]).to_pandas()
    assert frame["label"][0] == BIG and str(frame["label"].dtype) == "Int64"
    assert [typed(one) for one in frame["clicks"]] == [typed([BIG, None]), typed([BIG])]
