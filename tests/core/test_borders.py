"""Every type at the JSON border: read from a body, written as a result, described by a schema."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import jsonschema
import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.figure import Figure
from pydantic import BaseModel
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression

from mlfuncs.errors import InvalidInput, SignatureError
from mlfuncs.interface.borders import adapt, python_only
from mlfuncs.interface.signature import Signature
from mlfuncs.results import HTML, ClassificationMetrics, Markdown, Metrics

matplotlib.use("agg")
PARIS_WINTER = datetime.timezone(datetime.timedelta(hours=1))


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Model(BaseModel):
    n: int
    when: datetime.datetime | None = None


@dataclasses.dataclass
class Node:
    value: int
    next: Node | None = None


@dataclasses.dataclass
class Dataset:
    frame: pd.DataFrame
    weights: np.ndarray
    name: str = "train"
    size: int = dataclasses.field(default=0, init=False)


class Split(NamedTuple):
    train: list[int]
    test: list[int] = []  # noqa: RUF012


class Named(TypedDict):
    frame: pd.DataFrame
    k: int


class Custom:
    pass


def taking(annotation: Any) -> Signature:
    def take(x: Any, y: int = 0) -> None: ...

    take.__annotations__["x"] = annotation
    return Signature.of(take)


def giving(annotation: Any) -> Signature:
    def give() -> Any: ...

    give.__annotations__["return"] = annotation
    return Signature.of(give)


def read(annotation: Any, value: Any) -> Any:
    return taking(annotation).validate_json(json.dumps({"x": value}).encode())["x"]


def message(annotation: Any, value: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(annotation, value)
    return "; ".join(f"{entry['field']} {entry['message']}" for entry in caught.value.fields)


PLAIN: list[tuple[Any, Any, Any]] = [
    (int, 3, 3),
    (float, 3, 3.0),
    (str, "é\u2028", "é\u2028"),
    (bool, True, True),
    (list, [1, "a"], [1, "a"]),
    (dict, {"a": [1]}, {"a": [1]}),
    (dict[int, float], {"1": 2}, {1: 2.0}),
    (int | None, None, None),
    (Literal["a", "b"], "a", "a"),
    (Literal[1, 2], 2, 2),
    (Color, "red", Color.RED),
    (Level, 1, Level.LOW),
    (
        Model,
        {"n": 1, "when": "2024-01-01T00:00:00+01:00"},
        Model(n=1, when=datetime.datetime(2024, 1, 1, tzinfo=PARIS_WINTER)),
    ),
    (Node, {"value": 1, "next": {"value": 2, "next": None}}, Node(1, Node(2))),
    (datetime.datetime, "2024-01-01T00:00:00", datetime.datetime(2024, 1, 1)),
    (datetime.date, "2024-02-29", datetime.date(2024, 2, 29)),
    (datetime.timedelta, "PT1M", datetime.timedelta(minutes=1)),
    (uuid.UUID, "12345678-1234-5678-1234-567812345678", uuid.UUID(int=0x12345678123456781234567812345678)),
    (Decimal, "1.10", Decimal("1.10")),
    (Path, "data/x.csv", Path("data/x.csv")),
    (bytes, "//4=", b"\xff\xfe"),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[float, ...], [1, 2], (1.0, 2.0)),
    (set[int], [1, 2], {1, 2}),
    (Split, {"train": [1]}, Split([1])),
    (object, {"any": None}, {"any": None}),
]


@pytest.mark.parametrize(("annotation", "sent", "expected"), PLAIN, ids=[str(case[0]) for case in PLAIN])
class TestPlainTypes:
    def test_is_read(self, annotation: Any, sent: Any, expected: Any) -> None:
        taken = read(annotation, sent)
        assert taken == expected and type(taken) is type(expected)

    def test_is_written_so_that_it_reads_back(self, annotation: Any, sent: Any, expected: Any) -> None:
        assert read(annotation, json.loads(giving(annotation).dump_json(expected))) == expected

    def test_fits_its_own_schema(self, annotation: Any, sent: Any, expected: Any) -> None:
        jsonschema.validate({"x": sent}, taking(annotation).input_schema())
        jsonschema.validate(json.loads(giving(annotation).dump_json(expected)), giving(annotation).output_schema())

    def test_python_caller_hands_on_the_value(self, annotation: Any, sent: Any, expected: Any) -> None:
        assert taking(annotation).validate_python({"x": expected})["x"] is expected


def test_timezone_offset_is_kept() -> None:
    taken = read(datetime.datetime, "2024-01-01T12:00:00+05:30")
    assert taken.utcoffset() == datetime.timedelta(hours=5, minutes=30)
    assert giving(datetime.datetime).dump_json(taken) == b'"2024-01-01T12:00:00+05:30"'


@pytest.mark.parametrize(
    ("annotation", "sent"),
    [
        (Literal[1, 2], True),
        (Color, "green"),
        (Color, "RED"),
        (datetime.datetime, 1704067200),
        (datetime.datetime, "yesterday"),
        (bytes, "a"),
        (bytes, "ü"),
        (uuid.UUID, "x"),
        (Decimal, "one"),
        (tuple[int, str], [1]),
        (Level, True),
        (Split, [[1], [2]]),
        (Split, {"train": [1], "tset": []}),
        (np.float64, "1"),
        (np.int64, 1.5),
        (np.int64, True),
        (np.bool_, 1),
    ],
)
def test_wrong_values_are_refused(annotation: Any, sent: Any) -> None:
    assert message(annotation, sent).startswith("x")


class TestArrays:
    def test_reads_nested_lists_and_null_as_nan(self) -> None:
        np.testing.assert_array_equal(read(np.ndarray, [[1, 2], [3, None]]), np.array([[1, 2], [3, np.nan]]))
        assert read(np.ndarray, [1, 2]).dtype == np.int64
        assert read(npt.NDArray[np.str_], ["a", "b"]).tolist() == ["a", "b"]
        assert read(np.ndarray, []).shape == (0,)

    def test_typed_array_has_its_dtype(self) -> None:
        assert read(npt.NDArray[np.float32], [1, 2]).dtype == np.float32
        assert read(npt.NDArray[np.bool_], [True]).dtype == np.bool_
        assert read(npt.NDArray[np.floating], [1.5]).dtype == np.float64

    @pytest.mark.parametrize(
        ("annotation", "sent", "words"),
        [
            (np.ndarray, [1, True], "mixed types: boolean, integer"),
            (np.ndarray, [1, "a"], "mixed types: integer, string"),
            (np.ndarray, ["a", "b"], "numbers or booleans, not string"),
            (npt.NDArray[np.floating], ["a"], "numbers or booleans, not string"),
            (np.ndarray, [[1], [2, 3]], "should be an array"),
            (np.ndarray, [{"a": 1}], "object"),
            (np.ndarray, 3, "nested lists"),
            (np.ndarray, [2**70], "64 bits"),
            (np.ndarray, ["a", None], "null"),
            (npt.NDArray[np.int64], [1.5], "int64"),
            (npt.NDArray[np.int64], [None], "null"),
            (npt.NDArray[np.float64], [True], "float64, not boolean"),
            (npt.NDArray[np.int8], [300], "an array"),
        ],
    )
    def test_refuses(self, annotation: Any, sent: Any, words: str) -> None:
        assert words in message(annotation, sent)

    def test_python_array_of_another_dtype_is_refused_unless_the_cast_is_safe(self) -> None:
        signature = taking(npt.NDArray[np.float64])
        small = np.zeros(2, np.float32)
        assert signature.validate_python({"x": small})["x"] is small
        with pytest.raises(InvalidInput, match="not of complex128"):
            signature.validate_python({"x": np.zeros(2, complex)})
        with pytest.raises(InvalidInput, match="should be an array, not list"):
            signature.validate_python({"x": [1.0]})

    @given(arrays.arrays(st.sampled_from([np.float64, np.int64, np.bool_]), arrays.array_shapes(max_dims=3)))
    @settings(deadline=None)
    def test_comes_back_equal(self, value: Any) -> None:
        if value.dtype == np.float64:
            value = np.where(np.isinf(value), 0.0, value)
        written = json.loads(giving(np.ndarray).dump_json(value))
        assert np.shape(written) == value.shape
        if value.dtype == np.float64 and np.isnan(value).all():
            return  # nothing but nulls says nothing about a type
        np.testing.assert_array_equal(read(np.ndarray, written), value)

    def test_datetimes_are_written_as_iso_text(self) -> None:
        assert giving(np.ndarray).dump_json(np.array(["2024-01-01T00:00:00.000000001"], "M8[ns]")) == (
            b'["2024-01-01T00:00:00.000000001"]'
        )

    def test_scalars(self) -> None:
        assert type(read(np.float32, 1.5)) is np.float32
        assert giving(np.int64).dump_json(np.int64(2**53 + 1)) == b"9007199254740993"

    def test_array_inside_a_list_and_an_optional(self) -> None:
        assert read(list[np.ndarray], [[1, 2]])[0].tolist() == [1, 2]
        assert read(np.ndarray | None, None) is None
        assert read(dict[str, npt.NDArray[np.float64]], {"a": [1]})["a"].tolist() == [1.0]


class TestTables:
    COLUMNS = {"i": [1, None, 2**53 + 1], "f": [1.5, None, 2], "s": ["007", None, "nan"], "b": [True, None, False]}  # noqa: RUF012

    def test_pandas_keeps_integers_text_and_booleans_with_nulls(self) -> None:
        frame = read(pd.DataFrame, self.COLUMNS)
        assert frame["i"].tolist() == [1, pd.NA, 2**53 + 1]
        assert frame["f"].dtype == np.float64 and np.isnan(frame["f"][1])
        assert frame["s"].tolist()[0] == "007" and frame["s"].tolist()[2] == "nan"
        assert str(frame["b"].dtype) == "boolean"

    @pytest.mark.parametrize("annotation", [pd.DataFrame, pl.DataFrame, pa.Table])
    def test_columns_come_back_equal(self, annotation: Any) -> None:
        table = read(annotation, self.COLUMNS)
        assert isinstance(table, annotation)
        assert json.loads(giving(annotation).dump_json(table)) == self.COLUMNS

    @pytest.mark.parametrize("annotation", [pd.DataFrame, pl.DataFrame, pa.Table])
    def test_rows_are_read_too_and_an_absent_member_is_null(self, annotation: Any) -> None:
        table = read(annotation, [{"a": 1}, {"a": 2, "b": "x"}])
        assert json.loads(giving(annotation).dump_json(table)) == {"a": [1, 2], "b": [None, "x"]}

    @pytest.mark.parametrize("annotation", [pd.DataFrame, pl.DataFrame, pa.Table])
    @pytest.mark.parametrize("sent", [{"a": 1}, {"a": [1], "b": [1, 2]}, [1], "a"])
    def test_refuses_what_is_no_table(self, annotation: Any, sent: Any) -> None:
        assert message(annotation, sent).startswith("x should be a table")

    def test_mixed_column_stays_mixed_in_pandas(self) -> None:
        assert read(pd.DataFrame, {"a": [1, "x", None]})["a"].tolist() == [1, "x", None]

    def test_timestamps_are_written_as_iso_text_with_offset(self) -> None:
        frame = pd.DataFrame({"t": [pd.Timestamp("2024-01-01", tz="Europe/Paris"), pd.NaT]})
        assert giving(pd.DataFrame).dump_json(frame) == b'{"t":["2024-01-01T00:00:00+01:00",null]}'

    def test_series(self) -> None:
        assert read(pd.Series, [1, None]).tolist() == [1, pd.NA]
        assert giving(pd.Series).dump_json(pd.Series([1.0, None])) == b"[1.0,null]"

    def test_two_columns_of_one_name_are_refused(self) -> None:
        with pytest.raises(InvalidInput, match="two columns named 'a'"):
            giving(pd.DataFrame).dump_json(pd.DataFrame([[1, 2]], columns=["a", "a"]))

    def test_another_library_is_not_what_was_declared(self) -> None:
        with pytest.raises(InvalidInput, match=r"should be a table \(pandas\)"):
            giving(pd.DataFrame).dump_json(pl.DataFrame({"a": [1]}))


class TestRecords:
    def test_dataclass_with_a_table_inside(self) -> None:
        taken = read(Dataset, {"frame": {"a": [1]}, "weights": [0.5]})
        assert taken.frame["a"].tolist() == [1] and taken.name == "train"
        assert json.loads(giving(Dataset).dump_json(taken)) == {
            "frame": {"a": [1]},
            "weights": [0.5],
            "name": "train",
        }
        assert "x.weights is missing" in message(Dataset, {"frame": {}})
        assert "did you mean 'name'" in message(Dataset, {"frame": {}, "weights": [], "nmae": ""})

    def test_named_tuple_is_an_object(self) -> None:
        assert giving(Split).dump_json(Split([1], [2])) == b'{"train":[1],"test":[2]}'
        assert giving(Any).dump_json(Split([1], [2])) == b'{"train":[1],"test":[2]}'

    def test_typed_dict_with_a_table_inside(self) -> None:
        taken = read(Named, {"frame": {"a": [1]}, "k": 1})
        assert taken["frame"].shape == (1, 1)

    def test_schema_names_the_fields(self) -> None:
        schema = taking(Dataset).input_schema()
        assert set(schema["$defs"]["Dataset"]["properties"]) == {"frame", "weights", "name"}


class TestResults:
    def test_metrics_pages_and_figures_are_written(self) -> None:
        assert giving(Metrics).dump_json(Metrics(auc=0.5)) == b'{"auc":0.5}'
        assert giving(HTML).dump_json(HTML("<b>x</b>")) == b'"<b>x</b>"'
        assert giving(Markdown).dump_json(Markdown("# x")) == b'"# x"'
        assert giving(Figure).dump_json(Figure()).startswith(b'"data:image/png;base64,')
        assert giving(Any).dump_json({"m": Metrics(a=1), "h": HTML("x")}) == b'{"m":{"a":1},"h":"x"}'

    def test_metrics_are_read(self) -> None:
        assert read(Metrics, {"auc": 0.5}) == Metrics(auc=0.5)
        assert read(HTML, "x") == HTML("x")
        measured = ClassificationMetrics.from_predictions([0, 1], [0.2, 0.8])
        assert read(ClassificationMetrics, json.loads(giving(ClassificationMetrics).dump_json(measured))) == measured

    def test_unfinished_classification_metrics_are_refused(self) -> None:
        assert message(ClassificationMetrics, {"a": 1}).startswith("x")


class TestPythonOnly:
    @pytest.mark.parametrize("annotation", [LogisticRegression, BaseEstimator, Custom, list[Custom]])
    def test_http_refuses_with_what_to_do(self, annotation: Any) -> None:
        with pytest.raises(SignatureError, match=r"parameter 'x' of take: a \w+ .*bind it when deploying"):
            taking(annotation).validate_json(b'{"x": 1}')
        with pytest.raises(SignatureError, match="has no JSON form"):
            taking(annotation).input_schema()

    def test_python_callers_may_pass_it(self) -> None:
        model = LogisticRegression()
        assert taking(BaseEstimator).validate_python({"x": model})["x"] is model
        with pytest.raises(InvalidInput, match="x should be a LogisticRegression"):
            taking(LogisticRegression).validate_python({"x": "model"})

    def test_result_without_a_json_form_says_so(self) -> None:
        with pytest.raises(SignatureError, match="no JSON form"):
            giving(LogisticRegression).dump_json(LogisticRegression())
        with pytest.raises(SignatureError):
            giving(LogisticRegression).output_schema()

    def test_figure_cannot_be_sent(self) -> None:
        assert "no JSON form" in message(Figure, "data:")

    def test_borders_are_found_at_any_depth(self) -> None:
        assert [border.kind for border in python_only(adapt(dict[str, list[Custom] | None]))] == [Custom]
        assert python_only(adapt(list[np.ndarray])) == []
