"""Conditions and selectors go through CEL, with kfp's spelling of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs_pipelines.conditions import evaluate, referenced, repair_quotes, select

X = "inputs.parameter_values['x']"


@pytest.mark.parametrize(
    ("condition", "value", "answer"),
    [
        (f"{X} == 'it\\'s'", "it's", True),
        (f"{X} == 'it's'", "it's", True),  # as the kfp compiler writes it
        (f"!({X} == 'it's') && {X} == 'b'", "b", True),
        (f"!({X} == 'it's')", "it's", False),
        (f"int({X}) > 2", 3, True),
        (f"int({X}) == 9007199254740993", 9007199254740993, True),
        (f"{X} > 0.25", 1, True),
        (f"{X} == 3.0", 3, True),
        (f"{X} > 2", 2.5, True),
        (f"{X} == double(1)", 1.0, True),
        (f"{X} == true", True, True),
        (f"{X} == 'a'", 3, False),
        (f"{X} == 'a'", None, False),
        (f"{X}.a[0] == 1", {"a": [1]}, True),
        (f"'a' in {X}", ["a"], True),
        (f"{X} == '__import__(\"os\").abort()'", '__import__("os").abort()', True),
    ],
)
def test_condition_holds(condition: str, value: object, answer: bool) -> None:
    assert evaluate(condition, {"x": value}) is answer


@given(st.text(alphabet=st.characters(blacklist_characters="\n\r\x00", blacklist_categories=("Cs",)), max_size=8))
def test_any_text_equals_itself_however_it_is_quoted(text: str) -> None:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    assert evaluate(f"{X} == '{escaped}'", {"x": text})


@pytest.mark.parametrize("text", ["it's", "'", "a'b'c", "''", 'say "hi"', "it's && that's"])
def test_repairs_the_quotes_that_kfp_does_not_escape(text: str) -> None:
    assert evaluate(repair_quotes(f"{X} == '{text}'"), {"x": text})


@pytest.mark.parametrize("condition", [f"{X} > 'a'", f"{X} + 1", "inputs.parameter_values['z'] > 1"])
def test_condition_without_an_answer_names_the_values(condition: str) -> None:
    with pytest.raises(InvalidInput, match="x=3"):
        evaluate(condition, {"x": 3})


def test_text_that_is_no_cel_is_refused() -> None:
    with pytest.raises(SpecError, match="not a CEL expression"):
        evaluate("x = 1", {"x": 1})


def test_names_the_parameters_it_reads() -> None:
    assert referenced(f"!({X} == 'a') && inputs.parameter_values[\"y\"] == 1") == {"x", "y"}


@pytest.mark.parametrize(
    ("selector", "value", "picked"),
    [
        ('parseJson(string_value)["a"]', {"a": 1}, 1),
        ('parseJson(string_value)["a"][0]', {"a": [5.5]}, 5.5),
        ('parseJson(string_value)["a"]', '{"a": "x"}', "x"),
        ("struct_value.a", {"a": 5}, 5),
        ("string_value", "q", "q"),
        ("parseJson(string_value).a", {"a": {"b": [1, 2.5]}}, {"b": [1, 2.5]}),
    ],
)
def test_selector_picks_part_of_a_value(selector: str, value: object, picked: object) -> None:
    assert select(selector, value) == picked


def test_selector_that_finds_nothing_says_so() -> None:
    with pytest.raises(InvalidInput, match="finds nothing"):
        select('parseJson(string_value)["b"]', {"a": 1})
