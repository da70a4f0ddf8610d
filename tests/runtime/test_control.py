"""Orders over a Unix socket: answers, errors as their classes, reconnection, bad lines."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mlfuncs.errors import Conflict, InvalidInput, MlfuncsError, NotFound, Unavailable
from mlfuncs_runtime.control import ControlClient, call, serve


async def answer(order: dict[str, Any]) -> dict[str, Any]:
    match order.get("op"):
        case "echo":
            return {"echo": order["value"]}
        case "conflict":
            raise Conflict("the name is taken")
        case "missing":
            raise NotFound("endpoint", "chrun", ["churn"])
        case "slow":
            await asyncio.sleep(30)
        case "bug":
            raise RuntimeError("oops")
    return {}


def during(path: Path, ask: Callable[[], Awaitable[None]] | Callable[[], None]) -> None:
    """Run `ask` while a server answers on `path`; a plain function runs on a thread."""

    async def scenario() -> None:
        server = await serve(path, answer)
        if asyncio.iscoroutinefunction(ask):
            await ask()
        else:
            await asyncio.to_thread(ask)
        server.close()

    asyncio.run(scenario())


def test_an_order_is_answered(tmp_path: Path):
    path = tmp_path / "s.sock"
    during(path, lambda: check_equal(call(path, {"op": "echo", "value": "é"}), {"echo": "é"}))


def check_equal(found: object, wanted: object) -> None:
    assert found == wanted


def test_errors_keep_their_class_and_words(tmp_path: Path):
    path = tmp_path / "s.sock"

    def ask() -> None:
        with pytest.raises(Conflict, match="the name is taken"):
            call(path, {"op": "conflict"})
        with pytest.raises(NotFound, match="did you mean 'churn'"):
            call(path, {"op": "missing"})
        with pytest.raises(MlfuncsError, match="RuntimeError: oops"):
            call(path, {"op": "bug"})

    during(path, ask)


def test_nobody_there_is_unavailable(tmp_path: Path):
    with pytest.raises(Unavailable, match="nothing answers"):
        call(tmp_path / "none.sock", {"op": "ping"})


def test_a_dead_socket_file_is_replaced(tmp_path: Path):
    path = tmp_path / "s.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    during(path, lambda: check_equal(call(path, {"op": "echo", "value": 1}), {"echo": 1}))


def test_lines_that_are_not_orders_are_answered_with_an_error(tmp_path: Path):
    path = tmp_path / "s.sock"

    def ask() -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"not json\n[1]\n" + json.dumps({"op": "echo", "value": 3}).encode() + b"\n")
            lines = connection.makefile("rb")
            assert json.loads(lines.readline())["error"] == "InvalidInput"
            assert json.loads(lines.readline())["error"] == "InvalidInput"
            assert json.loads(lines.readline()) == {"echo": 3}

    during(path, ask)


def test_a_kept_connection_is_opened_again_when_it_broke(tmp_path: Path):
    path = tmp_path / "s.sock"

    async def scenario() -> None:
        client = ControlClient(path)
        for value in (1, 2):
            server = await serve(path, answer)
            assert await client.call({"op": "echo", "value": value}) == {"echo": value}
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0.05)
        with pytest.raises(Unavailable):
            await client.call({"op": "echo", "value": 3})
        client.close()

    asyncio.run(scenario())


def test_a_late_answer_is_not_taken_for_the_next_ones(tmp_path: Path):
    async def scenario() -> None:
        server = await serve(tmp_path / "s.sock", answer)
        client = ControlClient(tmp_path / "s.sock")
        with pytest.raises(Unavailable):
            await client.call({"op": "slow"}, timeout_s=0.05)
        assert await client.call({"op": "echo", "value": 4}) == {"echo": 4}
        client.close()
        server.close()

    asyncio.run(scenario())


def test_many_at_once(tmp_path: Path):
    path = tmp_path / "s.sock"

    def ask() -> None:
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda n=n: found.append(call(path, {"op": "echo", "value": n})["echo"]))
            for n in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == list(range(20))

    during(path, ask)


def test_an_error_without_details_has_none(tmp_path: Path):
    path = tmp_path / "s.sock"

    def ask() -> None:
        with pytest.raises(InvalidInput) as caught:
            call(path, [])  # type: ignore[arg-type]
        assert caught.value.fields == []

    during(path, ask)
