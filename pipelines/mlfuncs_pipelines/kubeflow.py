"""Pipelines on Kubeflow: submit, schedule, publish versions, wait, read outputs and logs, through kfp's own client."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import (
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    RunFailed,
)
from mlfuncs.settings import Settings, read_settings
from mlfuncs_pipelines.kubeflow_client import connect, host_of, translated

if TYPE_CHECKING:
    from mlfuncs_pipelines.pipeline import Pipeline

_ENDED = {"SUCCEEDED": "succeeded", "FAILED": "failed", "CANCELED": "cancelled", "SKIPPED": "cancelled"}


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
    host = host_of(host, settings)
    client = connect(host, settings)
    with compiled(pipeline, params, settings) as path, translated(host):
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
    host = host_of(host, settings)
    expression = six_fields(cron)
    client = connect(host, settings)
    with compiled(pipeline, params, settings) as path, translated(host):
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
    host = host_of(host, settings)
    client = connect(host, settings)
    with compiled(pipeline, None, settings) as path, translated(host):
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


@contextlib.contextmanager
def compiled(pipeline: Pipeline, params: Mapping[str, Any] | None, settings: Settings) -> Iterator[Path]:
    """The pipeline's file, checked together with the parameters if there are any yet, its code where pods fetch it.

    Raises InvalidPipeline, InvalidInput, or SpecError when pods could not fetch the code.
    """
    from mlfuncs_pipelines.inputs import complete_run
    from mlfuncs_pipelines.publishing import push_bundles
    from mlfuncs_pipelines.validate import load_pipeline

    with tempfile.TemporaryDirectory() as folder:
        path = pipeline.compile(Path(folder) / f"{pipeline.name}.yaml")
        loaded = load_pipeline(path)
        if params is not None:
            complete_run(params, loaded)
        push_bundles(loaded, settings)
        yield path


def _state(state: Any) -> str:
    return _ENDED.get(str(state), str(state or "pending").lower())
