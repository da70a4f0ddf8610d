"""Sweeps on a Dask cluster of two worker processes."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

import mlfuncs as ml
from mlfuncs.errors import MlfuncsError, RunFailed, SpecError, Unavailable
from mlfuncs.runs.sweep_dask import worker_settings

pytestmark = pytest.mark.timeout(900)
WAIT_S = 240  # for what takes seconds on an idle machine
OPTIONS = {"n_workers": 2, "threads_per_worker": 2, "processes": True, "dashboard_address": ":0"}


@pytest.fixture(scope="module")
def cluster():
    import dask
    import distributed

    patience = {"distributed.comm.timeouts.connect": "120s", "distributed.comm.timeouts.tcp": "120s"}
    with dask.config.set(patience), distributed.LocalCluster(host="127.0.0.1", **OPTIONS) as one:
        yield one


@pytest.fixture
def address(cluster) -> str:
    return cluster.scheduler_address


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


def test_the_result_is_that_of_processes(address: str) -> None:
    data = pd.DataFrame({"x": [1, 2]})
    given = {"grid": {"depth": [1, 2, 3]}, "params": {"data": data}, "objective": "max:auc", "parallel": 2}
    there = train.sweep(**given, target="dask", address=address, progress=False)
    here = train.sweep(**given, progress=False)
    assert there.table().columns == here.table().columns
    shown = ["status", "depth", "auc", "loss"]
    assert there.to_pandas()[shown].equals(here.to_pandas()[shown])
    assert there.best.params["depth"] == 3 and there.best.outputs["model"].load().equals(data * 3)
    assert [run.logs for run in there.runs] == ["depth 1\n", "depth 2\n", "depth 3\n"]
    assert there.run.row.isolation == there.best.row.isolation == "dask"
    assert {run.id for run in there.run.children()} == {run.id for run in there.runs}
    assert set(there.best.versions) >= {"code", "environment", "data"}
    assert "max:auc" in there._repr_html_()


def test_a_setting_that_raises_or_dies_is_a_failed_row_and_no_worker_dies(cluster, tmp_path: Path) -> None:
    before = set(cluster.scheduler.workers)
    result = sometimes.sweep(
        grid={"a": [1, 2, 3, 4]}, params={"marks": str(tmp_path)}, objective="min:x", target="dask",
        address=cluster.scheduler_address, progress=False,
    )  # fmt: skip
    assert [run.status for run in result.runs] == ["succeeded", "failed", "failed", "succeeded"]
    assert "ValueError: two" in result.runs[1].error and "SIGKILL" in result.runs[2].error
    assert "raise ValueError" in result.runs[1].traceback and "trying again" in result.runs[1].logs
    assert (tmp_path / "2").read_text() == (tmp_path / "3").read_text() == "xx"  # the spec's retries
    assert result.values == (1.0, None, None, 4.0)
    assert result.to_pandas()["x"].tolist() == [1.0, 2.0, 3.0, 4.0]  # what was logged before the end, too
    assert all(f"at {a}\n" in run.logs for a, run in enumerate(result.runs, 1))
    assert set(cluster.scheduler.workers) == before


def test_a_time_limit_ends_a_point(address: str) -> None:
    @ml.function
    def slow(a: int) -> int:
        import time

        time.sleep(600)
        return a

    with pytest.raises(RunFailed, match="DeadlineExceeded: it ran longer than 1 s"):
        slow.sweep(list=[{"a": 0}], timeout_s=1, target="dask", address=address, progress=False)


def test_good_enough_leaves_the_rest_out(address: str) -> None:
    @ml.function
    def same(a: int) -> float:
        return float(a)

    result = same.sweep(
        grid={"a": list(range(30))}, objective="max:x", stop_early=2.0, parallel=1, target="dask", address=address,
        progress=False,
    )  # fmt: skip
    assert len(result.runs) == 3 and result.best.output == 2.0


INTERRUPTED = """
import sys, time, mlfuncs as ml
@ml.function
def slow(a: int, folder: str) -> float:
    import os, time
    print("at", a, flush=True)
    ml.log_metric("x", a)
    open(f"{folder}/{a}.pid~", "w").write(str(os.getpid()))
    os.rename(f"{folder}/{a}.pid~", f"{folder}/{a}.pid")
    if a > 1:
        time.sleep(600)
    return 1.0
if __name__ == "__main__":
    given = {"grid": {"a": [1, 2, 3, 4, 5]}, "params": {"folder": sys.argv[2]}, "objective": "max:x", "parallel": 2}
    slow.sweep(**given, target="dask", address=sys.argv[1])
