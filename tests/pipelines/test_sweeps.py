"""A sweep as a pipeline: on the local engine and, the very same IR, on Kubeflow."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

import mlfuncs as ml
from mlfuncs.errors import InvalidInput, RunFailed, SpecError
from mlfuncs.settings import Settings, read_settings
from mlfuncs.signing import project_key
from mlfuncs_pipelines import sweeps
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.runner import run_pipeline

sys.path.append(str(Path(__file__).parent))
from kubeflow_api import Api


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")


class Trained(NamedTuple):
    model: pd.DataFrame
    auc: float


@ml.function
def train(depth: int, data: pd.DataFrame) -> Trained:
    print("depth", depth)
    ml.log_metric("loss", 1 / depth)
    return Trained(data * depth, depth / 10)


@ml.function(retries=1)
def sometimes(a: int, marks: str) -> float:
    with open(f"{marks}/{a}", "a") as file:
        file.write("x")
    print("at", a, flush=True)
    ml.log_metric("x", a)
    if a == 2:
        raise ValueError("two")
    if a == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(a)


def test_the_result_is_that_of_processes() -> None:
    data = pd.DataFrame({"x": [1, 2]})
    given = {"grid": {"depth": [1, 2, 3]}, "params": {"data": data}, "objective": "max:auc", "parallel": 2}
    there = train.sweep(**given, target="pipeline", progress=False)
    here = train.sweep(**given, progress=False)
    assert there.table().columns == here.table().columns
    shown = ["status", "depth", "auc", "loss"]
    assert there.to_pandas()[shown].equals(here.to_pandas()[shown])
    assert there.best.params["depth"] == 3 and there.best.outputs["model"].load().equals(data * 3)
    assert [run.logs for run in there.runs] == ["depth 1\n", "depth 2\n", "depth 3\n"]
    assert there.run.row.isolation == there.best.row.isolation == "pipeline"
    assert {run.id for run in there.run.children()} == {run.id for run in there.runs}
    assert "max:auc" in there._repr_html_()


def test_a_setting_that_raises_or_dies_is_a_failed_row(tmp_path: Path) -> None:
    given = {"grid": {"a": [1, 2, 3, 4]}, "params": {"marks": str(tmp_path)}, "objective": "min:x"}
    result = sometimes.sweep(**given, target="pipeline", progress=False)
    assert [run.status for run in result.runs] == ["succeeded", "failed", "failed", "succeeded"]
    assert "ValueError: two" in result.runs[1].error and "signal 9" in result.runs[2].error
    assert "raise ValueError" in result.runs[1].traceback and "trying again" in result.runs[1].logs
    assert (tmp_path / "2").read_text() == (tmp_path / "3").read_text() == "xx"  # the spec's retries
    assert result.values == (1.0, None, None, 4.0)
    assert result.to_pandas()["x"].tolist() == [1.0, 2.0, 3.0, 4.0]  # what was logged before the end, too
    assert all(f"at {a}\n" in run.logs for a, run in enumerate(result.runs, 1))


def test_the_last_step_shows_the_table_and_the_best() -> None:
    train.sweep(
        grid={"depth": [1, 2]}, params={"data": pd.DataFrame({"x": [1]})}, objective="max:auc", target="pipeline",
        progress=False,
    )  # fmt: skip
    (run,) = [run for run in ml.list_runs(pipeline="sweep-train") if run.row.kind == "pipeline"]
    assert run.status == "succeeded" and set(run.params) == {"points", "shared", "sweep", "objective"}
    (collected,) = [each for each in run.children() if each.function == "collect"]
    best = collected.outputs["best"]
    assert (best["point"], best["status"], best["numbers"]) == (1, "succeeded", {"auc": 0.2, "loss": 0.5})
    from mlfuncs_pipelines.run_log import read_journal

    ended = [event for event in read_journal(Path(run.row.details["folder"])) if event.get("id") == "collect"][-1]
    table = ended["outputs"]["artifacts"]["table"][0]
    assert table["type"]["schemaTitle"] == "system.HTML" and "0.5" in Path(table["uri"]).read_text()


def test_the_ir_is_the_same_for_other_points_and_limits_parallelism(tmp_path: Path) -> None:
    first = sweeps.sweep_pipeline(train, 3).compile(tmp_path / "a.yaml").read_bytes()
    assert first == sweeps.sweep_pipeline(train, 3).compile(tmp_path / "b.yaml").read_bytes()
    assert b"parallelismLimit: 3" in first and b"--point" in first


def test_a_wrong_objective_stops_the_pipeline() -> None:
    data = pd.DataFrame({"x": [1]})
    with pytest.raises(InvalidInput, match="no metric is named 'f1'; the run has auc, loss"):
        train.sweep(
            grid={"depth": [*range(1, 30)]}, params={"data": data}, objective="max:f1", parallel=1, target="pipeline",
            progress=False,
        )  # fmt: skip
    runs = ml.list_runs()
    assert len([run for run in runs if run.row.kind == "run"]) < 10
    assert not [run for run in runs if run.status in ("running", "pending")]


def test_when_every_point_fails_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="ValueError: two"):
        sometimes.sweep(list=[{"a": 2, "marks": str(tmp_path)}], target="pipeline", progress=False)


INTERRUPTED = """
import os, time, mlfuncs as ml
@ml.function
def slow(a: int) -> float:
    print("at", a, flush=True)
    ml.log_metric("x", a)
    open(f"{a}.pid~", "w").write(str(os.getpid()))
    os.rename(f"{a}.pid~", f"{a}.pid")
    if a > 1:
        time.sleep(600)
    return 1.0
