"""From a call to a run: arguments checked and described, and the run's row, journal and log made."""

from __future__ import annotations

import contextlib
import secrets as randomness
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput, MlfuncsError
from mlfuncs.registry import Registry, RunArtifact, RunRow, open_registry
from mlfuncs.runs.capture import RunLog
from mlfuncs.runs.journal import Journal
from mlfuncs.runs.liveness import this_process
from mlfuncs.runs.records import Record, journal_path, log_path
from mlfuncs.runs.tracking import ActiveRun, enclosing_run
from mlfuncs.runs.values import Artifact, StepArtifact, as_handle, describe, open_store
from mlfuncs.secrets import available_secrets
from mlfuncs.settings import Settings

if TYPE_CHECKING:
    from mlfuncs.decorator import Function


@dataclass(frozen=True)
class Arguments:
    """A call's arguments: `values` for the function, `given` as the caller wrote them (artifacts not loaded)."""

    values: dict[str, Any]
    given: dict[str, Any]
    hints: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> list[RunArtifact]:
        """The arguments that were artifacts."""
        return [
            RunArtifact("input", name, {"artifact": value.ref.to_dict()}, value.digest)
            for name, value in self.given.items()
            if isinstance(value, Artifact)
        ]


@dataclass(frozen=True)
class Place:
    """Where a run stands: its kind, what it is part of, and how it is isolated."""

    kind: str = "run"  # "run", "sweep" or "pipeline"
    isolation: str = "inline"
    parent_id: str | None = None
    pipeline: str | None = None
    step: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """A run that was begun: its row is in the registry, and this process owns it."""

    row: RunRow
    registry: Registry
    record: Record
    active: ActiveRun
    log: RunLog

    def end(self, final: Mapping[str, Any]) -> None:
        """Close the log and write the run's end. With a shared artifact store the log is kept there too."""
        self.log.close()
        settings = self.active.settings
        if settings.artifacts_url and self.log.path.exists():
            with contextlib.suppress(MlfuncsError):  # the store is away: the log stays on this machine
                ref = open_store(settings).put_bytes(self.log.path.read_bytes(), "log")
                final = {**final, "details": {**self.row.details, "log_digest": ref.digest}}
        self.record.finish(dict(final))


def check_arguments(
    function: Function[Any, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    settings: Settings,
    loaded: dict[Any, Any] | None = None,
) -> Arguments:
    """The call's arguments, artifacts loaded and everything validated. Raises InvalidInput.

    `loaded` remembers artifacts from call to call, so that the points of a sweep load a shared one once.
    """
    from mlfuncs.artifacts import ArtifactRef

    signature = function.signature
    if signature.kind == "nuclio":
        raise InvalidInput(f"{signature.name} is a Nuclio handler, which has no parameters to run with: deploy it")
    hints = {parameter.name: parameter.annotation for parameter in signature.parameters}
    given = dict(signature.bind(args, kwargs))
    for name, value in given.items():
        if isinstance(value, ArtifactRef):
            given[name] = as_handle({"artifact": value.to_dict()}, settings)
        elif isinstance(value, StepArtifact):
            given[name] = value.stored()
    loaded = {} if loaded is None else loaded
    actual = dict(given)
    for name, value in given.items():
        if isinstance(value, Artifact):
            if (name, value.digest) not in loaded:
                handle = as_handle({"artifact": value.ref.to_dict()}, settings, _hint(hints.get(name)))
                loaded[name, value.digest] = handle.load()
            actual[name] = loaded[name, value.digest]
    values = signature.validate_python(actual)
    return Arguments(values, {name: given.get(name, value) for name, value in values.items()}, hints)


def begin(
    function: Function[Any, Any],
    arguments: Arguments,
    place: Place,
    settings: Settings,
    versions: Mapping[str, Any] | None = None,
) -> Started:
    """Make the run's row, owned by this process and running, and everything it writes to."""
    registry = open_registry(settings)
    secrets = available_secrets(function.spec.secrets, settings)
    run_id = new_run_id()
    parent = enclosing_run()
    now = time.time()
    row = RunRow(
        id=run_id,
        project=settings.project,
        function=function.spec.name,
        kind=place.kind,
        status="running",
        isolation=place.isolation,
        parent_id=place.parent_id or (parent.id if parent else None),
        pipeline=place.pipeline,
        step=place.step,
        created_at=now,
        started_at=now,
        owner=this_process(),
        versions={**_data_versions(arguments), **(versions or {})},
        details={"log": str(log_path(settings, run_id)), **place.details},
    )
    params = {name: describe(value, secrets) for name, value in arguments.given.items()}
    registry.runs.create(row, params, arguments.inputs)
    journal = Journal(journal_path(settings, run_id))
    active = ActiveRun(run_id, settings, journal, secrets)
    log = RunLog(log_path(settings, run_id), secrets)
    return Started(row, registry, Record(registry, run_id, journal), active, log)


def new_run_id() -> str:
    """20 hex digits that sort by time: milliseconds since the epoch, then 36 random bits."""
    return f"{time.time_ns() // 1_000_000:011x}{randomness.randbits(36):09x}"


def _data_versions(arguments: Arguments) -> dict[str, Any]:
    data = {artifact.name: artifact.digest for artifact in arguments.inputs}
    return {"data": data} if data else {}


def _hint(annotation: Any) -> Any:
    return None if annotation is Any or isinstance(annotation, str) else annotation
