"""Sweeps: which points, which is best, and what one bad point does to the others."""

import math
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlfuncs as ml
from mlfuncs.errors import InvalidInput, NotFound, RunFailed, SpecError
from mlfuncs.runs.objective import Objective, plot_values
from mlfuncs.runs.search import LogUniform, grid_points, random_points


@ml.function
def score(a: int, b: float = 1.0) -> float:
    ml.log_metric("auc", a * b)
    return a * b


@ml.function
def sometimes(a: int) -> float:
    if a == 2:
        raise ValueError("two")
    if a == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(a)


class Scores(NamedTuple):
    loss: float
    name: str


class TestPoints:
    def test_a_grid_is_every_combination_with_the_last_name_fastest(self):
        points = grid_points({"a": [1, 2], "b": ["x", "y"]})
        assert points == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]

    def test_a_single_value_in_a_grid_is_refused(self):
        with pytest.raises(SpecError, match=r"'a'.*must be a list"):
            grid_points({"a": "text"})
        with pytest.raises(SpecError, match="must be a list"):
            grid_points({"a": 3})

    def test_the_same_seed_draws_the_same_points(self):
        space = {"rate": LogUniform(1e-5, 1e-1), "depth": (2, 9), "share": (0.0, 1.0), "kind": ["a", "b"]}
        assert random_points(space, 20, 7) == random_points(space, 20, 7) != random_points(space, 20, 8)

    @given(st.integers(-50, 50), st.integers(0, 50), st.integers(0, 2**32))
    def test_draws_stay_within_their_bounds(self, low, width, seed):
        space = {"i": (low, low + width), "f": (float(low), float(low + width)), "l": LogUniform(0.001, 1 + width)}
        for point in random_points(space, 5, seed):
            assert type(point["i"]) is int and low <= point["i"] <= low + width
            assert type(point["f"]) is float and low <= point["f"] <= low + width
            assert 0.001 * (1 - 1e-9) <= point["l"] <= (1 + width) * (1 + 1e-9)

    def test_scipy_distributions_are_drawn_as_plain_numbers(self):
        from scipy.stats import randint, uniform

        points = random_points({"a": uniform(0, 2), "b": randint(1, 4)}, 10, 3)
        assert points == random_points({"a": uniform(0, 2), "b": randint(1, 4)}, 10, 3)
        assert all(type(p["a"]) is float and type(p["b"]) is int for p in points)

    @pytest.mark.parametrize("bad", ["text", 3, (), (3, 1), [], (1, 2, 3), ("a", "b")])
    def test_what_is_no_distribution_is_refused_by_name(self, bad):
        with pytest.raises(SpecError, match="random\\['rate'\\]"):
            random_points({"rate": bad}, 1, 0)

    def test_bounds_of_a_logarithm_are_above_zero(self):
        with pytest.raises(SpecError, match="0 < low"):
            LogUniform(0, 1)


class TestObjective:
    @pytest.mark.parametrize("text", ["auc", "best:auc", "max:", "max", ""])
    def test_other_text_is_refused(self, text):
        with pytest.raises(SpecError, match="max:<metric>"):
            Objective.parse(text)

    def test_not_a_number_is_never_best(self):
        goal = Objective.parse("max:x")
        assert goal.best_of({0: math.nan, 1: 0.1, 2: 0.3, 3: 0.3, 4: math.nan}) == 2
        assert Objective.parse("min:x").best_of({0: 0.3, 1: 0.1}) == 1
        assert goal.best_of({0: math.nan}) is None and goal.best_of({}) is None

    def test_it_is_a_metric_or_a_returned_number(self):
        goal = Objective.parse("max:auc")
        assert goal.value({"auc": 0.5}, {"output": 9.0}) == 0.5
        assert goal.value({}, {"output": 0.7}) == 0.7
        assert goal.value({}, {"output": {"auc": 0.6, "n": 3}}) == 0.6
        assert goal.value({}, {"auc": 0.4, "model": object()}) == 0.4
        with pytest.raises(InvalidInput, match="no metric is named 'auc'; the run has acc, loss"):
            goal.value({"loss": 1.0, "acc": 2.0}, {"output": True})

    def test_the_plot_escapes_and_leaves_out_what_is_no_number(self):
        plot = plot_values([1.0, None, math.nan, 3.0], 3, "max:<x>")
        assert plot.count("<circle") == 2 and "&lt;x&gt;" in plot
        assert plot_values([None], None, "x") == ""
        assert plot_values([2.0], 0, "x").count("<circle") == 1


