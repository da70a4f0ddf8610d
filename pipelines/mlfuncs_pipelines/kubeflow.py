"""Pipelines on Kubeflow: submit, schedule, publish versions, wait, read outputs and logs, through kfp's own client."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidInput,
    MlfuncsError,
    NotFound,
    RunFailed,
    SpecError,
    Unauthorized,
    Unavailable,
)
from mlfuncs.settings import Settings, read_settings

if TYPE_CHECKING:
    from mlfuncs_pipelines.pipeline import Pipeline

_TIMEOUTS_S = (5.0, 60.0)  # to connect, and to answer
_POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
_ENDED = {"SUCCEEDED": "succeeded", "FAILED": "failed", "CANCELED": "cancelled", "SKIPPED": "cancelled"}
_BY_STATUS: dict[int, type[MlfuncsError]] = {401: Unauthorized, 403: Forbidden, 400: SpecError, 409: SpecError}


@dataclass(frozen=True)
class Schedule:
    """A recurring run on Kubeflow."""

    id: str
    cron: str
    host: str

    @property
    def url(self) -> str:
        """Its page in the UI."""
        return f"{self.host}/#/recurringrun/details/{self.id}"

    def delete(self) -> None:
        """Stop it for good."""
        client = connect(self.host)
        with translated(self.host):
            client.delete_recurring_run(self.id)


class KubeflowRun:
    """A run on Kubeflow Pipelines."""

    def __init__(self, run_id: str, host: str, client: Any) -> None:
        self.id, self.host = run_id, host
        self._client = client

    @property
    def url(self) -> str:
        """Its page in the UI."""
        return f"{self.host}/#/runs/details/{self.id}"

    def status(self) -> str:
        """pending, running, succeeded, failed or cancelled."""
        state = str(self._detail().state or "PENDING")
        return _ENDED.get(state, state.lower())

    def is_over(self) -> bool:
        """Whether it has succeeded, failed or was cancelled."""
        return self.status() in _ENDED.values()

    def cancel(self) -> None:
        """Ask Kubeflow to stop it; one that is over stays as it is."""
        with translated(self.host):
            self._client.terminate_run(self.id)

    def wait(self, timeout_s: float = 3600.0, poll_s: float = 5.0) -> KubeflowRun:
        """Return when the run has succeeded. Raises RunFailed when it has not, DeadlineExceeded after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (state := self.status()) not in _ENDED.values():
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"run {self.id} is {state} after {timeout_s:g} s; it goes on: {self.url}")
            time.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))
        if state != "succeeded":
            raise RunFailed(f"run {self.id} {state}: {self.cause()}; see {self.url}", self.id)
        return self

    def steps(self) -> dict[str, str]:
        """The state of each task by name."""
        return {task.display_name: _state(task.state) for task in self._tasks()}

    def outputs(self, step: str) -> dict[str, Any]:
        """What a task put out, as the API tells it: artifact ids by output name. Raises NotFound."""
        found = next((task for task in self._tasks() if task.display_name == step), None)
        if found is None:
            raise NotFound("step", step, self.steps())
        return {name: list(value.artifact_ids or []) for name, value in (found.outputs or {}).items()}

    def logs(self, step: str) -> str:
        """What a task's pod printed. Raises NotFound."""
        found = next((task for task in self._tasks() if task.display_name == step), None)
        pods = [child.pod_name for child in (found.child_tasks or []) if child.pod_name] if found else []
        pod = pods[-1] if pods else getattr(found, "pod_name", None)
        if not pod:
            raise NotFound("step with a pod", step, self.steps())
        with translated(self.host):
            path = f"/apis/v1alpha1/runs/{self.id}/nodes/{pod}/log"
            api = self._client._run_api.api_client
            answer = api.call_api(path, "GET", response_type="object", auth_settings=["Bearer"], _preload_content=False)
            return str(answer.data.decode(errors="replace"))

    def _detail(self) -> Any:
        with translated(self.host):
            return self._client.get_run(self.id)

    def _tasks(self) -> list[Any]:
        details = self._detail().run_details
        return list(details.task_details or []) if details else []

    def cause(self) -> str:
        """Why it failed: the failed tasks with their messages, the most specific first."""
        failed = [task for task in self._tasks() if _state(task.state) == "failed"]
        texts = [f"{task.display_name}: {task.error.message if task.error else 'failed'}" for task in reversed(failed)]
        return "; ".join(texts) or str(getattr(self._detail().error, "message", "") or "no reason given")

    def __repr__(self) -> str:
        return f"<Kubeflow run {self.id} {self.url}>"


