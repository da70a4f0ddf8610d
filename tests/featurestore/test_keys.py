"""The entity-key codec: canonical, reversible, exact."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.keys import decode_key, encode_key, encode_keys

VALUES = {
    "int64": st.integers(-(2**63), 2**63 - 1),
    "string": st.text(),
    "uuid": st.uuids().map(str),
    "bytes": st.binary(),
}
KEYS = st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3).map(
    lambda kinds: {f"k{i}": kind for i, kind in enumerate(kinds)}
)


def entity(keys):
    return st.fixed_dictionaries({name: VALUES[kind] for name, kind in keys.items()})


@settings(max_examples=60, deadline=None)
@given(KEYS.flatmap(lambda keys: st.tuples(st.just(keys), entity(keys), entity(keys))))
def test_keys_come_back_and_different_entities_have_different_bytes(case):
    keys, one, other = case
    assert decode_key(encode_key(one, keys), keys) == one
    assert (encode_key(one, keys) == encode_key(other, keys)) == (one == other)
    columns = {name: [one[name], other[name]] for name in keys}
    assert encode_keys(columns, keys) == [encode_key(one, keys), encode_key(other, keys)]


@pytest.mark.parametrize("value", [7, np.int8(7), np.int64(7), np.uint16(7), 7.0, np.float64(7)])
def test_one_integer_has_one_spelling_whatever_carries_it(value):
    assert encode_key({"k": value}, {"k": "int64"}) == b"i7"


def test_a_uuid_has_one_spelling_whatever_carries_it():
    one = uuid.uuid4()
    spellings = [one, str(one), str(one).upper(), one.hex, one.bytes]
    assert len({encode_key({"k": spelling}, {"k": "uuid"}) for spelling in spellings}) == 1


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("int64", None, "is null"),
        ("int64", float("nan"), "is null"),
        ("int64", True, "not a whole number"),
        ("int64", "7", "not a whole number"),
        ("int64", 1.5, "not a whole number"),
        ("int64", float(2**53), "lost digits"),
        ("int64", 2**63, "outside int64"),
        ("string", 7, "never made of a number"),
        ("string", None, "is null"),
        ("uuid", "x", "not a UUID"),
        ("bytes", "x", "not bytes"),
    ],
)
def test_a_value_that_is_no_such_key_is_refused_with_the_reason(kind, value, reason):
    with pytest.raises(InvalidInput, match=reason) as caught:
        encode_key({"k": value}, {"k": kind})
    assert caught.value.fields[0]["field"] == "k"


def test_a_missing_key_column_is_named():
    with pytest.raises(InvalidInput, match="'b' is missing"):
        encode_keys({"a": [1]}, {"a": "int64", "b": "string"})
