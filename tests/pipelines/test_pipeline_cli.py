"""The command line around pipelines that are Python code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlfuncs.errors import SpecError

CODE = """
import mlfuncs as ml
from kfp import dsl

@ml.function
def double(x: int) -> int:
    return 2 * x

@ml.function
def read(path: str) -> str:
    return open(path).read()

@dsl.component(base_image="python:3.11")
def add(a: int) -> int:
    return a + 1

@ml.pipeline
def ours(n: int = 3):
    return double(n)

@ml.pipeline
def breaks(path: str):
    read(path)

@dsl.pipeline(name="theirs")
def theirs(n: int = 3) -> int:
    return add(a=n).output
"""
MAIN = "from mlfuncs.cli import main; main()"


@pytest.fixture
def command(tmp_path: Path):
    (tmp_path / "pipes.py").write_text(CODE)
    environment = {**os.environ, "MLFUNCS_HOME": str(tmp_path / "home"), "MLFUNCS_PROJECT": "tests"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-W", "ignore", "-c", MAIN, "pipeline", *words]
        return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)

    return run


@pytest.fixture
def command_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command line in this process, for tests to which the process is no matter."""
    (tmp_path / "pipes.py").write_text(CODE)
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int | str | None, str, str]:
        from mlfuncs.cli import main

        monkeypatch.setattr(sys, "argv", ["mlfuncs", "pipeline", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_run_takes_code_and_compiled_files(command, tmp_path: Path) -> None:
    for target in ("pipes:ours", "pipes.py:theirs"):
        done = command("run", target, "--param", "n=4", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["outputs"] == {"Output": 5 if "theirs" in target else 8}
    done = command("compile", "pipes.py:ours", "-o", "out/ours.yaml", "--json")
    assert json.loads(done.stdout) == {"pipeline": "ours", "path": "out/ours.yaml"}, done.stderr
    done = command("run", "out/ours.yaml", "--json")
    assert json.loads(done.stdout)["outputs"] == {"Output": 6}


def test_steps_print_live_with_their_names(command) -> None:
    done = command("run", "pipes.py:ours")
    assert done.returncode == 0 and "double: succeeded" in done.stdout and "Output = 6" in done.stdout


def test_debug_runs_one_step_again(command, tmp_path: Path) -> None:
    done = command("run", "pipes.py:breaks", "--param", f"path={tmp_path}/gone", "--json")
    run_id = json.loads(done.stdout)["run_id"]
    again = command("debug", run_id, "read")
    assert again.returncode == 1 and "FileNotFoundError" in again.stderr and "return open(path).read()" in again.stderr
    (tmp_path / "gone").write_text("now it is here")
    assert command("debug", run_id, "read").returncode == 0
    assert "rea" in command("debug", run_id, "rea").stderr


def test_resume_goes_on(command, tmp_path: Path) -> None:
    done = command("run", "pipes.py:breaks", "--param", f"path={tmp_path}/gone", "--json")
    (tmp_path / "gone").write_text("x")
    run_id = json.loads(done.stdout)["run_id"]
    again = command("resume", run_id, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["status"] == "succeeded"
    assert f"{run_id} goes on with the code that it began with" in again.stderr


def test_a_run_goes_on_with_the_present_code(command, tmp_path: Path) -> None:
    failed = command("run", "pipes.py:breaks", "--param", f"path={tmp_path}/gone", "--json")
    run_id = json.loads(failed.stdout)["run_id"]
    source = (tmp_path / "pipes.py").read_text()
    (tmp_path / "pipes.py").write_text(source.replace("open(path).read()", "path"))
    again = command("run", "pipes.py:breaks", "--resume", run_id, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["run_id"] == run_id and "pipes.py:breaks as it is now" in again.stderr


def test_unknown_names_are_answered_with_near_ones(command_here) -> None:
    code, _, errors = command_here("compile", "pipes.py:our")
    assert code != 0 and "ours" in errors and "Traceback" not in errors


def test_submit_without_a_host_says_how_to_name_one(command_here) -> None:
    code, _, errors = command_here("submit", "pipes.py:ours")
    assert code != 0 and "MLFUNCS_KUBEFLOW_HOST" in errors and "Traceback" not in errors


@pytest.mark.parametrize("given", [["--param", "n=x"], ["--param", "n"], ["--param", "zz=1"]])
def test_a_run_that_cannot_start_is_one_json_object_and_exit_code_2(command_here, given: list[str]) -> None:
    code, printed, _ = command_here("run", "pipes.py:ours", *given, "--json")
    assert code == 2 and json.loads(printed)["status"] == "failed" and json.loads(printed)["error"]


HOSTILE = """
import mlfuncs as ml
print("the module prints")

@ml.function
def double(x: int) -> int:
    return 2 * x

@ml.pipeline
def raises(n: int = 3):
    raise KeyError("in the body")

@ml.pipeline
def plain_if(n: int = 3):
    if n > 2:
        return double(n)
    return double(1)

@ml.pipeline
def fine(n: int = 3):
    return double(n)

@ml.pipeline
def hidden(cache: int = 3):
    return double(cache)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "hostile.py:raises"], "KeyError: 'in the body' (hostile.py, line 11: raise KeyError"),
        (["compile", "hostile.py:raises"], "KeyError: 'in the body' (hostile.py, line 11"),
        (["run", "hostile.py:plain_if"], "dsl.If"),
        (["run", "hostile.py"], "hostile.py:NAME"),
        (["run", "hostile.py:fine", "--param", "n=null"], "input n cannot be null; leave it out"),
        (["compile", "hostile.py:fine", "-o", "/proc/gone/fine.yaml"], "cannot be written to '/proc/gone/fine.yaml'"),
        (["compile", "hostile.py:fine", "-o", "."], "cannot be written to '.'"),
        (["resume", "../../etc"], "no pipeline run is named 'etc'"),
        (["submit", "hostile.py:fine", "--host", "here"], "is not a URL"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(
    command_here, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    code, _, errors = command_here(*words)
    assert code in (1, 2) and said in errors and "Traceback" not in errors


def test_with_json_what_the_users_module_prints_is_not_on_standard_output(command_here, tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    code, printed, errors = command_here("run", "hostile.py:fine", "--json")
    assert code == 0 and json.loads(printed)["outputs"] == {"Output": 6} and "the module prints" in errors


def test_a_parameter_named_like_an_option_is_refused_in_python_and_taken_on_the_command_line(
    command_here, tmp_path: Path
) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    from mlfuncs_pipelines.targets import load_pipeline_object

    with pytest.raises(SpecError, match="'cache', which is an option of this call"):
        load_pipeline_object("hostile.py:hidden").run(cache=5)
    _, printed, _ = command_here("run", "hostile.py:hidden", "--param", "cache=5", "--json")
    assert json.loads(printed.splitlines()[-1])["outputs"] == {"Output": 10}
