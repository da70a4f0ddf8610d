"""Where a worker's bounds on memory and CPU are set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlfuncs.spec import Resources
from mlfuncs_runtime.worker.limits import apply_limits, join_cgroup, own_cgroup_parent, pick_cores


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
