"""A server that speaks the recorded shapes of Kubeflow's Pipelines API (v2beta1), for kfp's real client."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TASK = {
    "run_id": "r-1",
    "task_id": "t-1",
    "display_name": "add",
    "state": "SUCCEEDED",
    "outputs": {"Output": {"artifact_ids": ["7"]}},
    "child_tasks": [{"pod_name": "pod-1"}],
}


class Api:
    """What the server holds and answers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.tasks = [TASK]
        self.token = ""
        self.refuse: tuple[int, str] | None = None
        self.pipelines: list[dict[str, Any]] = []
        self.on_run: Callable[[dict[str, Any]], None] | None = None

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.requests.append((method, path, body))
        route = path.split("?")[0].removeprefix("/apis/v2beta1/")
        if route == "healthz":
            return 200, {"multi_user": False}
        if self.refuse:
            return self.refuse[0], {"error": self.refuse[1], "code": 3, "message": self.refuse[1]}
        if route == "experiments" and method == "GET":
            return 200, {}
        if route == "experiments":
            return 200, {"experiment_id": "e-1", "display_name": body["display_name"], "namespace": ""}
        if route == "runs":
            if self.on_run:
                self.on_run(body)
            return 200, {"run_id": "r-1", "display_name": body["display_name"], "state": "PENDING"}
        if route == "runs/r-1":
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return 200, {"run_id": "r-1", "state": state, "run_details": {"task_details": self.tasks}}
        if route == "runs/r-1:terminate":
            self.states = ["CANCELED"]
            return 200, {}
        if route == "recurringruns":
            return 200, {"recurring_run_id": "s-1", "status": "ENABLED"}
        if route == "pipelines":
            return 200, {"pipelines": self.pipelines}
        if route == "pipelines/upload":
            return 200, {"pipeline_id": "p-1", "display_name": "remote"}
        if route == "pipelines/upload_version":
            return 200, {"pipeline_id": "p-1", "pipeline_version_id": "v-2"}
        if path.endswith("/nodes/pod-1/log"):
            return 200, "line one\nline two\n"
        return 404, {"error": f"no {path}"}


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Api]:
    """The server, named by this process's settings."""
    state = Api()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            is_json = "json" in (self.headers.get("Content-Type") or "") and raw
            if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
                status, body = 401, {"error": "who are you?"}
            else:
                status, body = state.answer(self.command, self.path, json.loads(raw) if is_json else raw)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")
    monkeypatch.setenv("MLFUNCS_KUBEFLOW_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield state
    server.shutdown()
    server.server_close()
