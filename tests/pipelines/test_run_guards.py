"""What a run refuses: other parameters or a second engine when it is resumed, options that cannot be, values without
a JSON; and what becomes of attempts that fail or are interrupted."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

import mlfuncs as ml
from mlfuncs.cli import main
from mlfuncs.errors import Conflict, InvalidInput, RunFailed, SpecError
from mlfuncs.settings import read_settings
from mlfuncs_pipelines import worker_pool
from mlfuncs_pipelines.engine import Observer, Options
from mlfuncs_pipelines.run_lock import sole_engine
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord, known_runs, runs_folder
from mlfuncs_pipelines.runner import resume_run, run_pipeline
from mlfuncs_pipelines.worker_pool import WorkerPool

sys.path.append(str(Path(__file__).parent))
import own_steps as steps

IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}"  # no step needs another Python


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")


@ml.pipeline
def halved(x: float = 4.0):
    return steps.half(x).output


@ml.pipeline
def doubled(x: float = 4.0):
    return steps.half(x).output


def test_a_run_is_resumed_only_with_its_own_parameters_and_pipeline() -> None:
    first = halved.run(x=2.0)
    with pytest.raises(Conflict, match=r"given x=2\.0, not 3\.0"):
        halved.run(x=3.0, resume=first.id)
    with pytest.raises(Conflict, match="one of pipeline halved, not of doubled"):
        doubled.run(resume=first.id)
    assert halved.run(resume=first.id).output == halved.run(x=2, resume=first.id).output == 1.0
    assert halved.run(x=4, resume=halved.run().id).output == 2.0  # what was left out had its default


def test_a_run_may_have_more_kinds_of_steps_than_workers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    @ml.pipeline
    def varied(x: float = 4.0):
        first = steps.half(x)
        at_once = [steps.add(1), steps.configure(x), steps.notes(x), steps.report(x), steps.anything(1)]
        later = steps.measure(first.output).after(*at_once)  # its worker takes the room of all those
        return steps.half(first.output).after(later).output

    monkeypatch.setattr(worker_pool, "_idle", [WorkerPool(limit=1)])
    assert varied.run(parallel=6).output == 1.0


class _ResumesToo(Observer):
    """Tries to resume the run while it runs."""

    refused = ""

    def run_started(self, run: PipelineRun) -> None:
        with pytest.raises(Conflict) as caught:
            resume_run(run.id, read_settings())
        self.refused = str(caught.value)


def test_a_run_that_runs_is_not_resumed() -> None:
    tried = _ResumesToo()
    done = run_pipeline(halved.ir, {}, read_settings(), observers=[tried])
    assert done.status == "succeeded" and f"{done.id} is running, pid {os.getpid()};" in tried.refused
    with sole_engine(done.folder), pytest.raises(Conflict, match="is running"):
        resume_run(done.id, read_settings())
    assert resume_run(done.id, read_settings()).status == "succeeded"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": ["nope"]}, "no step of pipeline halved has an input 'nope'; inputs: x"),
        ({"ignore": "x"}, r"write ignore=\['x'\]"),
        ({"parallel": 0}, "parallel must be a whole number of steps, 1 or more, not 0"),
        ({"parallel": "x"}, "not 'x'"),
        ({"cache": "no"}, "cache must be True or False"),
        ({"containers": "vm"}, "containers must be 'docker' or 'process', not 'vm'"),
    ],
)
def test_options_are_checked_before_there_is_a_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        halved.run(**options)
    assert known_runs(runs_folder(read_settings())) == []


@ml.function
def nothing() -> str | None:
    return None


@ml.function
def told(x: str | None = "the default") -> str:
    return repr(x)


@ml.function
def asked(x: str | None) -> str:
    return repr(x)


def test_a_step_that_returns_none_hands_nothing_on() -> None:
    @ml.pipeline
    def nones():
        none = nothing().output
        told(none)
        asked(none)

    done = nones.run()
    assert (done.value("told"), done.value("asked")) == ("'the default'", "None")


@ml.function
def says(text: str) -> None:
    print(text, "and more", sep="\n")


def test_the_log_of_a_pipeline_run_is_that_of_its_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @ml.pipeline
    def talks():
        says("hello")

    done = talks.run()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["mlfuncs", "logs", done.id])
    main()
    assert capsys.readouterr().out == "[says] hello\n[says] and more\n"


@ml.function
def spells(path: str) -> None:
    os.write(1, b"a\xc3")
    while not Path(path).exists():
        time.sleep(0.01)
    os.write(1, b"\xa9\n\xff")


class _Hears(Observer):
    """Keeps what is printed, and lets `spells` go on once it heard a part of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.heard = path, ""

    def step_logged(self, record: StepRecord, text: str) -> None:
        self.heard += text
        self.path.touch()


def test_a_character_that_is_printed_in_two_parts_is_shown_whole(tmp_path: Path) -> None:
    @ml.pipeline
    def spelling(path: str):
        spells(path)

    hears = _Hears(tmp_path / "go")
    run_pipeline(spelling.ir, {"path": str(hears.path)}, read_settings(), observers=[hears])
    assert hears.heard == "aé\n\ufffd"


@ml.function(retries=1)
def second_time(path: str) -> str:
    if not Path(path).exists():
        Path(path).touch()
        raise ValueError("the first time")
    return "good"


