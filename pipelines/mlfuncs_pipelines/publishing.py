"""Bundles on their way to a cluster: those that do not travel inside the pipeline file are pushed for the pods."""

from __future__ import annotations

from mlfuncs.bundles import store
from mlfuncs.errors import SpecError
from mlfuncs.settings import Settings
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.lightweight import OurStep, recognise_step


def push_bundles(pipeline: Pipeline, settings: Settings) -> None:
    """Put the bundles that steps fetch by digest where pods find them.

    Raises SpecError when pods could not reach them, StorageError when they cannot be written.
    """
    fetched = {step.bundle: label for label, step in _steps(pipeline).items() if not step.inline}
    if fetched and "://" not in settings.artifacts_url:
        names = ", ".join(sorted(label.removeprefix("exec-") for label in fetched.values()))
        raise SpecError(
            f"the code of {names} is too large to travel inside the pipeline, and pods cannot fetch it from "
            f"{settings.resolved_artifacts_url!r}: set MLFUNCS_ARTIFACTS_URL to a URL that pods can read, like "
            "s3://bucket/artifacts"
        )
    for digest in fetched:
        found = store.find(digest, settings)
        signature = (found.folder / store.SIGNATURE).read_bytes()
        store.push(digest, found.content, signature, settings)


def _steps(pipeline: Pipeline) -> dict[str, OurStep]:
    found = {label: recognise_step(body.get("container", {})) for label, body in pipeline.executors.items()}
    return {label: step for label, step in found.items() if step is not None}
