"""Metrics and pages: numbers against scikit-learn, how they show in a notebook."""

from __future__ import annotations

import json
import pickle
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from sklearn import metrics as reference

from mlfuncs.errors import InvalidInput
from mlfuncs.results import HTML, ClassificationMetrics, FigureImage, Markdown, Metrics, draw, preview_html

matplotlib.use("agg")


@st.composite
def binary_cases(draw: Any) -> tuple[Any, Any]:
    n = draw(st.integers(2, 60))
    y = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda v: 0 < sum(v) < len(v)))
    levels = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1)
    return np.array(y), np.array(draw(st.lists(levels, min_size=n, max_size=n)))


def curve(measured: ClassificationMetrics) -> tuple[Any, Any, Any]:
    thresholds, fpr, tpr = zip(*measured.roc, strict=True)
    return np.array(thresholds), np.array(fpr), np.array(tpr)


class TestBinary:
    @given(binary_cases())
    @settings(max_examples=40, deadline=None)
    def test_confusion_matrix_and_area_are_scikit_learns(self, case: Any) -> None:
        y, score = case
        measured = ClassificationMetrics.from_predictions(y, score)
        expected = reference.confusion_matrix(y, score >= 0.5, labels=[0, 1])
        assert np.array(measured.confusion_matrix).tolist() == expected.tolist()
        assert measured.auc == pytest.approx(reference.roc_auc_score(y, score))
        assert measured.accuracy == pytest.approx(reference.accuracy_score(y, score >= 0.5))

    @given(binary_cases())
    @settings(max_examples=40, deadline=None)
    def test_curve_is_scikit_learns_and_each_threshold_gives_its_rates(self, case: Any) -> None:
        y, score = case
        measured = ClassificationMetrics.from_predictions(y, score)
        thresholds, fpr, tpr = curve(measured)
        their_fpr, their_tpr, _ = reference.roc_curve(y, score, drop_intermediate=False)
        theirs = set(zip(their_fpr.round(9), their_tpr.round(9), strict=True))
        assert set(zip(fpr.round(9), tpr.round(9), strict=True)) <= theirs
        assert np.trapezoid(tpr, fpr) == pytest.approx(measured.auc)  # only points on straight lines were left out
        for threshold, f, t in zip(thresholds, fpr, tpr, strict=True):
            assert t == pytest.approx((score[y == 1] >= threshold).mean())
            assert f == pytest.approx((score[y == 0] >= threshold).mean())

    def test_long_curve_is_thinned_and_its_area_is_of_the_whole(self) -> None:
        rng = np.random.default_rng(0)
        y = rng.integers(0, 2, 20_000)
        score = rng.normal(size=20_000) + y
        measured = ClassificationMetrics.from_predictions(y, score, threshold=0.0)
        _, fpr, tpr = curve(measured)
        assert len(fpr) <= 200
        assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
        assert measured.auc == pytest.approx(reference.roc_auc_score(y, score))
        assert np.trapezoid(tpr, fpr) == pytest.approx(measured.auc, abs=1e-3)

    def test_two_columns_of_probabilities_are_the_second_class(self) -> None:
        y, score = [0, 1, 1], np.array([0.2, 0.7, 0.4])
        both = ClassificationMetrics.from_predictions(y, np.column_stack([1 - score, score]))
        assert both == ClassificationMetrics.from_predictions(y, score)

    def test_labels_name_and_order_the_classes(self) -> None:
        measured = ClassificationMetrics.from_predictions(["spam", "ham", "spam"], [0.9, 0.2, 0.3], ["ham", "spam"])
        assert measured.labels == ("ham", "spam") and measured.confusion_matrix == ((1, 0), (1, 1))

    def test_one_class_only_has_no_curve_and_no_area(self) -> None:
        measured = ClassificationMetrics.from_predictions([1, 1], [0.2, 0.9], labels=[0, 1])
        assert measured.roc == () and measured.auc is None
        assert measured.confusion_matrix == ((0, 0), (1, 1))

    def test_thresholds_are_finite_so_that_json_has_them(self) -> None:
        measured = ClassificationMetrics.from_predictions([0, 1], [0.5, 0.5])
        assert all(np.isfinite(point.threshold) for point in measured.roc)
        json.dumps(measured.to_dict(), allow_nan=False)