def test_each_attempt_has_its_own_end(tmp_path: Path) -> None:
    @ml.pipeline
    def tried(path: str):
        return second_time(path).output

    done = tried.run(path=str(tmp_path / "there"))
    first, second = sorted(ml.get_run(done.id).children(), key=lambda run: run.row.attempt)
    assert (first.status, second.status, done.output) == ("failed", "succeeded", "good")
    assert first.row.error["type"] == "ValueError" and first.row.error["message"] == "the first time"
    assert first.row.finished_at <= second.row.started_at and first.row.finished_at > first.row.started_at


class _Interrupts(Observer):
    """Ctrl-C once a step runs."""

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if record.status == "running":
            raise KeyboardInterrupt


def test_a_step_that_was_interrupted_is_cancelled() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(halved.ir, {}, read_settings(), observers=[_Interrupts()])
    (run_id,) = known_runs(runs_folder(read_settings()))
    (step,) = ml.get_run(run_id).children()
    assert (step.status, step.row.error, ml.get_run(run_id).status) == ("cancelled", None, "cancelled")
    assert 0 <= step.duration_s <= ml.get_run(run_id).duration_s
    assert run_pipeline(halved.ir, {}, read_settings()).status == "succeeded"  # its place in the cache is free again


@ml.function
def leaves(code: int) -> str:
    sys.exit(code)


@ml.function
def vanishes() -> str:
    os._exit(0)


def test_a_step_that_ends_its_process_fails_whatever_the_code() -> None:
    @ml.pipeline
    def left(code: int):
        leaves(code)

    for code in (0, 3):
        message = f"SystemExit: the function ended the process with exit code {code}; return a value instead"
        with pytest.raises(RunFailed, match=message):
            left.run(code=code)

    @ml.pipeline
    def vanished():
        vanishes()

    with pytest.raises(RunFailed, match="the function ended the process with exit code 0; return a value"):
        vanished.run()


@dsl.component(base_image=IMAGE)
def exits(code: int) -> str:
    import sys

    sys.exit(code)


@dsl.component(base_image=IMAGE)
def exits_without_outputs():
    import sys

    sys.exit(0)


def test_a_lightweight_step_that_exits_needs_its_outputs_as_on_kubeflow() -> None:
    @ml.pipeline
    def exiting(code: int):
        exits(code=code)

    with pytest.raises(RunFailed, match="the step ended without a value for its output Output"):
        exiting.run(code=0)
    with pytest.raises(RunFailed, match="exit code 3"):
        exiting.run(code=3)

    @ml.pipeline
    def leaving():
        exits_without_outputs()

    assert leaving.run().status == "succeeded"


@ml.function
def scored(x: int) -> int:
    ml.log_metric("loss", x / 4)
    return x


def test_a_step_from_the_cache_has_the_metrics_of_the_step_that_ran() -> None:
    @ml.pipeline
    def scoring(x: int):
        scored(x)

    first = scoring.run(x=2)
    shutil.rmtree(first.record.folder)  # the cache does not need the run that filled it
    second = scoring.run(x=2)
    assert second.step("scored").cached
    (row,) = ml.get_run(second.id).children()
    assert row.metrics == {"loss": 0.5}


def _mended(good: bool) -> Any:
    @ml.function
    def fetch(log: str) -> int:
        steps.touch.target(log, "f")
        return 4

    if good:

        @ml.function
        def divide(x: int, log: str) -> float:
            steps.touch.target(log, "d")
            return x / 2

    else:

        @ml.function
        def divide(x: int, log: str) -> float:
            return x / 0

    @ml.pipeline
    def mended(log: str):
        return divide(fetch(log).output, log).output

    return mended


def test_a_run_is_resumed_with_the_code_as_it_is_now(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RunFailed, match="ZeroDivisionError") as caught:
        _mended(good=False).run(log=str(log), cache=False)
    run_id = caught.value.run_id
    assert f"mended.run(resume='{run_id}')" in str(caught.value)
    assert resume_run(run_id, read_settings(), Options(cache=False)).status == "failed"  # the code that it began with
    done = _mended(good=True).run(resume=run_id, cache=False)
    assert (done.output, done.id, log.read_text()) == (2.0, run_id, "fd")
    assert done.step("fetch").resumed and not done.step("divide").resumed
    again = _mended(good=True).run(resume=run_id, cache=False)
    assert again.step("divide").resumed and log.read_text() == "fd"


def test_a_changed_step_runs_again_when_a_run_is_resumed(tmp_path: Path) -> None:
    def of(factor: int) -> Any:
        @ml.function
        def scale(x: int, log: str) -> int:
            steps.touch.target(log, "s")
            return x * factor

        @ml.function
        def after(x: int, log: str) -> int:
            steps.touch.target(log, "a")
            return -x

        @ml.pipeline
        def scaled(log: str):
            return after(scale(3, log).output, log).output

        return scaled

    log = tmp_path / "log"
    first = of(2).run(log=str(log), cache=False)
    second = of(5).run(resume=first.id, cache=False)  # what depends on it as well
    assert (first.output, second.output, log.read_text()) == (-6, -15, "sasa")


@ml.function(retries=2)
def lost(path: str) -> dict[str, float]:
    steps.touch.target(path)
    return {"loss": float("nan")}


def test_nan_and_infinity_are_refused_where_they_arise_and_not_tried_again(tmp_path: Path) -> None:
    @ml.pipeline
    def nan(path: str):
        lost(path)

    with pytest.raises(RunFailed, match=r"Output: .*nan.* holds NaN or infinity"):
        nan.run(path=str(tmp_path / "calls"))
    assert (tmp_path / "calls").read_text() == "x"
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match=r"x: .*NaN or infinity"):
            halved.run(x=value)
