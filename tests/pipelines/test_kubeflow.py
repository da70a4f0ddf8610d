"""kfp's real client against a server that speaks the recorded shapes of the Pipelines API (v2beta1)."""

import sys
from pathlib import Path

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
from tests.ports import free_port

sys.path.append(str(Path(__file__).parent))
import own_steps as steps
from kubeflow_api import TASK, Api


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
    port = free_port()
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


def test_a_run_can_be_cancelled(api: Api) -> None:
    api.states = ["RUNNING"]
    run = remote.submit()
    assert not run.is_over()
    run.cancel()
    assert run.is_over() and run.status() == "cancelled"
