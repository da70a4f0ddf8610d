"""kfp's real client against a server that speaks the recorded shapes of the Pipelines API (v2beta1)."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    NotFound,
    RunFailed,
    SpecError,
    Unauthorized,
    Unavailable,
)
from mlfuncs_pipelines.kubeflow import publish, six_fields

sys.path.append(str(Path(__file__).parent))
import own_steps as steps

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
            return 200, {"run_id": "r-1", "display_name": body["display_name"], "state": "PENDING"}
        if route == "runs/r-1":
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return 200, {"run_id": "r-1", "state": state, "run_details": {"task_details": self.tasks}}
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


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Api]:
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


@ml.pipeline(name="remote")
def remote(n: int = 3):
    return steps.add(n)


def test_submit_sends_the_ir_and_the_parameters(api: Api) -> None:
    run = remote.submit(n=5, experiment="mine")
    assert run.id == "r-1" and run.url.endswith("/#/runs/details/r-1")
    body = next(body for method, path, body in api.requests if path.endswith("/runs") and method == "POST")
    assert body["experiment_id"] == "e-1" and body["runtime_config"]["parameters"] == {"n": 5}
    assert body["pipeline_spec"]["schemaVersion"] == "2.1.0"
    created = next(body for method, path, body in api.requests if path.endswith("/experiments") and method == "POST")
    assert created["display_name"] == "mine"


def test_wait_outputs_and_logs(api: Api) -> None:
    run = remote.submit()
    assert run.wait(timeout_s=30, poll_s=0.01) is run
    assert run.status() == "succeeded" and run.steps() == {"add": "succeeded"}
    assert run.outputs("add") == {"Output": ["7"]}
    assert run.logs("add") == "line one\nline two\n"
    with pytest.raises(NotFound, match="add"):
        run.outputs("ad")


def test_wait_tells_the_cause_of_a_failure(api: Api) -> None:
    api.states = ["FAILED"]
    api.tasks = [{**TASK, "state": "FAILED", "error": {"code": 9, "message": "out of memory"}}]
    with pytest.raises(RunFailed, match="add: out of memory"):
        remote.submit().wait(poll_s=0.01)


def test_wait_gives_up_after_its_time(api: Api) -> None:
    api.states = ["RUNNING"]
    with pytest.raises(DeadlineExceeded, match="running"):
        remote.submit().wait(timeout_s=0.05, poll_s=0.01)


def test_schedule_has_seconds_first(api: Api) -> None:
    made = remote.schedule("0 5 * * *", n=2)
    assert made.id == "s-1" and made.cron == "0 0 5 * * *"
    body = next(body for _, path, body in api.requests if path.endswith("/recurringruns"))
    assert body["trigger"]["cron_schedule"]["cron"] == "0 0 5 * * *"


def test_publish_makes_a_pipeline_then_versions(api: Api) -> None:
    assert publish(remote) == "p-1"
    api.pipelines = [{"pipeline_id": "p-1", "display_name": "remote"}]
    assert publish(remote, "second") == "v-2"


def test_token_is_sent_and_a_wrong_one_is_told(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.token = "let-me-in"
    with pytest.raises(Unauthorized, match="MLFUNCS_KUBEFLOW_TOKEN"):
        remote.submit()
    monkeypatch.setenv("MLFUNCS_KUBEFLOW_TOKEN", "let-me-in")
    assert remote.submit().id == "r-1"


@pytest.mark.parametrize(
    ("status", "error"), [(400, SpecError), (403, Forbidden), (404, NotFound), (500, Unavailable), (503, Unavailable)]
)
def test_refusals_are_our_errors_with_the_reason(api: Api, status: int, error: type[Exception]) -> None:
    api.refuse = (status, "the reason")
    with pytest.raises(error, match="the reason"):
        remote.submit()


def test_a_host_that_is_away_is_said_quickly(api: Api) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unavailable, match="does not answer"):
        remote.submit(host=f"http://127.0.0.1:{port}")


def test_wrong_parameters_and_hosts_are_refused_before_anything_is_sent(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput):
        remote.submit(n="many")
    assert not [path for method, path, _ in api.requests if method == "POST"]
    monkeypatch.delenv("MLFUNCS_KUBEFLOW_HOST")
    with pytest.raises(SpecError, match="MLFUNCS_KUBEFLOW_HOST"):
        remote.submit()
    with pytest.raises(SpecError, match="not a URL"):
        remote.submit(host="kubeflow.example")


def test_cron_with_a_wrong_number_of_fields() -> None:
    with pytest.raises(InvalidInput, match="five"):
        six_fields("* *")
