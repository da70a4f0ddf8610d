"""Who uses features: functions and endpoints that are handed them, runs that trained on them, models those runs made.

Owns: the way from a view or service to what was built on it, read from the registry; and the note a training run keeps
of the table versions it read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlfuncs.registry import Registry
    from mlfuncs.settings import Settings

PARAM = "features."  # a run's parameter features.<view> is the table version it read
RECENT_RUNS = 500


def note_versions(versions: Mapping[str, int]) -> None:
    """Inside a run, keep the table versions a training set read as its parameters; elsewhere do nothing."""
    from mlfuncs.runs.tracking import current_run, log_params

    if current_run() is not None:
        log_params({f"{PARAM}{view}": version for view, version in versions.items()})


def consumers(registry: Registry, names: Collection[str], settings: Settings) -> list[str]:
    """Functions, endpoints, runs and models built on the views or services `names`, as "kind:name".

    Runs are looked for among the newest 500.
    """
    found = [*_served(registry, names), *_trained(registry, names, settings)]
    return list(dict.fromkeys(found))


def _served(registry: Registry, names: Collection[str]) -> Iterator[str]:
    digests = set()
    for name in registry.functions.names():
        for version in registry.functions.versions(name):
            asked = (version.manifest.get("spec") or {}).get("features") or ()
            if any(reference.partition(":")[0].partition("@")[0] in names for reference in asked):
                digests.add(version.digest)
                yield f"function:{name}"
    for endpoint in registry.endpoints.list():
        if any(revision.digest in digests for revision in endpoint.revisions):
            yield f"endpoint:{endpoint.name}"


def _trained(registry: Registry, names: Collection[str], settings: Settings) -> Iterator[str]:
    from mlfuncs.runs.values import as_handle

    runs = [run.id for run in registry.runs.list(limit=RECENT_RUNS)]
    for run_id, contents in registry.runs.contents(runs).items():
        if not any(f"{PARAM}{name}" in contents.params for name in names):
            continue
        yield f"run:{run_id}"
        made = {**contents.artifacts.get("output", {}), **contents.artifacts.get("logged", {})}
        for name, document in made.items():
            if getattr(as_handle(document, settings), "kind", "") == "model":
                yield f"model:{run_id}/{name}"