def submit(
    pipeline: Pipeline, params: Mapping[str, Any], *, host: str = "", experiment: str = "Default"
) -> KubeflowRun:
    """Start a run on Kubeflow. Raises Unavailable, Unauthorized, Forbidden or SpecError when the host refuses."""
    settings = read_settings()
    host = _host(host, settings)
    client = connect(host, settings)
    with compiled(pipeline, params) as path, translated(host):
        started = client.create_run_from_pipeline_package(
            str(path),
            arguments=dict(params),
            run_name=f"{pipeline.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            experiment_name=experiment,
        )
    return KubeflowRun(started.run_id, host, client)


def schedule(
    pipeline: Pipeline, cron: str, params: Mapping[str, Any], *, host: str = "", experiment: str = "Default"
) -> Schedule:
    """Run at the times of `cron`: five fields, or Kubeflow's six with seconds first."""
    settings = read_settings()
    host = _host(host, settings)
    expression = six_fields(cron)
    client = connect(host, settings)
    with compiled(pipeline, params) as path, translated(host):
        found = client.create_experiment(experiment)
        made = client.create_recurring_run(
            experiment_id=found.experiment_id,
            job_name=pipeline.name,
            cron_expression=expression,
            params=dict(params),
            pipeline_package_path=str(path),
        )
    return Schedule(made.recurring_run_id, expression, host)


def publish(pipeline: Pipeline, version: str = "", *, host: str = "") -> str:
    """Upload the pipeline, or a further `version` of it, and return the id of what was made."""
    settings = read_settings()
    host = _host(host, settings)
    client = connect(host, settings)
    with compiled(pipeline, {}) as path, translated(host):
        known = client.get_pipeline_id(pipeline.name)
        if known is None:
            return str(client.upload_pipeline(str(path), pipeline_name=pipeline.name).pipeline_id)
        name = version or f"{pipeline.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        made = client.upload_pipeline_version(str(path), pipeline_version_name=name, pipeline_id=known)
        return str(made.pipeline_version_id)


def six_fields(cron: str) -> str:
    """`cron` in Kubeflow's form, seconds first.

    >>> six_fields("0 5 * * *")
    '0 0 5 * * *'
    """
    fields = cron.split()
    if len(fields) not in (5, 6):
        raise InvalidInput(f"cron {cron!r} has {len(fields)} fields; write five, like '0 5 * * *' for every day at 5")
    return " ".join(fields if len(fields) == 6 else ["0", *fields])


def connect(host: str, settings: Settings | None = None) -> Any:
    """A kfp client for `host` that gives up on a host which does not answer.

    The token is the setting kubeflow_token, else the one that Kubernetes mounts into a pod. Raises Unavailable,
    Unauthorized or SpecError before anything is sent.
    """
    import kfp

    settings = settings or read_settings()
    token = settings.kubeflow_token or (_POD_TOKEN.read_text().strip() if _POD_TOKEN.exists() else "")
    _probe(host, token)
    with warnings.catch_warnings(), _quiet(), translated(host):
        warnings.simplefilter("ignore")
        namespace = settings.kubernetes_namespace if settings.kubernetes_namespace != "default" else "kubeflow"
        client = kfp.Client(host=host, existing_token=token or None, namespace=namespace)
    rest = client._run_api.api_client.rest_client
    original = rest.request

    def request(*arguments: Any, **options: Any) -> Any:
        options["_request_timeout"] = options.get("_request_timeout") or _TIMEOUTS_S
        return original(*arguments, **options)

    rest.request = request
    return client


