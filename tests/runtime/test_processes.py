"""Processes by pidfd: recognised by start time, signalled exactly, reaped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlfuncs_runtime.supervisor import processes

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def test_a_spawned_process_has_a_session_a_log_and_an_exit_status(tmp_path: Path):
    handle = processes.spawn(
        [sys.executable, "-c", "print('said'); raise SystemExit(7)"], os.environ, tmp_path / "l", tmp_path
    )
    assert handle.wait_sync(20)
    assert handle.exit_status() == 7
    assert (tmp_path / "l").read_text() == "said\n"
    assert not handle.send(signal.SIGTERM)
    handle.close()


def test_the_same_process_is_found_again_and_another_one_is_not(tmp_path: Path):
    handle = processes.spawn(SLEEP, os.environ, tmp_path / "l", tmp_path)
    again = processes.reopen(handle.to_dict())
    assert again is not None and again.is_alive()
    other = {**handle.to_dict(), "started": handle.started - 1}  # as if the id had been given to another program
    assert processes.reopen(other) is None
    processes.stop_sync([again], 10)
    assert handle.wait_sync(10)
    assert processes.reopen(handle.to_dict()) is None
    assert processes.reopen(None) is None
    handle.close()


def test_a_zombie_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.monotonic() + 60
    while processes.start_ticks(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes.open_process(child.pid) is None
    child.wait()


def test_waiting_does_not_block_the_loop(tmp_path: Path):
    async def scenario() -> int | None:
        handle = processes.spawn(SLEEP, os.environ, tmp_path / "l", tmp_path)
        waiting = asyncio.create_task(handle.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        handle.send(signal.SIGKILL)
        await asyncio.wait_for(waiting, 60)
        status = handle.exit_status()
        handle.close()
        return status

    assert asyncio.run(scenario()) == -signal.SIGKILL


def test_what_ignores_sigterm_is_killed(tmp_path: Path):
    script = (
        "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    handle = processes.spawn([sys.executable, "-c", script], os.environ, tmp_path / "l", tmp_path)
    deadline = time.monotonic() + 60
    while "up" not in (tmp_path / "l").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    processes.stop_sync([handle], 0.2)
    assert handle.exit_status() == -signal.SIGKILL


def test_a_stopped_process_ends_too(tmp_path: Path):
    handle = processes.spawn(SLEEP, os.environ, tmp_path / "l", tmp_path)
    handle.send(signal.SIGSTOP)
    processes.stop_sync([handle], 5)
    assert handle.exit_status() == -signal.SIGTERM


def test_exits_are_described_for_people():
    assert processes.describe_exit(None) == "is gone"
    assert processes.describe_exit(-9) == "was killed by SIGKILL"
    assert processes.describe_exit(78) == "ended with status 78"
