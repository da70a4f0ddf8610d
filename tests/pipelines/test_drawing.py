"""What is shown of a run: graph, Gantt, steps, differences, and what is printed while it goes on."""

import io
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from kfp import dsl

import mlfuncs as ml
from mlfuncs_pipelines.display import LineObserver
from mlfuncs_pipelines.drawing import COLOURS, graph_svg
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord

sys.path.append(str(Path(__file__).parent))
import own_steps as steps


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path_factory.getbasetemp() / "drawing-home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")


@ml.pipeline(name="drawn")
def drawn(n: int = 2):
    """A loop, a condition and a join."""
    with dsl.ParallelFor([1, 2]) as item:
        one = steps.add(item)
    top = steps.best(dsl.Collected(one.output)) if False else steps.add(n)
    with dsl.If(top.output > 100):
        steps.half(1.0)
    return steps.half(top.output)


def test_graph_has_every_task_before_and_after_a_run() -> None:
    before = ET.fromstring(graph_svg(drawn.ir))
    assert len(before.findall(".//{*}path")) == 2  # add-2 to half-2 and to the condition
    done = drawn.run()
    page = done._repr_html_()
    svg = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    texts = " ".join(text.text or "" for text in svg.findall(".//{*}text"))
    assert "add" in texts and "half-2" in texts and "skipped" in texts
    assert COLOURS["succeeded"] in page and COLOURS["skipped"] in page
    links = {link.get("href") for link in svg.findall(".//{*}a")}
    assert all(f'id="{link[1:]}"' in page for link in links if link)


def test_gantt_has_a_bar_per_step() -> None:
    done = drawn.run()
    bars = ET.fromstring(done.gantt()).findall(".//{*}rect")
    assert len(bars) == sum(not step.is_group and bool(step.started) for step in done.steps.values())


def test_names_and_logs_are_escaped_in_pages(tmp_path: Path) -> None:
    from mlfuncs_pipelines.drawing import steps_html

    (tmp_path / "log").write_text("<script>alert(1)</script>")
    record = StepRecord("a<b>", "a", "failed", log=str(tmp_path / "log"), reason="<i>", traceback="<u>")
    run = PipelineRun("r", "p", "failed", {}, tmp_path, 0.0, steps={"a<b>": record})
    page = steps_html(run)
    assert "<script>" not in page and "<i>" not in page and "<u>" not in page


def test_two_runs_are_compared() -> None:
    first, second = drawn.run(n=2), drawn.run(n=3)
    rows = {(row["step"], row["what"]): (row["first"], row["second"]) for row in first.compare(second)}
    assert rows["run", "parameter n"] == (2, 3) or rows["run", "parameter n"] == (None, 3)
    assert rows["add-2", "output Output"] == (4, 5)


def test_lines_name_the_step_and_hold_back_half_lines() -> None:
    stream = io.StringIO()
    observer = LineObserver(stream)
    record = StepRecord("train", "train", "running")
    observer.step_logged(record, "epoch 1\nepo")
    observer.step_logged(record, "ch 2\nlast")
    record.status = "succeeded"
    observer.step_changed(PipelineRun("r", "p", "running", {}, Path(), 0.0), record)
    assert stream.getvalue().splitlines()[:3] == ["[train] epoch 1", "[train] epoch 2", "[train] last"]


def test_terminal_tree_renders_every_state(tmp_path: Path) -> None:
    from rich.console import Console

    from mlfuncs_pipelines.display import TreeObserver

    run = PipelineRun("r", "p", "running", {}, tmp_path, 0.0)
    for state in ("running", "succeeded", "failed", "skipped", "cancelled"):
        run.steps[state] = StepRecord(f"step-{state}", state, state, started=1.0)
    observer = TreeObserver()
    observer._run = run
    console = Console(file=io.StringIO(), width=200)
    console.print(observer._render())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"step-{state}" in text for state in run.steps) and "4 of 5" in text