@contextlib.contextmanager
def compiled(pipeline: Pipeline, params: Mapping[str, Any]) -> Iterator[Path]:
    """The pipeline's file, checked together with the parameters. Raises InvalidPipeline or InvalidInput."""
    from mlfuncs_pipelines.inputs import Values, complete
    from mlfuncs_pipelines.validate import load_pipeline

    with tempfile.TemporaryDirectory() as folder:
        path = pipeline.compile(Path(folder) / f"{pipeline.name}.yaml")
        complete(Values(dict(params)), load_pipeline(path).root, f"pipeline {pipeline.name}")
        yield path


@contextlib.contextmanager
def translated(host: str) -> Iterator[None]:
    """kfp's and urllib3's errors as ours."""
    import kfp_server_api
    import urllib3

    try:
        with _quiet():
            yield
    except kfp_server_api.ApiException as exc:
        raise _refused(exc, host) from exc
    except (urllib3.exceptions.HTTPError, TimeoutError) as exc:
        raise Unavailable(f"Kubeflow at {host} does not answer: {_reason(exc)}", 30) from exc


def _refused(exc: Any, host: str) -> MlfuncsError:
    try:
        message = json.loads(exc.body).get("error") or json.loads(exc.body).get("message") or exc.body
    except (TypeError, ValueError, AttributeError):
        message = exc.reason
    text = f"Kubeflow at {host} refused ({exc.status}): {message}"
    if exc.status in (401, 403):
        text += "; set MLFUNCS_KUBEFLOW_TOKEN to a token that may do this"
    if exc.status == 404:
        return NotFound("object on Kubeflow", str(message))
    return _BY_STATUS.get(exc.status or 0, Unavailable)(text)


def _probe(host: str, token: str) -> None:
    import urllib3

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{host}/apis/v2beta1/healthz"
    timeout = urllib3.Timeout(connect=_TIMEOUTS_S[0], read=15.0)
    try:
        answer = urllib3.PoolManager(retries=False).request("GET", url, headers=headers, timeout=timeout)
    except urllib3.exceptions.HTTPError as exc:
        advice = "check the address and that it can be reached from here (a port-forward, a VPN)"
        raise Unavailable(f"Kubeflow at {host} does not answer: {_reason(exc)}; {advice}", 30) from exc
    if answer.status in (401, 403):
        error = Unauthorized if answer.status == 401 else Forbidden
        raise error(f"Kubeflow at {host} refuses the token ({answer.status}); set MLFUNCS_KUBEFLOW_TOKEN")
    if answer.status >= 500:
        raise Unavailable(f"Kubeflow at {host} answers {answer.status}", 30)
    if answer.status != 200 or not answer.data.lstrip().startswith(b"{"):
        raise SpecError(f"{host} is not the Kubeflow Pipelines API ({answer.status} at /apis/v2beta1/healthz)")


def _host(host: str, settings: Settings) -> str:
    found = (host or settings.kubeflow_host or os.environ.get("KF_PIPELINES_ENDPOINT", "")).rstrip("/")
    if not found:
        raise SpecError("no Kubeflow host: give host=..., or set MLFUNCS_KUBEFLOW_HOST to the Pipelines URL")
    if not found.startswith(("http://", "https://")):
        raise SpecError(f"the Kubeflow host {found!r} is not a URL; write it like https://kubeflow.example/pipeline")
    return found


def _state(state: Any) -> str:
    return _ENDED.get(str(state), str(state or "pending").lower())


def _reason(exc: BaseException) -> str:
    inner = getattr(exc, "reason", None)
    return str(inner or exc)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """kfp's client prints links; ours are in the returned objects."""
    return contextlib.redirect_stdout(io.StringIO())
