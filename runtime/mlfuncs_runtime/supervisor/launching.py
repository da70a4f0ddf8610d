"""How processes of a revision are started: interpreter, environment and configuration, from its plan."""

from __future__ import annotations

import asyncio
import dataclasses
import os

from mlfuncs.errors import NotFound
from mlfuncs.serving.endpoints import CALL_URL
from mlfuncs.settings import Settings
from mlfuncs_runtime.supervisor.books import Launch
from mlfuncs_runtime.supervisor.places import Places
from mlfuncs_runtime.supervisor.plan import EndpointPlan
from mlfuncs_runtime.worker.config import WorkerConfig

_MOST_DRAIN_S = 3600.0


async def make_launch(plan: EndpointPlan, revision: str, settings: Settings, places: Places, url: str) -> Launch:
    """How to start the workers of a revision. Raises what opening its bundle or making its environment raises."""
    if revision not in plan.revisions:
        raise NotFound(f"revision of endpoint {plan.name!r}", revision, plan.revisions)
    if plan.target == "docker":
        from mlfuncs_runtime.docker.launch import make_docker_launch

        config = worker_config(plan, revision, "").to_dict()
        return await asyncio.to_thread(make_docker_launch, plan, revision, config, settings, places)
    own = dataclasses.replace(settings, project=plan.project)
    python = await asyncio.to_thread(_python_of, plan.digests[revision], own)
    log = places.endpoint_log(plan.name, revision)
    env = {**os.environ, **own.to_environ(), CALL_URL: f"{url}/{{name}}"}
    return Launch(python, worker_config(plan, revision, str(log)).to_dict(), env, log)


def worker_config(plan: EndpointPlan, revision: str, log_path: str) -> WorkerConfig:
    """What a worker of a revision is told, except its own name and socket."""
    config = plan.revisions[revision]
    spec = config.spec
    limits = plan.options.get("limits") or {}
    bounds = {key: limits[key] for key in ("queue_size", "body_bytes") if key in limits}
    return WorkerConfig(
        endpoint=plan.name,
        project=plan.project,
        revision=revision,
        bundle=plan.digests[revision],
        init_args={name: dict(ref) for name, ref in config.init_args.items()},
        env=dict(spec.env),
        secrets=spec.secrets,
        features=spec.features,
        feature_sample_rate=spec.feature_sample_rate,
        timeout_s=spec.timeout_s,
        drain_s=min(spec.timeout_s, _MOST_DRAIN_S),
        batch=spec.batch,
        concurrency=spec.scale.concurrency,
        resources=spec.resources,
        log_path=log_path,
        **bounds,
    )


def _python_of(digest: str, settings: Settings) -> str:
    from mlfuncs.bundles.bundle import open_bundle

    return str(open_bundle(digest, settings).python())
