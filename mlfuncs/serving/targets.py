"""The port to what serves endpoints: processes on this machine, containers, or a cluster.

The registry says what should be served; a target brings it about and tells what runs. `MemoryTarget` is the fake that
ships with the package, for tests of code that deploys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlfuncs import adapters
from mlfuncs.errors import NotFound
from mlfuncs.serving.rollouts import complete_rollout, outcome_of, serving_revision
from mlfuncs.settings import Settings

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow

Report = Callable[[str], None]


@dataclass(frozen=True)
class ReplicaStatus:
    """One worker: `state` is "starting", "ready", "parked", "draining", "stopping"; `pid` is None off this machine."""

    id: str
    revision: str
    state: str
    pid: int | None = None


@dataclass(frozen=True)
class EndpointStatus:
    """What runs for one endpoint.

    `state` is "ready" (answers), "idle" (at zero, answers when asked), "starting", "failing" (restarts again and
    again; `message` says why), "stopped" (nothing reconciles it now) or "empty" (no revision has traffic).
    `load` has, while known: queued, in_flight, rps, p50_ms, p99_ms, desired, panicking.
    """

    name: str
    url: str
    revision: str
    state: str
    message: str = ""
    traffic: Mapping[str, int] = field(default_factory=dict)
    replicas: tuple[ReplicaStatus, ...] = ()
    revisions: tuple[str, ...] = ()
    load: Mapping[str, Any] = field(default_factory=dict)
    project: str = ""
    triggers: Sequence[Mapping[str, Any]] = ()  # kind, label, state, counts and last error of each

    def _repr_html_(self) -> str:
        from mlfuncs.serving.endpoints import status_html

        return status_html(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "replicas": [asdict(r) for r in self.replicas], "revisions": list(self.revisions)}


class Target(Protocol):
    """Serves endpoints; made with the settings. Every method raises MlfuncsError classes only."""

    def apply(self, row: EndpointRow) -> None:
        """Begin to bring what runs to the registry's word; returns before it is done."""

    def wait(self, row: EndpointRow, rollout: str, timeout_s: float, report: Report) -> None:
        """Return when that rollout is complete, telling `report` what is waited for. Raises DeployFailed."""

    def url(self, row: EndpointRow) -> str:
        """Where requests for the endpoint go."""

    def status(self, row: EndpointRow) -> EndpointStatus:
        """What runs now."""

    def logs(self, row: EndpointRow, n: int, follow: bool) -> Iterator[str]:
        """The last `n` lines its workers wrote, and with `follow` every further one, without line ends."""

    def delete(self, row: EndpointRow) -> None:
        """Take down all that runs for a deleted endpoint; returns when it is down and purged."""


def open_target(name: str, settings: Settings) -> Target:
    """The target of that name. Raises NotFound for an unknown one, MissingExtra when its extra is absent."""
    if name == "memory":
        return MemoryTarget(settings)
    known = [key.partition(":")[2] for key in adapters.ADAPTERS if key.startswith("target:")]
    if name not in known:
        raise NotFound("target", name, known)
    target: Target = adapters.load(f"target:{name}")(settings)
    return target


def router_url(settings: Settings) -> str:
    """The base URL of this home's router: the address it has now, else the one it would take."""
    try:
        found = json.loads((Path(settings.home) / "run" / "router.json").read_text(encoding="utf-8"))
        return str(found["url"])
    except (OSError, ValueError, KeyError):
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        return f"http://{host}:{settings.port}"


class MemoryTarget:
    """Serves nothing: every rollout is complete at once and every endpoint is ready."""

    _served: dict[tuple[str, str, str], dict[str, int]] = {}  # noqa: RUF012  shared, as a real target's processes are

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def apply(self, row: EndpointRow) -> None:
        """Complete the rollout under way."""
        from mlfuncs.registry import open_registry

        rollout = row.desired.get("rollout")
        if rollout:
            row = open_registry(self._settings).endpoints.update(
                row.name, lambda desired, _row: complete_rollout(desired, rollout["id"])
            )
        self._served[self._key(row)] = dict(row.desired["traffic"])

    def wait(self, row: EndpointRow, rollout: str, timeout_s: float, report: Report) -> None:
        """Return: `apply` has done it."""
        from mlfuncs.registry import open_registry

        report(outcome_of(open_registry(self._settings).endpoints.get(row.name).desired, rollout).state)

    def url(self, row: EndpointRow) -> str:
        """An address that nobody listens on."""
        return f"memory://{row.project}/{row.name}"

    def status(self, row: EndpointRow) -> EndpointStatus:
        """Ready with one replica per revision that has traffic, once applied."""
        traffic = self._served.get(self._key(row), {})
        replicas = tuple(ReplicaStatus(f"{row.name}-{revision}", revision, "ready") for revision in traffic)
        names = tuple(revision.revision for revision in row.revisions)
        state = "ready" if traffic else "empty"
        revision = serving_revision(traffic)
        return EndpointStatus(row.name, self.url(row), revision, state, "", traffic, replicas, names, {}, row.project)

    def logs(self, row: EndpointRow, n: int, follow: bool) -> Iterator[str]:
        """No line."""
        return iter(())

    def delete(self, row: EndpointRow) -> None:
        """Forget the endpoint."""
        from mlfuncs.registry import open_registry

        self._served.pop(self._key(row), None)
        open_registry(self._settings).endpoints.purge(row)

    def _key(self, row: EndpointRow) -> tuple[str, str, str]:
        return (str(self._settings.home), row.project, row.name)
