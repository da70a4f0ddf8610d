"""Results are reused by content, and a run that failed, was interrupted or was killed goes on where it stopped."""

# ruff: noqa: SIM115 - components are written as kfp users write them

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kfp import compiler, dsl

from mlfuncs.settings import Settings
from mlfuncs_pipelines.engine import Options
from mlfuncs_pipelines.run_log import PipelineRun, known_runs, read_journal, runs_folder
from mlfuncs_pipelines.runner import resume_run, run_pipeline
from mlfuncs_pipelines.validate import load_pipeline

Run = Callable[..., PipelineRun]
IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}"  # no step needs another Python
MAIN = "from mlfuncs_pipelines.cli import pipeline; pipeline(prog_name='pipeline')"


@dsl.component(base_image=IMAGE)
def touch(path: str, text: str = "x", note: str = "") -> str:
    with open(path, "a") as file:
        file.write(text)
    return text


@dsl.component(base_image=IMAGE)
def write(text: str, out: dsl.Output[dsl.Dataset], log: str):
    with open(log, "a") as file:
        file.write("w")
    with open(out.path, "w") as file:
        file.write(text)


@dsl.component(base_image=IMAGE)
def read(data: dsl.Input[dsl.Dataset], log: str) -> str:
    with open(log, "a") as file:
        file.write("r")
    return open(data.path).read()


@dsl.component(base_image=IMAGE)
def join(parts: list[str]) -> str:
    return "".join(parts)


@dsl.component(base_image=IMAGE)
def need(path: str, note: str) -> str:
    return open(path).read()


@dsl.component(base_image=IMAGE)
def wait_for(path: str, started: str, note: str = "") -> str:
    import os
    import time

    with open(started, "a") as file:
        file.write(f"{os.getpid()}\n")
    while not os.path.exists(path):
        time.sleep(0.02)
    return "done"


@dsl.pipeline(name="two")
def two(text: str, log: str) -> str:
    data = write(text=text, log=log)
    return read(data=data.outputs["out"], log=log).output


@dsl.pipeline(name="resumed")
def resumed(log: str, needed: str) -> str:
    first = touch(path=log, text="1").set_caching_options(False)
    second = need(path=needed, note=first.output)
    return touch(path=log, text="3", note=second.output).set_caching_options(False).output


@dsl.pipeline(name="waits")
def waits(log: str, go: str, started: str) -> str:
    first = touch(path=log, text="1").set_caching_options(False)
    return wait_for(path=go, started=started, note=first.output).set_caching_options(False).output