class TestManyClasses:
    @given(st.integers(3, 5), st.integers(0, 2**32 - 1))
    @settings(max_examples=20, deadline=None)
    def test_confusion_and_micro_average_are_scikit_learns(self, k: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        y = np.append(np.arange(k), rng.integers(0, k, 40))
        score = rng.dirichlet(np.ones(k), len(y))
        measured = ClassificationMetrics.from_predictions(y, score)
        assert np.array(measured.confusion_matrix).tolist() == reference.confusion_matrix(y, score.argmax(1)).tolist()
        assert measured.auc == pytest.approx(
            reference.roc_auc_score(np.eye(k)[y], score, average="micro", multi_class="ovr")
        )

    def test_predicted_classes_give_a_matrix_without_a_curve(self) -> None:
        measured = ClassificationMetrics.from_predictions(["a", "b", "c"], ["a", "c", "d"])
        assert measured.labels == ("a", "b", "c", "d") and measured.roc == ()
        assert measured.confusion_matrix[1] == (0, 0, 1, 0) and measured.accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("y", "score", "labels", "words"),
    [
        ([0, 1], [0.1], None, "2 rows of y"),
        ([], [], None, "one class per row"),
        ([0, 1], [0.1, float("nan")], None, "score has a value that is NaN or infinite at row 1"),
        ([0.0, float("inf")], [0.1, 0.2], None, "y has a value"),
        ([0, 1, 2], [0.1, 0.2, 0.3], None, "needs two classes, and 3 are known"),
        ([1, 1], [0.1, 0.2], None, "give labels="),
        ([0, 2], [0.1, 0.2], [0, 1], "y has the class 2, which is not among the labels"),
        ([0, 1], [[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]], None, "3 columns for 2 classes"),
        ([0, 1], [0.1, 0.2], [0, 0], "name a class twice"),
        ([[0], [1]], [0.1, 0.2], None, "shape"),
    ],
)
def test_bad_predictions_are_refused(y: Any, score: Any, labels: Any, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ClassificationMetrics.from_predictions(y, score, labels)
    assert words in str(caught.value)


def test_metadata_is_what_kubeflow_logs_itself() -> None:
    dsl = pytest.importorskip("kfp.dsl")
    y, score = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])
    measured = ClassificationMetrics.from_predictions(y, score)
    theirs = dsl.ClassificationMetrics(name="m", uri="u", metadata={})
    thresholds, fpr, tpr = curve(measured)
    theirs.log_roc_curve(fpr.tolist(), tpr.tolist(), thresholds.tolist())
    theirs.log_confusion_matrix(list(measured.labels), [list(row) for row in measured.confusion_matrix])
    ours = {key: value for key, value in measured.to_dict().items() if key != "auc"}
    assert ours == theirs.metadata


def test_classification_metrics_come_back_from_their_dict() -> None:
    measured = ClassificationMetrics.from_predictions([0, 1, 1], [0.2, 0.7, 0.4])
    assert ClassificationMetrics.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def test_metrics_take_numpy_numbers_and_refuse_others() -> None:
    metrics = Metrics({"a": np.float32(0.5)}, b=np.int64(2))
    assert metrics == {"a": 0.5, "b": 2} and type(metrics["b"]) is int
    assert pickle.loads(pickle.dumps(metrics)) == metrics
    for wrong in (True, "0.9", None, [1]):
        with pytest.raises(InvalidInput, match="metric 'x' should be a number"):
            Metrics(x=wrong)


class TestDisplay:
    def test_metrics_show_as_a_table_with_names_escaped(self) -> None:
        assert "<th>a&lt;b</th><td>0.123457</td>" in Metrics({"a<b": 0.1234567})._repr_html_()

    def test_classification_metrics_draw_matrix_and_curve(self) -> None:
        shown = ClassificationMetrics.from_predictions(["<x>", "y"], [0.2, 0.9])._repr_html_()
        ElementTree.fromstring(shown)
        assert "&lt;x&gt;" in shown and "<polyline" in shown and "AUC 1.0000" in shown

    def test_no_curve_draws_no_svg(self) -> None:
        assert "<svg" not in ClassificationMetrics.from_predictions([0, 1], [0, 1])._repr_html_()

    def test_markdown_is_rendered_and_html_in_it_is_text(self) -> None:
        shown = Markdown("# Title\n\n|a|\n|-|\n|1|\n\n<script>alert(1)</script>")._repr_html_()
        assert "<h1>Title</h1>" in shown and "<table>" in shown and "<script>" not in shown

    def test_html_is_shown_as_it_is(self) -> None:
        assert HTML("<b>x</b>")._repr_html_() == "<b>x</b>"

    def test_figure_is_drawn_the_same_each_time(self) -> None:
        def make() -> Figure:
            figure = Figure(figsize=(2, 1))
            figure.subplots().plot([1, 2])
            return figure

        image = draw(make())
        assert image == draw(make()) and image.size[0] > image.size[1] > 0
        assert image._repr_html_().startswith('<img src="data:image/png;base64,')

    def test_figure_saves_its_file(self, tmp_path: Any) -> None:
        image = draw(Figure(figsize=(1, 1)))
        image.save(tmp_path / "f.png")
        assert FigureImage((tmp_path / "f.png").read_bytes()) == image

    def test_preview_falls_back_to_an_escaped_cut_repr(self) -> None:
        assert preview_html("<" * 10_000).count("&lt;") < 2001
        assert preview_html(Metrics(a=1)).startswith("<table>")
        assert preview_html(Metrics) == "<pre>&lt;class &#x27;mlfuncs.results.Metrics&#x27;&gt;</pre>"
