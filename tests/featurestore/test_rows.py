"""The packed-row codec: round trip of every type, and absent, null and NaN kept apart."""

from __future__ import annotations

import datetime
import decimal
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.rows import ABSENT, NULL, PRESENT, RowCodec, Stamp, read_stamp
from mlfuncs_featurestore.tables import cast_column
from mlfuncs_featurestore.types import parse_type

UTC = datetime.UTC
VALUES = {
    "bool": st.booleans(),
    "int8": st.integers(-128, 127),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float32": st.floats(width=32),
    "float64": st.floats(),
    "string": st.text(),
    "bytes": st.binary(),
    "timestamp": st.datetimes(timezones=st.just(UTC)),
    "date": st.dates(),
    "decimal(10,2)": st.decimals(-99999999, 99999999, places=2),
    "list<int64>": st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)),
    "list<string>": st.lists(st.none() | st.text()),
    "vector<float32,3>": st.lists(st.floats(width=32), min_size=3, max_size=3),
    "struct<a:int64,b:list<string>>": st.fixed_dictionaries(
        {"a": st.none() | st.integers(0, 9), "b": st.none() | st.lists(st.text())}
    ),
}
FIELDS = {f"f{i}": parse_type(kind) for i, kind in enumerate(VALUES)}
STRATEGIES = dict(zip(FIELDS, VALUES.values(), strict=True))
STAMPS = st.builds(Stamp, *[st.integers(-(2**63), 2**63 - 1)] * 3)


@st.composite
def rows(draw):
    names = draw(st.sets(st.sampled_from(sorted(FIELDS))))
    return {name: draw(st.none() | STRATEGIES[name]) for name in names}


def same(one, other):
    if isinstance(one, float) and isinstance(other, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


@settings(max_examples=60, deadline=None)
@given(rows(), STAMPS)
def test_a_row_comes_back_whole(values, stamp):
    codec = RowCodec(FIELDS)
    packed = codec.encode(values, stamp)
    assert read_stamp(packed) == stamp
    got_stamp, got = codec.decode(packed)
    assert got_stamp == stamp and got.keys() == values.keys()
    assert all(same(got[name], value) for name, value in values.items())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.tuples(rows(), STAMPS), max_size=5))
def test_columns_say_what_the_rows_say_one_by_one(batch):
    codec = RowCodec(FIELDS)
    packed = [None if one is None else codec.encode(*one) for one in batch]
    columns = codec.decode_columns(packed)
    for index, one in enumerate(batch):
        assert columns.found[index] == (one is not None)
        for name, kind in FIELDS.items():
            state = columns.states[name][index]
            if one is None or name not in one[0]:
                assert state == ABSENT
            elif one[0][name] is None:
                assert state == NULL
            else:
                assert state == PRESENT
                if kind.kind not in ("timestamp", "date"):
                    got = columns.values[name][index]
                    got = got.tolist() if isinstance(got, (np.ndarray, np.generic)) else got
                    assert same(got, one[0][name])


def test_nan_null_and_absent_are_three_things():
    codec = RowCodec({"x": parse_type("float64")})
    packed = [codec.encode(values, Stamp(0, 0, 0)) for values in ({"x": math.nan}, {"x": None}, {})]
    columns = codec.decode_columns(packed)
    assert columns.states["x"].tolist() == [PRESENT, NULL, ABSENT]
    assert math.isnan(columns.values["x"][0])


def test_a_deleted_row_is_not_found():
    codec = RowCodec({"x": parse_type("float64")})
    columns = codec.decode_columns([codec.encode({"x": 1.0}, Stamp(1, 1, 1, deleted=True))])
    assert not columns.found[0] and columns.states["x"][0] == ABSENT


def test_rows_of_an_older_layout_are_widened_and_new_fields_are_absent():
    before = {"x": parse_type("int32"), "at": parse_type("timestamp")}
    after = {"x": parse_type("int64"), "at": parse_type("timestamp"), "new": parse_type("string")}
    moment = datetime.datetime(2024, 1, 1, tzinfo=UTC)
    old_row = RowCodec(before).encode({"x": 7, "at": moment}, Stamp(5, 6, 7))
    new_row = RowCodec(after).encode({"x": 2**53 + 1, "at": None, "new": ""}, Stamp(8, 9, 10))
    columns = RowCodec(after, older=[before]).decode_columns([old_row, None, new_row])
    assert columns.values["x"][0] == 7 and columns.values["x"][2] == 2**53 + 1
    assert columns.values["at"][0] == int(moment.timestamp()) * 10**6
    assert columns.states["new"].tolist() == [ABSENT, ABSENT, PRESENT]
    assert columns.event_us.tolist()[0] == 5 and columns.found.tolist() == [True, False, True]


def test_a_row_of_an_unknown_layout_is_refused():
    row = RowCodec({"x": parse_type("int32")}).encode({"x": 1}, Stamp(0, 0, 0))
    with pytest.raises(InvalidInput, match="unknown layout"):
        RowCodec({"y": parse_type("int32")}).decode(row)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int8", 128),
        ("int64", 1.5),
        ("int64", True),
        ("float64", "1"),
        ("bool", 1),
        ("string", 7),
        ("timestamp", "2024"),
        ("decimal(5,2)", decimal.Decimal("1.005")),
        ("decimal(5,2)", decimal.Decimal("1000")),
        ("vector<float32,2>", [1.0]),
        ("vector<float32,2>", [1.0, None]),
    ],
)
def test_a_value_of_another_type_is_refused_and_named(kind, value):
    with pytest.raises(InvalidInput, match="'x'") as caught:
        RowCodec({"x": parse_type(kind)}).encode({"x": value}, Stamp(0, 0, 0))
    assert caught.value.fields[0]["field"] == "x"


@pytest.mark.parametrize(("kind", "largest"), [("float32", 2**24), ("float64", 2**53)])
def test_integers_that_a_float_would_round_are_refused_by_name(kind, largest):
    codec = RowCodec({"x": parse_type(kind), "many": parse_type(f"vector<{kind},1>")})
    stamp = Stamp(0, 0, 0)
    for value in (largest, -largest):
        assert codec.decode(codec.encode({"x": value, "many": [value]}, stamp))[1] == {"x": value, "many": [value]}
        beyond = value + (1 if value > 0 else -1)
        for fields in ({"x": beyond}, {"many": [beyond]}):
            with pytest.raises(InvalidInput, match=f"{beyond}.*beyond {largest} would be rounded"):
                codec.encode(fields, stamp)
        column = pa.array([1, beyond, None])
        with pytest.raises(InvalidInput, match=f"Integer value {beyond} not in range"):
            cast_column("x", column, parse_type(kind))
        assert cast_column("x", column.cast(pa.float64(), safe=False), parse_type(kind)).null_count == 1
