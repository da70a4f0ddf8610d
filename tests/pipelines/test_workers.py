"""The warm processes alone: steps killed before they begin, deaths of zygotes and children, forks of this process."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mlfuncs as ml
from mlfuncs_pipelines.messages import Exit, Preload, Request
from mlfuncs_pipelines.worker_pool import WorkerPool, _spawn, worker_pool
from mlfuncs_pipelines.workers import Worker

sys.path.append(str(Path(__file__).parent))
import own_steps as steps

COMMANDS = Preload(sys.executable)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()


def command(folder: Path, *argv: str) -> Request:
    """A request to run a program, its output in `folder`/log."""
    body = {"kind": "command", "argv": list(argv), "log": str(folder / "log")}
    body["executor_input"] = {"outputs": {"artifacts": {}}}
    return Request(json.dumps(body), environ=dict(os.environ))


def shell(folder: Path, script: str) -> Request:
    return command(folder, "/bin/sh", "-c", script)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def ends(worker: Worker, count: int = 1) -> dict[str, Exit]:
    """The next `count` ends of steps, by step."""
    poll = select.poll()
    poll.register(worker.fileno(), select.POLLIN)
    found: dict[str, Exit] = {}
    deadline = time.monotonic() + 180
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {found} ended"
        poll.poll(1000)
        found |= {end.step_id: end for end in worker.receive()}
    return found


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_step_killed_before_it_began_ends_alone(pool: WorkerPool, tmp_path: Path) -> None:
    go = tmp_path / "go"
    (tmp_path / "slow_to_load.py").write_text(
        f"import os, time\nwhile not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n"
    )
    worker = pool.get(Preload(sys.executable, modules=("slow_to_load",), path=(str(tmp_path),)))
    worker.run("first", shell(tmp_path, "exit 0"))
    worker.run("second", shell(tmp_path, "exit 7"))
    assert worker.kill("first", signal.SIGKILL) == [Exit("first", -1, 9)]
    go.touch()
    assert ends(worker)["second"].code == 7
    assert worker.is_idle


def test_the_late_end_of_a_forgotten_step_is_not_that_of_its_successor(pool: WorkerPool, tmp_path: Path) -> None:
    worker, go = pool.get(COMMANDS), tmp_path / "go"
    worker.run("step", shell(tmp_path, f"touch {tmp_path}/began; while [ ! -e {go} ]; do sleep 0.01; done; exit 3"))
    until(lambda: worker.receive() == [] and (tmp_path / "began").exists())
    worker.forget()
    worker.run("step", shell(tmp_path, f"touch {go}; while [ ! -e {go}2 ]; do sleep 0.01; done; exit 5"))
    worker.run("other", shell(tmp_path, f"sleep 0.1; touch {go}2"))
    found = ends(worker, 2)
    assert (found["step"].code, found["other"].code) == (5, 0)


def test_a_dead_zygote_takes_its_steps_along(pool: WorkerPool, tmp_path: Path) -> None:
    worker = pool.get(COMMANDS)
    assert worker.process is not None
    worker.run(
        "step", shell(tmp_path, f"echo $$ > {tmp_path}/pid.tmp; mv {tmp_path}/pid.tmp {tmp_path}/pid; sleep 600")
    )
    until(lambda: worker.receive() == [] and (tmp_path / "pid").exists())
    worker.process.kill()
    assert ends(worker)["step"].signal == 9
    until(lambda: is_gone(int((tmp_path / "pid").read_text())))  # it may be tried again: it must not go on as well
    successor = pool.get(COMMANDS)
    successor.run("step", shell(tmp_path, "exit 4"))
    assert successor is not worker and ends(successor)["step"].code == 4


def test_a_child_that_died_while_it_waited_gets_no_step(pool: WorkerPool, tmp_path: Path) -> None:
    worker = pool.get(COMMANDS)
    assert worker.process is not None
    worker.run("first", shell(tmp_path, "exit 1"))
    assert ends(worker)["first"].code == 1
    waiting = children(worker.process.pid)
    for pid in waiting:
        with contextlib.suppress(ProcessLookupError):  # that of the first step may be among them
            os.kill(pid, signal.SIGKILL)
    until(lambda: all(is_gone(pid) for pid in waiting))
    worker.run("second", shell(tmp_path, "exit 2"))
    assert ends(worker)["second"].code == 2


def test_a_step_that_closes_every_file_is_still_seen_to_end(pool: WorkerPool, tmp_path: Path) -> None:
    worker = pool.get(COMMANDS)
    source = "def f():\n import os\n os.closerange(3, 4096)\n"
    body = {"kind": "kfp", "source": source, "function": "f", "module_path": str(tmp_path / "m.py")}
    body |= {"log": str(tmp_path / "log"), "executor_module": "kfp.dsl.executor"}
    body["executor_input"] = {"inputs": {}, "outputs": {"outputFile": str(tmp_path / "out"), "artifacts": {}}}
    worker.run("step", Request(json.dumps(body), environ=dict(os.environ)))
    assert ends(worker)["step"].signal == 0
    assert worker.is_idle


@pytest.mark.parametrize(("script", "code", "number"), [("exit 3", 3, 0), ("exit 0", 0, 0), ("kill -11 $$", -1, 11)])
def test_a_process_for_one_step_that_becomes_a_command_ends_as_that_does(
    tmp_path: Path, script: str, code: int, number: int
) -> None:
    worker = _spawn(COMMANDS, single=True)  # what code gets that cannot be forked
    worker.run("step", shell(tmp_path, f"sleep 0.05; {script}"))
    worker.run("next", shell(tmp_path, "exit 0"))
    end = ends(worker)["step"]
    assert (end.code, end.signal) == (code, number)
    assert list(worker.overflow) == ["next"]
    worker.overflow.clear()
    assert worker.is_idle and worker.is_lost
    worker.close()


def test_what_follows_an_interrupted_run_has_workers_of_its_own() -> None:
    with pytest.raises(KeyboardInterrupt), worker_pool() as pool:
        worker = pool.get(COMMANDS)
        raise KeyboardInterrupt
    assert worker.is_closed
    with worker_pool() as other:
        assert other is not pool


FORKS = """
import os, sys
from pathlib import Path
sys.path.append(sys.argv[2])
import test_workers as t
from mlfuncs_pipelines.worker_pool import WorkerPool
folder = Path(sys.argv[1])
pool = WorkerPool()
worker = pool.get(t.COMMANDS)
worker.run("step", t.shell(folder, f"while [ ! -e {folder}/go ]; do sleep 0.01; done; exit 6"))
t.until(lambda: worker.receive() == [] and (folder / "log").exists())
forked = os.fork()
if forked == 0:
    assert worker.is_closed
    own = pool.get(t.COMMANDS)
    own.run("step", t.shell(folder, "exit 8"))
    code = t.ends(own)["step"].code
    (folder / "go").touch()
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 8
assert t.ends(worker)["step"].code == 6
pool.close()
"""


def test_a_fork_of_this_process_leaves_the_workers_to_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_step_may_run_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @ml.pipeline
    def outer(x: int):
        return steps.run_another(x).output

    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")
    assert outer.run(x=1).output == 30
