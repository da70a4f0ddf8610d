"""The supervisor's watch over its router: brought back also when that cannot be done at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mlfuncs.errors import Unavailable
from mlfuncs.settings import read_settings
from mlfuncs_runtime.control import ControlClient
from mlfuncs_runtime.supervisor.places import make_places
from mlfuncs_runtime.supervisor.router_process import RouterProcess
from mlfuncs_runtime.supervisor.supervisor import repeat

PATIENCE_S = 120.0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)


async def answers(path: Path) -> None:
    client = ControlClient(path)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(Unavailable):
                await client.call({"op": "ping"})
                client.close()
                return
            await asyncio.sleep(0.01)


def test_a_router_whose_port_is_taken_for_a_while_comes_back_when_it_is_free(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFUNCS_PORT", "0")
    settings = read_settings()
    places = make_places(settings)

    async def run() -> None:
        first, second = RouterProcess(settings, places), RouterProcess(settings, places)
        await first.start()
        assert first._listener is not None
        first._listener.close()  # the supervisor that bound it is gone, and the next one goes on without it
        await second.start()
        assert second.pid is not None
        os.kill(second.pid, signal.SIGKILL)
        assert first._process is not None
        await first._process.wait()
        watching = None
        try:
            with socket.create_server(second.address):
                watching = asyncio.create_task(second.watch())
                await until(lambda: "is taken by another program" in caplog.text)
                assert not watching.done()
            await answers(places.router_socket)
        finally:
            if watching is not None:
                watching.cancel()
            second.stop()

    asyncio.run(run())


def test_what_the_supervisor_does_by_the_clock_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    async def step() -> None:
        tries.append(len(tries))
        if len(tries) < 3:
            raise ZeroDivisionError("nobody expects it")
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(repeat(step, 0))
    assert len(tries) == 3
    assert caplog.text.count("nobody expects it") >= 2