def test_equal_steps_are_not_run_again(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = run(two, text="a", log=str(log)), run(two, text="a", log=str(log))
    assert first.outputs == second.outputs == {"Output": "a"}
    assert log.read_text() == "wr"
    assert [second.steps[name].cached for name in ("write", "read")] == [True, True]


def test_the_content_of_an_artifact_counts_not_its_name(run: Run, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def constant(salt: str, out: dsl.Output[dsl.Dataset]):
        with open(out.path, "w") as file:
            file.write("same")

    @dsl.pipeline(name="content")
    def content(salt: str, log: str) -> str:
        return read(data=constant(salt=salt).outputs["out"], log=log).output

    log = tmp_path / "log"
    run(content, salt="1", log=str(log))
    done = run(content, salt="2", log=str(log))  # another file in another place, with equal bytes
    assert log.read_text() == "r" and done.steps["read"].cached and not done.steps["constant"].cached


def test_changed_code_runs_again(run: Run, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    def pipeline_with(component: Any) -> Any:
        @dsl.pipeline(name="code")
        def code(log: str) -> str:
            return component(log=log).output

        return code

    @dsl.component(base_image=IMAGE)
    def one(log: str) -> str:
        open(log, "a").write("1")
        return "1"

    first = one

    @dsl.component(base_image=IMAGE)
    def one(log: str) -> str:
        open(log, "a").write("2")
        return "2"

    assert run(pipeline_with(first), log=log).outputs == {"Output": "1"}
    assert run(pipeline_with(one), log=log).outputs == {"Output": "2"}


def test_a_deleted_artifact_is_noticed(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = run(two, text="a", log=str(log))
    Path(first.steps["write"].outputs.artifacts["out"][0]["uri"]).unlink()
    second = run(two, text="a", log=str(log))
    assert second.status == "succeeded" and log.read_text() == "wrw"  # the content is the same, so `read` still hits


def test_caching_can_be_turned_off_and_inputs_ignored(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run(two, text="a", log=str(log))
    run(two, Options(cache=False), text="a", log=str(log))
    assert log.read_text() == "wrwr"
    other = str(tmp_path / "elsewhere")
    run(two, Options(ignore=frozenset({"log"})), text="b", log=other)
    done = run(two, Options(ignore=frozenset({"log"})), text="b", log=str(log))
    assert done.steps["write"].cached and log.read_text() == "wrwr"


def test_the_cache_explains_itself(run: Run, tmp_path: Path, settings: Settings) -> None:
    from mlfuncs_pipelines.explain import explain

    log = str(tmp_path / "log")
    done = run(two, text="a", log=log)
    assert explain(done, settings)["write"] == "hit"
    changed = run(two, text="b", log=log)
    assert changed.steps["write"].cache_note == "miss: changed since the last run: input text"
    Path(changed.steps["write"].outputs.artifacts["out"][0]["uri"]).unlink()
    assert "deleted or changed" in explain(changed, settings)["write"]


def test_concurrent_equal_steps_run_once(compiled: Any, settings: Settings, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def slow(log: str) -> str:
        import time

        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.4)
        return "ok"

    @dsl.pipeline(name="once")
    def once(log: str):
        slow(log=log)
        slow(log=log)

    loaded, log = load_pipeline(compiled(once)), tmp_path / "log"
    runs: list[PipelineRun] = []
    threads = [
        threading.Thread(target=lambda: runs.append(run_pipeline(loaded, {"log": str(log)}, settings)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.status for done in runs] == ["succeeded", "succeeded"]
    assert log.read_text() == "x"


def test_equal_steps_of_two_processes_run_once(settings: Settings, tmp_path: Path) -> None:
    @dsl.pipeline(name="held")
    def held(go: str, started: str) -> str:
        return wait_for(path=go, started=started).output

    path, go, started = tmp_path / "held.yaml", tmp_path / "go", tmp_path / "started"
    compiler.Compiler().compile(held, str(path))
    words = ["run", str(path), "--json", "--param", f"go={go}", "--param", f"started={started}"]
    environment = {**os.environ, **settings.to_environ()}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, *words], stdout=subprocess.PIPE, text=True, env=environment
        )

    with start() as first:
        _until(started.exists)
        with start() as second:
            _until(lambda: len(known_runs(runs_folder(settings))) == 2)  # it is about to wait for the first one
            go.touch()
            answers = [json.loads(process.communicate(timeout=120)[0]) for process in (first, second)]
    assert [answer["outputs"] for answer in answers] == [{"Output": "done"}] * 2
    assert [answer["steps"][0].get("cached", False) for answer in answers] == [False, True]
    assert len(started.read_text().split()) == 1


def test_runs_in_two_threads_do_not_take_each_others_steps(compiled: Any, settings: Settings, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def meet(mine: str, other: str) -> str:
        import os
        import time

        open(mine, "w").close()
        deadline = time.monotonic() + 180
        while not os.path.exists(other) and time.monotonic() < deadline:
            time.sleep(0.01)
        return mine

    @dsl.pipeline(name="meeting")
    def meeting(mine: str, other: str) -> str:
        return meet(mine=mine, other=other).output

    loaded, places = load_pipeline(compiled(meeting)), [str(tmp_path / "a"), str(tmp_path / "b")]
    ended: dict[str, PipelineRun] = {}

    def go(mine: str, other: str) -> None:
        ended[mine] = run_pipeline(loaded, {"mine": mine, "other": other}, settings)

    threads = [threading.Thread(target=go, args=pair) for pair in (places, places[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {mine: done.outputs for mine, done in ended.items()} == {mine: {"Output": mine} for mine in places}


def test_a_run_resumes_from_wherever_its_journal_was_cut(run: Run, settings: Settings, tmp_path: Path) -> None:
    """What a crash leaves is a prefix of the journal: every step whose end is in it stays, the others run again."""

    @dsl.component(base_image=IMAGE)
    def step(path: str, name: str, note: str = "") -> str:
        with open(path, "a") as file:
            file.write(name)
        return note + name

    @dsl.pipeline(name="cut")
    def cut(path: str) -> str:
        first = step(path=path, name="a")
        with dsl.ParallelFor(["b", "c"]) as letter:
            each = step(path=path, name=letter, note=first.output)
        joined = join(parts=dsl.Collected(each.output))
        return step(path=path, name="d", note=joined.output).output

    log = tmp_path / "log"
    done = run(cut, Options(cache=False), path=str(log))
    assert done.outputs == {"Output": "abacd"} and sorted(log.read_text()) == list("abcd")
    journal, whole = done.folder / "journal.jsonl", (done.folder / "journal.jsonl").read_bytes()
    first_line = whole.index(b"\n") + 1
    for end in sorted(random.Random(7).sample(range(first_line, len(whole)), 10)):
        journal.write_bytes(whole[:end])
        kept = {event["id"] for event in read_journal(done.folder) if event["event"] == "ended" and "outputs" in event}
        log.write_text("")
        again = resume_run(done.id, settings, Options(cache=False))
        assert again.outputs == done.outputs
        names = {"step": "a", "for-loop-2/0/step-2": "b", "for-loop-2/1/step-2": "c", "step-3": "d"}
        assert set(log.read_text()) == {letter for name, letter in names.items() if name not in kept}, end


def test_a_failed_run_resumes_at_the_failed_step(run: Run, settings: Settings, tmp_path: Path) -> None:
    log, needed = tmp_path / "log", tmp_path / "needed"
    failed = run(resumed, log=str(log), needed=str(needed))
    assert failed.status == "failed" and log.read_text() == "1"
    needed.write_text("here")
    done = resume_run(failed.id, settings)
    assert done.status == "succeeded" and done.id == failed.id
    assert log.read_text() == "13"
    assert done.steps["touch"].resumed and not done.steps["need"].resumed


def _start(tmp_path: Path, settings: Settings) -> tuple[subprocess.Popen[str], Path]:
    path = tmp_path / "waits.yaml"
    compiler.Compiler().compile(waits, str(path))
    params = {"log": tmp_path / "log", "go": tmp_path / "go", "started": tmp_path / "started"}
    arguments = [word for name, value in params.items() for word in ("--param", f"{name}={json.dumps(str(value))}")]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "run", str(path), "--json", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings.to_environ()},
    )
    started = tmp_path / "started"
    _until(lambda: started.exists() and started.read_text().endswith("\n"))
    return process, started


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] in "ZX"
    except OSError:
        return True


def test_a_killed_engine_leaves_a_run_that_resumes(settings: Settings, tmp_path: Path) -> None:
    process, started = _start(tmp_path, settings)
    process.kill()
    process.wait()
    step = int(started.read_text().split()[0])
    _until(lambda: _is_gone(step))  # nothing outlives the engine
    (tmp_path / "go").touch()
    done = resume_run(known_runs(runs_folder(settings))[0], settings)
    assert done.outputs == {"Output": "done"}
    assert (tmp_path / "log").read_text() == "1"  # what had ended was not run again


def test_ctrl_c_stops_the_steps_and_marks_the_run(settings: Settings, tmp_path: Path) -> None:
    process, started = _start(tmp_path, settings)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    body = json.loads(output)
    assert (process.returncode, body["status"], body["error"]) == (130, "cancelled", "interrupted")
    assert {step["id"]: step["status"] for step in body["steps"]} == {"touch": "succeeded", "wait-for": "cancelled"}
    step = int(started.read_text().split()[0])
    _until(lambda: _is_gone(step))
    run_id = known_runs(runs_folder(settings))[0]
    assert body["run_id"] == run_id
    assert read_journal(runs_folder(settings) / run_id)[-1]["status"] == "cancelled"
    (tmp_path / "go").touch()
    assert resume_run(run_id, settings).status == "succeeded"


def test_a_journal_cut_short_is_still_read(settings: Settings, run: Run, tmp_path: Path) -> None:
    log, needed = tmp_path / "log", tmp_path / "needed"
    failed = run(resumed, log=str(log), needed=str(needed))
    with open(failed.folder / "journal.jsonl", "a") as file:
        file.write('{"event": "ended", "id": "nee')
    needed.write_text("here")
    assert resume_run(failed.id, settings).status == "succeeded"


@pytest.mark.parametrize("command", [["run", "FILE"], ["validate", "FILE"]])
def test_commands_print_one_json_object(command: list[str], settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    compiler.Compiler().compile(two, str(path))
    words = [word if word != "FILE" else str(path) for word in command]
    params = ["--param", 'text="a"', "--param", f"log={tmp_path}/log"] if "run" in command else []
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words, "--json", *params],
        capture_output=True,
        text=True,
        env={**os.environ, **settings.to_environ()},
    )
    body = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    if "run" in command:
        assert body["status"] == "succeeded" and body["outputs"] == {"Output": "a"}
        assert {step["id"] for step in body["steps"]} == {"write", "read"}
    else:
        assert body["valid"] and body["problems"] == []


def test_a_failed_run_has_an_exit_code_and_names_the_step(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "resumed.yaml"
    compiler.Compiler().compile(resumed, str(path))
    params = ["--param", f"log={tmp_path}/log", "--param", f"needed={tmp_path}/needed"]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "run", str(path), "--json", *params],
        capture_output=True,
        text=True,
        env={**os.environ, **settings.to_environ()},
    )
    body = json.loads(done.stdout)
    assert done.returncode == 1 and body["status"] == "failed" and body["error"].startswith("need: FileNotFoundError")
    assert "[touch]" not in done.stdout


def test_a_pipeline_that_cannot_run_exits_with_two_before_any_step(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("root: {dag: {tasks: {a: {componentRef: {name: x}}}}}\nschemaVersion: 2.1.0\n")
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "run", str(tmp_path / "bad.yaml"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **settings.to_environ()},
    )
    body = json.loads(done.stdout)
    assert done.returncode == 2 and body["status"] == "failed" and "no component 'x'" in body["error"]