class TestSweep:
    def test_the_best_of_a_grid_is_found_in_other_processes(self):
        result = score.sweep(grid={"a": [1, 2, 3], "b": [0.5, 1.5]}, objective="max:auc", parallel=2, progress=False)
        assert [run.params["a"] for run in result.runs] == [1, 1, 2, 2, 3, 3]
        assert result.best.params == {"a": 3, "b": 1.5}
        assert result.values == (0.5, 1.5, 1.0, 3.0, 1.5, 4.5)
        assert result.run.status == "succeeded" and result.run.row.kind == "sweep"
        assert result.run.outputs == {"best_run": result.best.id, "best_params": {"a": 3, "b": 1.5}}
        assert {run.id for run in result.run.children()} == {run.id for run in result.runs}
        frame = result.to_pandas()
        assert frame["auc"].tolist() == [0.5, 1.5, 1.0, 3.0, 1.5, 4.5] and frame["a"].tolist() == [1, 1, 2, 2, 3, 3]
        html = result._repr_html_()
        assert "<svg" in html and "max:auc" in html and "a=3, b=1.5" in html

    def test_a_point_that_raises_or_dies_does_not_stop_the_others(self):
        result = sometimes.sweep(grid={"a": [1, 2, 3, 4]}, objective="min:x", parallel=1, progress=False)
        assert [run.status for run in result.runs] == ["succeeded", "failed", "failed", "succeeded"]
        assert "ValueError: two" in result.runs[1].error and "SIGKILL" in result.runs[2].error
        assert result.values == (1.0, None, None, 4.0)
        assert result.best.params == {"a": 1}

    def test_when_every_point_fails_it_says_why(self):
        with pytest.raises(RunFailed, match="ValueError: two"):
            sometimes.sweep(list=[{"a": 2}, {"a": 2}], objective="max:x", parallel=2, progress=False)
        (parent,) = [run for run in ml.list_runs() if run.row.kind == "sweep"]
        assert parent.status == "failed"

    def test_a_wrong_objective_stops_at_the_first_run_and_names_the_known(self):
        with pytest.raises(InvalidInput, match="no metric is named 'f1'; the run has auc"):
            score.sweep(grid={"a": list(range(50))}, objective="max:f1", parallel=1, progress=False)
        assert len([run for run in ml.list_runs() if run.row.kind == "run"]) < 10

    def test_points_are_checked_before_anything_runs(self):
        with pytest.raises(InvalidInput, match=r"point 2 of the sweep \(a=x\)"):
            score.sweep(list=[{"a": 1}, {"a": "x"}], progress=False)
        assert ml.list_runs() == []

    @pytest.mark.parametrize(
        "options", [{}, {"grid": {"a": [1]}, "list": [{"a": 1}]}, {"list": []}, {"grid": {"a": []}}]
    )
    def test_points_come_from_exactly_one_source(self, options):
        with pytest.raises(SpecError):
            score.sweep(**options)

    def test_without_an_objective_there_is_no_best(self):
        result = score.sweep(list=[{"a": 1}], progress=False)
        with pytest.raises(NotFound, match="objective="):
            _ = result.best
        assert result.runs[0].output == 1.0

    def test_good_enough_leaves_the_rest_out(self):
        options = {"grid": {"a": list(range(40))}, "objective": "max:auc", "parallel": 1, "progress": False}
        result = score.sweep(**options, stop_early=3.0)
        assert len(result.runs) == 4 and result.best.metrics["auc"] == 3.0
        result = score.sweep(**options, stop_early=lambda values: len(values) >= 3)
        assert len(result.runs) == 3

    def test_a_metric_named_like_a_parameter_has_a_column_of_its_own(self):
        @ml.function
        def fit(x: int, status: int) -> float:
            ml.log_metric("x", x * 10)
            ml.log_metric("took", 5)
            return float(x)

        frame = fit.sweep(
            list=[{"x": 1, "status": 7}, {"x": 2, "status": 8}], objective="max:x", parallel=1, progress=False
        ).to_pandas()
        assert [*frame.columns] == ["run", "status", "took", "x", "param.status", "metric.took", "metric.x"]
        assert frame["x"].tolist() == [1, 2] and frame["metric.x"].tolist() == [10.0, 20.0]

    def test_an_argument_among_the_options_is_pointed_to_params(self):
        with pytest.raises(SpecError, match="stop_early looks at the objective"):
            score.sweep(grid={"a": [1]}, stop_early=1.0)
        with pytest.raises(SpecError, match="no option 'paralel'; did you mean 'parallel'"):
            score.sweep(grid={"a": [1]}, paralel=2)
        with pytest.raises(SpecError, match=r"no option 'b'.*params=\{'b': ...\}"):
            score.sweep(grid={"a": [1]}, b=2.0)

    def test_shared_tables_are_stored_once_and_every_point_gets_them(self, settings):
        @ml.function
        def fit(frame: pd.DataFrame, k: int) -> float:
            return float(frame["x"].sum() * k)

        frame = pd.DataFrame({"x": np.arange(1000.0)})
        result = fit.sweep(
            grid={"k": [1, 2, 3]}, params={"frame": frame}, objective="max:k", parallel=2, progress=False
        )
        assert result.best.output == 3 * 499500.0
        assert len({run.versions["data"]["frame"] for run in result.runs}) == 1

    def test_it_works_after_this_process_ran_an_openmp_kernel(self):
        from sklearn.datasets import make_classification
        from sklearn.ensemble import HistGradientBoostingClassifier

        data, target = make_classification(200, random_state=0)
        HistGradientBoostingClassifier(max_iter=3).fit(data, target)  # an OpenMP kernel

        @ml.function
        def fit(depth: int) -> float:
            from sklearn.datasets import make_classification
            from sklearn.ensemble import HistGradientBoostingClassifier

            data, target = make_classification(200, random_state=0)
            model = HistGradientBoostingClassifier(max_iter=3, max_depth=depth).fit(data, target)
            return float(model.score(data, target))

        result = fit.sweep(grid={"depth": [3]}, objective="max:accuracy", parallel=1, progress=False)
        assert all(0.5 < value <= 1 for value in result.values)

    def test_a_named_output_may_be_the_objective(self):
        def fit(x: int) -> Scores:
            return Scores(loss=float(-x), name="m")

        result = ml.Function(fit, ml.function(fit).spec).sweep(
            list=[{"x": 1}, {"x": 2}], objective="min:loss", parallel=1, progress=False
        )
        assert result.best.params == {"x": 2}

    def test_the_bar_shows_the_best_so_far(self, capfd):
        score.sweep(grid={"a": [1, 2]}, objective="max:auc", parallel=1)
        assert "best auc=2 (a=2)" in capfd.readouterr().err


INTERRUPTED = """
import time, mlfuncs as ml
@ml.function
def slow(a: int) -> float:
    print("begun", flush=True)
    if a > 1:
        time.sleep(600)
    return 1.0
slow.sweep(grid={"a": [1, 2, 3, 4, 5]}, objective="max:x", parallel=2)
"""


def test_ctrl_c_cancels_what_runs_and_marks_it(tmp_path):
    (tmp_path / "sweeping.py").write_text(INTERRUPTED)
    process = subprocess.Popen([sys.executable, "sweeping.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while sum(run.logs == "begun\n" for run in ml.list_runs()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in shown
    runs = ml.list_runs()
    assert [run.status for run in runs if run.row.kind == "sweep"] == ["cancelled"]
    assert sorted(run.status for run in runs if run.row.kind == "run") == ["cancelled", "cancelled", "succeeded"]