slow.sweep(grid={"a": [1, 2, 3, 4, 5]}, objective="max:x", parallel=2, target="pipeline")
"""


def test_ctrl_c_ends_the_points_and_marks_them(tmp_path: Path) -> None:
    (tmp_path / "sweeping.py").write_text(INTERRUPTED)
    process = subprocess.Popen([sys.executable, "sweeping.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"{n}.pid").exists() for n in (2, 3)) or len(_points()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in shown
    deadline = time.monotonic() + 60
    while any(Path("/proc", (tmp_path / f"{n}.pid").read_text()).exists() for n in (2, 3)):
        assert time.monotonic() < deadline, "a point still runs"
        time.sleep(0.05)
    runs = ml.list_runs()
    assert [run.status for run in runs if run.row.kind in ("sweep", "pipeline")] == ["cancelled"] * 2, (shown, runs)
    points = {run.params["a"]: run for run in _points()}
    assert [points[a].status for a in (1, 2, 3)] == ["succeeded", "cancelled", "cancelled"] and len(points) == 3
    assert all(run.metrics == {"x": a} and run.logs == f"at {a}\n" for a, run in points.items())


def _points() -> list[ml.Run]:
    return [run for run in ml.list_runs() if run.row.kind == "run"]


class Cluster:
    """What Kubeflow would do with a submitted run: its IR, run in pods that have a home and a key of their own."""

    def __init__(self, api: Api, settings: Settings, home: Path) -> None:
        self.api, self.run = api, None
        self.settings = Settings(
            home=home, project="tests", artifacts_url=settings.artifacts_url, trusted_keys=project_key(settings).public
        )
        api.states = ["RUNNING"]
        api.on_run = lambda body: threading.Thread(target=self._work, args=(body,)).start()

    def _work(self, body: dict) -> None:
        state = "FAILED"
        try:
            sent = body["pipeline_spec"]  # with the platform's part beside it, when steps need something of pods
            pipeline = Pipeline.of(sent.get("pipeline_spec", sent), sent.get("platform_spec", {}))
            self.run = run_pipeline(pipeline, body["runtime_config"]["parameters"], self.settings)
            state = {"succeeded": "SUCCEEDED"}.get(self.run.status, state)
        finally:
            self.api.states = [state]


@pytest.fixture
def cluster(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("MLFUNCS_ARTIFACTS_URL", f"file://{tmp_path}/bucket")
    monkeypatch.setattr(sweeps, "_POLL_S", 0.05)
    return Cluster(api, read_settings(), tmp_path / "pod")


def test_on_kubeflow_the_very_same_ir_gives_the_same_table(cluster: Cluster, tmp_path: Path) -> None:
    data = pd.DataFrame({"x": [1, 2]})
    given = {"grid": {"depth": [1, 2**53 + 1]}, "params": {"data": data}, "objective": "max:auc", "parallel": 2}
    there = train.sweep(**given, target="kubeflow", progress=False)
    here = train.sweep(**given, target="pipeline", progress=False)
    assert there.table().columns == here.table().columns
    shown = ["status", "depth", "auc", "loss"]
    assert there.to_pandas()[shown].equals(here.to_pandas()[shown])
    assert there.best.outputs["model"].load().equals(data * (2**53 + 1)) and there.runs[0].logs == "depth 1\n"
    assert there.best.row.isolation == "kubeflow" and there.best.row.details["url"].endswith("/#/runs/details/r-1")
    (sent,) = [body for method, path, body in cluster.api.requests if method == "POST" and path.endswith("/runs")]
    compiled = sweeps.sweep_pipeline(train, 2).ir
    assert sent["pipeline_spec"] == {"pipeline_spec": compiled.spec, "platform_spec": compiled.platform}
    assert not list((tmp_path / "bucket" / "sweeps").rglob("*.json"))  # taken in, then removed


def test_on_kubeflow_a_pod_that_dies_is_a_failed_row(cluster: Cluster, tmp_path: Path) -> None:
    given = {"grid": {"a": [1, 2, 3]}, "params": {"marks": str(tmp_path)}, "objective": "min:x"}
    cluster.api.tasks = [{"display_name": "sometimes", "state": "FAILED", "error": {"code": 9, "message": "killed"}}]
    result = sometimes.sweep(**given, target="kubeflow", progress=False)
    assert [run.status for run in result.runs] == ["succeeded", "failed", "failed"]
    assert "ValueError: two" in result.runs[1].error and "sometimes: killed" in result.runs[2].error


def test_on_kubeflow_an_error_here_ends_the_run_there(cluster: Cluster) -> None:
    data = pd.DataFrame({"x": [1]})
    with pytest.raises(InvalidInput, match="f1"):
        train.sweep(list=[{"depth": 1, "data": data}], objective="max:f1", target="kubeflow", progress=False)
    assert any(path.endswith("r-1:terminate") for _, path, _ in cluster.api.requests)


def test_on_kubeflow_it_needs_a_shared_artifact_url(api: Api) -> None:
    with pytest.raises(SpecError, match="MLFUNCS_ARTIFACTS_URL"):
        sometimes.sweep(list=[{"a": 1, "marks": "/"}], target="kubeflow", progress=False)
    assert not [path for method, path, _ in api.requests if method == "POST"]
