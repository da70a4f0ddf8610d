"""What one endpoint's code may do beyond answering: routes and WebSockets of its own, and calls of other endpoints."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets

import mlfuncs as ml
from mlfuncs.errors import DeadlineExceeded
from mlfuncs.serving.endpoints import deploy
from mlfuncs.settings import read_settings
from mlfuncs_runtime.process_target import ProcessTarget

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def live(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLFUNCS_PORT", "0")
    yield
    ProcessTarget(read_settings()).stop()


def post(url: str, body: Any, **headers: str) -> Any:
    named = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(url, json.dumps(body).encode(), named)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_a_websocket_route_of_the_users_own_talks_through_the_router(live: None) -> None:
    class Chat:
        """Greets."""

        def __init__(self) -> None:
            from fastapi import FastAPI, WebSocket

            self.app = FastAPI()
            self.greeted = 0

            @self.app.get("/count")
            def count() -> int:
                return self.greeted

            async def talk(socket: WebSocket, name: str) -> None:
                await socket.accept(subprotocol=(socket.scope["subprotocols"] or [None])[0])
                async for text in socket.iter_text():
                    self.greeted += 1
                    await socket.send_text(f"{name}: {text}")
                    if text == "bye":
                        await socket.close(4001, "gone")

            talk.__annotations__ = {"socket": WebSocket, "name": str, "return": None}
            self.app.websocket("/talk/{name}")(talk)

        def __call__(self, name: str) -> str:
            return f"hello {name}"

    place = deploy(Chat, name="chat")
    base = place.url.replace("http://", "ws://")

    async def talk() -> tuple[list[str | bytes], Any]:
        answers = []
        async with websockets.connect(f"{base}/talk/ann", proxy=None, subprotocols=["chat.v1"]) as client:
            assert client.subprotocol == "chat.v1"
            for text in ("one", "x" * 200_000, "bye"):
                await client.send(text)
                answers.append(await client.recv())
            await client.wait_closed()
            return answers, (client.close_code, client.close_reason)

    answers, closed = asyncio.run(asyncio.wait_for(talk(), 30))
    assert answers == ["ann: one", "ann: " + "x" * 200_000, "ann: bye"] and closed == (4001, "gone")
    assert place.invoke(name="bob") == "hello bob"
    with urllib.request.urlopen(f"{place.url}/count/", timeout=60) as answer:  # FastAPI redirects to the path without /
        assert json.load(answer) == 3 and answer.url == f"{place.url}/count"

    async def no_such_route() -> int:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(f"{base}/nothing", proxy=None)
        return int(refused.value.response.status_code)

    assert asyncio.run(no_such_route()) == 403  # as Starlette refuses a WebSocket it has no route for


def test_a_chain_of_endpoints_passes_trace_and_deadline_on(live: None) -> None:
    def inner(x: int) -> dict[str, float | str]:
        from mlfuncs.serving.request_context import current_request

        request = current_request()
        assert request is not None
        return {"trace": request.traceparent, "left_s": request.remaining_s(), "id": request.request_id, "x": x}

    def middle(x: int) -> dict[str, float | str]:
        return ml.endpoint("inner").invoke(x=x + 1)

    def outer(x: int) -> dict[str, float | str]:
        return ml.endpoint("middle").invoke(x=x + 1)

    deploy(inner, name="inner")
    deploy(middle, name="middle")
    place = deploy(outer, name="outer", timeout_s=50)
    given = f"00-{TRACE}-b7ad6b7169203331-01"
    seen = post(place.url, {"x": 1}, traceparent=given, X_Request_Id="mine", X_Mlfuncs_Timeout_Ms="30000")
    assert seen["x"] == 3 and seen["id"] == "mine" and 0 < seen["left_s"] < 30
    version, trace, span, flags = seen["trace"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01") and span != "b7ad6b7169203331"


def test_a_nuclio_handler_calls_another_function_with_trace_and_deadline(live: None) -> None:
    def back(context: Any, event: Any) -> Any:
        import time

        if event.path == "/slow":
            time.sleep(600)
        wanted = ("traceparent", "X-Mlfuncs-Timeout-Ms", "X-Request-Id", "X-Mine", "Content-Type")
        found = {name.lower(): event.headers.get(name) for name in wanted}
        return {**found, "body": event.body, "path": event.path, "method": event.method}

    def front(context: Any, event: Any) -> Any:
        try:
            answer = context.platform.call_function("back", event)
        except DeadlineExceeded as exc:
            return context.Response(body=type(exc).__name__, status_code=504)
        return context.Response(body=answer.body, status_code=answer.status_code, content_type="application/json")

    deploy(back, name="back")
    place = deploy(front, name="front", timeout_s=8)
    given = f"00-{TRACE}-b7ad6b7169203331-01"
    seen = post(f"{place.url}/way", {"a": 1}, traceparent=given, X_Mine="kept", X_Request_Id="mine")
    assert (seen["body"], seen["path"], seen["method"], seen["x-mine"]) == ({"a": 1}, "/way", "POST", "kept")
    assert seen["traceparent"].split("-")[1] == TRACE and seen["traceparent"] != given
    assert 0 < float(seen["x-mlfuncs-timeout-ms"]) <= 8000 and seen["x-request-id"] == "mine"
    assert seen["content-type"] == "application/json"
    with pytest.raises(urllib.error.HTTPError) as late:
        post(f"{place.url}/slow", {})
    assert late.value.code == 504


def test_programs_that_a_function_started_end_with_its_worker(live: None) -> None:
    def start_program(own_session: bool) -> list[int]:
        import os
        import subprocess

        program = subprocess.Popen(["sleep", "600"], start_new_session=own_session)
        return [os.getpid(), program.pid]

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
        except OSError:
            return False

    place = deploy(start_program, name="starts")
    worker, first = place.invoke(own_session=False)
    _, apart = place.invoke(own_session=True)
    try:
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while runs(first):
            assert time.monotonic() < deadline, "the program outlived its worker"
            time.sleep(0.02)
        assert runs(apart)  # it asked for a life of its own
        _, second = place.invoke(own_session=False)
        assert runs(second)
        ProcessTarget(read_settings()).stop()
        assert not runs(second) and runs(apart)
    finally:
        os.kill(apart, signal.SIGKILL)
