"""Why each step of a run would be answered from the cache, or not, if the run were started again now."""

from __future__ import annotations

from mlfuncs.settings import Settings
from mlfuncs_pipelines.cache import Key, StepCache
from mlfuncs_pipelines.run_log import PipelineRun


def explain(run: PipelineRun, settings: Settings) -> dict[str, str]:
    """Step id to "hit" or "miss: why", for the steps of `run` that can be cached.

    What is looked at is the cache now: a deleted artifact shows as a miss.
    """
    cache = StepCache(settings.home / "pipelines" / "cache")
    return {
        step.id: cache.explain(Key(step.cache_parts), run.pipeline, step.id)
        for step in run.steps.values()
        if step.cache_parts
    }
