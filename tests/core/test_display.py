"""Tables and cards: escaped in HTML, readable in a terminal."""

import math
import re

import pandas as pd
import pytest

import mlfuncs as ml
from mlfuncs.display import (
    Markup,
    Table,
    card_html,
    fold_html,
    format_bytes,
    format_duration,
    format_value,
    render_text,
    state_markup,
    table_html,
)

EVIL = "<script>alert('x')</script>"


def test_every_place_of_a_table_is_escaped():
    html = table_html([{EVIL: EVIL}], [EVIL], caption=EVIL)
    assert "<script>" not in html
    assert html.count("&lt;script&gt;") == 3


def test_cards_and_folds_are_escaped():
    assert "<script>" not in card_html(EVIL, EVIL, {EVIL: EVIL}) + fold_html(EVIL, EVIL)


def test_only_markup_passes_as_it_is():
    assert "<b>x</b>" in table_html([{"a": Markup("<b>x</b>", "x")}], ["a"])


def test_a_known_state_is_shown_in_its_colour():
    assert "#cf222e" in table_html([{"status": "failed"}], ["status"])
    assert state_markup("failed").text == "failed"


def test_a_missing_value_is_an_empty_cell_and_zero_is_not():
    html = table_html([{"a": 0}], ["a", "b"])
    assert ">0</td>" in html and "></td>" in html


def test_the_head_of_a_column_of_numbers_stands_above_them():
    html = table_html([{"auc": None, "name": "a"}, {"auc": 0.5, "name": "b"}], ["auc", "name"])
    styles = dict(re.findall(r'<th style="[^"]*text-align:(\w+)[^"]*">(\w+)</th>', html))
    assert styles == {"right": "auc", "left": "name"}


def test_a_card_without_a_state_has_no_dot():
    assert "&#9679;" in card_html("a", "ready", {}) and "&#9679;" not in card_html("a", "", {})


def test_the_card_of_a_function_shows_what_was_set_and_nothing_else():
    @ml.function(scale=ml.Scale(min=1, max=2), requirements=["numpy"])
    def fit(x: int) -> int:
        return x

    html = fit._repr_html_()
    assert "min=1, max=2<" in html and "window_s" not in html and "numpy" in html


def test_the_outputs_of_a_run_stand_one_below_the_other():
    run = ml.run(lambda: {"table": pd.DataFrame({"a": [1, 2]}), "auc": 0.5})
    html = run._repr_html_()
    assert all(f">{cell}</td>" in html for cell in ("table", "parquet", "DataFrame", "auc", "0.5"))
    assert "&lt;artifact" not in html
    assert ">rows</td>" in run.outputs["table"]._repr_html_()


def test_the_best_cells_stand_out():
    html = table_html([{"auc": 0.5}, {"auc": 0.9}], ["auc"], best={(1, "auc")})
    assert html.count("font-weight:700") == 1
    assert html.index("0.5") < html.index("font-weight:700") < html.index("0.9")


def test_a_table_prints_its_columns_and_rows():
    text = str(Table(("name", "auc"), ({"name": "a", "auc": 0.123456789}, {"name": "b"})))
    assert "name" in text and "0.123457" in text and "None" not in text


def test_rich_markup_in_a_value_is_not_interpreted():
    assert "[red]x[/red]" in str(Table(("a",), ({"a": "[red]x[/red]"},)))


def test_a_table_becomes_a_frame_with_values_as_they_are():
    frame = Table(("a", "b"), ({"a": 1, "b": "x"}, {"a": 2})).to_pandas()
    assert frame["a"].tolist() == [1, 2]
    assert frame["b"].tolist()[0] == "x" and frame["b"].isna().tolist() == [False, True]


def test_an_empty_table_keeps_its_columns():
    table = Table(("a", "b"), ())
    assert list(table.to_pandas().columns) == ["a", "b"]
    assert len(table) == 0 and "<th" in table._repr_html_()


def test_a_folded_text_without_text_is_nothing():
    assert fold_html("log", "") == ""


def test_rendering_fits_the_width_it_is_given():
    table = Table(("a",), ({"a": "word " * 60},))
    assert all(len(line) <= 40 for line in render_text(table, width=40).splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, None),
        (0, "0 ms"),
        (0.5, "500 ms"),
        (0.9999, "1 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (3600, "1 h 0 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(None, None), (0, "0 B"), (1023, "1023 B"), (2**30, "1.0 GiB")])
def test_sizes_are_in_binary_units(size, text):
    assert format_bytes(size) == text


def test_values_are_short_text():
    assert format_value(math.nan) == "nan"
    assert format_value(True) == "True"
    assert len(format_value("x" * 1000)) == 200


def test_a_function_shows_its_signature_and_what_was_declared():
    @ml.function(timeout_s=5, secrets=["DB_PASSWORD"], requirements=[])
    def predict(x: list[float]) -> float:
        """Add <all> up."""
        return sum(x)

    class Shown:
        def _repr_html_(self):
            raise AssertionError("the instance's, not the function's")

        def __call__(self): ...

    text = predict._repr_html_()
    for part in ("predict(x: list[float])", "timeout_s", "DB_PASSWORD", "Add &lt;all&gt; up.", "none"):
        assert part in text.replace("&#x27;", "")
    assert "retries" not in text
    assert "class" in ml.function(Shown)._repr_html_()