"""


def test_ctrl_c_ends_the_points_on_the_cluster_and_marks_them(address: str, tmp_path: Path) -> None:
    (tmp_path / "sweeping.py").write_text(INTERRUPTED)
    command = [sys.executable, "sweeping.py", address, str(tmp_path)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT_S
    while not all((tmp_path / f"{n}.pid").exists() for n in (2, 3)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    pids = [int((tmp_path / f"{n}.pid").read_text()) for n in (2, 3)]
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    deadline = time.monotonic() + WAIT_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a point still runs on its worker"
        time.sleep(0.05)
    assert "KeyboardInterrupt" in shown
    runs = ml.list_runs()
    assert [run.status for run in runs if run.row.kind == "sweep"] == ["cancelled"], shown
    points = {run.params["a"]: run for run in runs if run.row.kind == "run"}
    assert [points[a].status for a in (1, 2, 3)] == ["succeeded", "cancelled", "cancelled"] and len(points) == 3
    assert all(run.metrics == {"x": a} and run.logs.startswith(f"at {a}\n") for a, run in points.items())


def test_a_scheduler_that_is_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlfuncs.runs.sweep_dask._CONNECT_S", 0.5)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9 does not answer"):
        sometimes.sweep(list=[{"a": 1, "marks": "/"}], target="dask", address="tcp://127.0.0.1:9", progress=False)
    with pytest.raises(SpecError, match="address="):
        sometimes.sweep(list=[{"a": 1, "marks": "/"}], target="dask", progress=False)
    assert {run.status for run in ml.list_runs()} == {"failed"}


def test_a_worker_elsewhere_needs_artifacts_it_can_reach(settings) -> None:
    sent = {"machine": "elsewhere", "home": "/gone", "project": "shop", "artifacts_url": "", "key": "ed25519:k"}
    with pytest.raises(SpecError, match="MLFUNCS_ARTIFACTS_URL"):
        worker_settings(sent)
    there = worker_settings({**sent, "artifacts_url": "s3://bucket/a"})
    assert (there.home, there.project, there.trusted_keys) == (settings.home, "shop", "ed25519:k")


def test_a_point_leaves_no_files_behind_on_its_worker(cluster, tmp_path: Path) -> None:
    import distributed

    (marks := tmp_path / "marks").mkdir()
    (temporary := tmp_path / "temporary").mkdir()
    with distributed.Client(cluster.scheduler_address, set_as_default=False) as client:
        client.run(setattr, tempfile, "tempdir", str(temporary))
        given = {"params": {"marks": str(marks)}, "target": "dask", "address": cluster.scheduler_address}
        sometimes.sweep(list=[{"a": 1}, {"a": 3}], objective="max:x", progress=False, **given)
        client.run(setattr, tempfile, "tempdir", None)
    assert not list(temporary.glob("mlfuncs-*"))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(MlfuncsError, match="process, dask, pipeline, kubeflow"):
        sometimes.sweep(list=[{"a": 1, "marks": "/"}], target="ray")
    with pytest.raises(SpecError, match="stop_early"):
        sometimes.sweep(list=[{"a": 1, "marks": "/"}], target="pipeline", stop_early=1.0)


def test_when_every_point_fails_it_says_why(address: str, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="ValueError: two"):
        sometimes.sweep(list=[{"a": 2, "marks": str(tmp_path)}], target="dask", address=address, progress=False)


def test_a_point_whose_worker_is_killed_runs_on_another_one(address: str, tmp_path: Path) -> None:
    @ml.function
    def waits(a: int, folder: str) -> int:
        import os
        import pathlib
        import time

        (pathlib.Path(folder) / f"{a}-{os.getppid()}").touch()  # the parent is the Dask worker
        while a == 1 and not (pathlib.Path(folder) / "go").exists():
            time.sleep(0.02)
        return a

    def kill_the_worker() -> None:
        deadline = time.monotonic() + WAIT_S
        while not (marks := list(tmp_path.glob("1-*"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(int(marks[0].name.split("-")[1]), signal.SIGKILL)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill_the_worker)
    killer.start()
    given = {"grid": {"a": [1, 2]}, "params": {"folder": str(tmp_path)}, "objective": "max:x"}
    result = waits.sweep(**given, target="dask", address=address, progress=False)
    killer.join()
    assert [run.status for run in result.runs] == ["succeeded", "succeeded"] and result.values == (1.0, 2.0)
    assert len({mark.name for mark in tmp_path.glob("1-*")}) == 2  # two workers began it
