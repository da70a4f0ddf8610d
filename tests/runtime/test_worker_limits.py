"""Where a worker's bounds on memory and CPU are set."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from mlfuncs.settings import Settings
from mlfuncs.spec import Resources
from mlfuncs_runtime.supervisor import processes
from mlfuncs_runtime.supervisor.books import Books, Launch
from mlfuncs_runtime.supervisor.places import make_places
from mlfuncs_runtime.supervisor.workers import Workers
from mlfuncs_runtime.supervisor.zygotes import Zygotes
from mlfuncs_runtime.worker import limits
from mlfuncs_runtime.worker.limits import apply_limits, close_cgroup, join_cgroup, own_cgroup_parent, pick_cores


def cgroup(root: Path, controllers: str) -> Path:
    """A folder that looks like a delegated cgroup with one member, as the kernel would show it."""
    parent = root / "user.slice" / "app.slice"
    (parent / "session.scope").mkdir(parents=True)
    (parent / "cgroup.subtree_control").write_text(controllers)
    (parent / "cgroup.procs").write_text("")
    return parent


def test_finds_the_cgroup_that_passes_memory_and_cpu_on(tmp_path: Path) -> None:
    parent = cgroup(tmp_path, "cpu memory pids\n")
    own = "4:memory:/old\n0::/user.slice/app.slice/session.scope\n"
    assert own_cgroup_parent(tmp_path, own) == parent


@pytest.mark.parametrize(
    ("controllers", "own"),
    [
        ("cpu pids", "0::/user.slice/app.slice/session.scope\n"),
        ("cpu memory", "0::/\n"),
        ("cpu memory", "4:memory:/only-version-1\n"),
        ("cpu memory", "0::/elsewhere/session.scope\n"),
    ],
)
def test_has_no_cgroup_where_none_may_be_made(tmp_path: Path, controllers: str, own: str) -> None:
    cgroup(tmp_path, controllers)
    assert own_cgroup_parent(tmp_path, own) is None


def test_writes_the_limits_before_it_joins(tmp_path: Path) -> None:
    assert join_cgroup(tmp_path, "w", Resources(cpu=1.5, memory="512Mi"))
    assert (tmp_path / "w" / "memory.max").read_text() == str(512 * 2**20)
    assert (tmp_path / "w" / "cpu.max").read_text() == "150000 100000"
    assert (tmp_path / "w" / "cgroup.procs").read_text() == str(os.getpid())


def test_a_refusal_of_the_kernel_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    assert not join_cgroup(tmp_path, "w", Resources(memory="1Gi"))


def test_nothing_is_limited_without_resources() -> None:
    assert apply_limits(Resources(), "w") == ""


def test_cores_wrap_around_and_never_exceed_what_there_is() -> None:
    assert pick_cores([4, 5], 8, "w") == [4, 5]
    assert all(len(pick_cores([0, 1, 2], 1.2, f"w{n}")) == 2 for n in range(10))
    assert len({tuple(pick_cores([0, 1, 2, 3], 1, f"w{n}")) for n in range(40)}) == 4


def events(parent: Path, name: str, oom_kill: int) -> Path:
    """A worker's cgroup as the kernel shows it."""
    group = parent / name
    group.mkdir()
    (group / "memory.events").write_text(f"low 0\nhigh 0\nmax 12\noom {oom_kill}\noom_kill {oom_kill}\n")
    return group


def test_tells_a_cgroup_in_which_the_kernel_killed_for_memory(tmp_path: Path) -> None:
    assert close_cgroup(events(tmp_path, "a", 1))
    assert not close_cgroup(events(tmp_path, "b", 0))
    assert not close_cgroup(tmp_path / "never-made")
    empty = tmp_path / "c"
    empty.mkdir()
    assert not close_cgroup(empty)
    assert not empty.exists()


@pytest.mark.parametrize(("oom_kill", "reason"), [(1, "was killed for memory: it needs more"), (0, "is gone")])
def test_the_supervisor_says_that_a_worker_was_killed_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oom_kill: int, reason: str
) -> None:
    monkeypatch.setattr(limits, "cgroup_parent", lambda: tmp_path)

    async def scenario() -> str:
        changed = asyncio.Event()
        books = Books(make_places(Settings(home=tmp_path / "h", project="p")), no_launch, changed.set)
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        process = processes.spawn(command, os.environ, tmp_path / "log", tmp_path)
        events(tmp_path, f"mlfuncs-r0-{process.pid}", oom_kill)
        seen = {"endpoint": "e", "revision": "rev-1", "id": "r0", "phase": "ready", "since_s": 0.0}
        workers = Workers(books, Zygotes(books), no_drain)
        workers.adopt({**seen, "socket": str(tmp_path / "s"), "process": process.to_dict()})
        process.send(signal.SIGKILL)
        async with asyncio.timeout(60):
            await changed.wait()
        process.close()
        return books.failures["e", "rev-1"].reason

    assert reason in asyncio.run(scenario())


async def no_launch(_key: tuple[str, str]) -> Launch:
    raise AssertionError("nothing is started here")


async def no_drain(_replica: str, _timeout_s: float) -> None:
    raise AssertionError("nothing is drained here")
