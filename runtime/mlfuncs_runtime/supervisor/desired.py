"""What the registry wishes of this home, read again when it changes; and what is written back to it."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import TYPE_CHECKING, Any

from mlfuncs.serving.rollouts import complete_rollout, fail_rollout
from mlfuncs.settings import Settings
from mlfuncs_runtime.supervisor.plan import EndpointPlan, Rollout, Verdict

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow, Endpoints

log = logging.getLogger("mlfuncs.supervisor")
SERVED_TARGETS = ("process", "docker")  # what a supervisor keeps; the others are a cluster's


class DesiredState:
    """The endpoints of this home, of every project. Methods block on the database: call them on a thread."""

    def __init__(self, settings: Settings) -> None:
        from mlfuncs.registry import site_id

        self._settings = settings
        self._site = site_id(settings)
        self._lock = threading.Lock()
        self._owners: dict[str, str] = {}  # endpoint -> project that has the name here
        self.generation = -1  # nothing read yet
        self.plans: dict[str, EndpointPlan] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}  # endpoint -> how its last rollout ended
        self.deleted: dict[str, EndpointRow] = {}  # tombstones that still have processes, by name

    @property
    def is_known(self) -> bool:
        """Whether the registry was read at all; before that nothing may be stopped."""
        return self.generation >= 0

    def refresh(self) -> bool:
        """Read what changed; True when something did. Raises RegistryUnavailable."""
        with self._lock:
            changes = self._endpoints().changes(max(self.generation, 0), self._site)
            for row in changes:
                self._take(row)
            before, self.generation = self.generation, max([self.generation, 0, *(row.generation for row in changes)])
            return bool(changes) or before < 0

    def finish(self, plan: EndpointPlan, rollout: Rollout, verdict: Verdict) -> None:
        """Write down how a rollout ended; the traffic moves with it when it is complete."""

        def change(desired: dict[str, Any], _row: EndpointRow) -> dict[str, Any]:
            if verdict.state == "complete":
                return complete_rollout(desired, rollout.id)
            return fail_rollout(desired, rollout.id, verdict.message)

        self._endpoints(plan.project).update(plan.name, change)
        log.info("%s: rollout to %s is %s %s", plan.name, dict(rollout.traffic), verdict.state, verdict.message)
        self.refresh()

    def purge(self, row: EndpointRow) -> None:
        """Remove the tombstone of an endpoint whose processes are gone."""
        self._endpoints(row.project).purge(row)
        with self._lock:
            self.deleted.pop(row.name, None)
            if self._owners.get(row.name) == row.project:
                del self._owners[row.name]
        log.info("%s is deleted", row.name)

    def _take(self, row: EndpointRow) -> None:
        owner = self._owners.get(row.name, row.project)
        if row.target not in SERVED_TARGETS:
            return
        if owner != row.project:
            if row.deleted:
                self._endpoints(row.project).purge(row)
            else:
                log.error("endpoint %r of project %r is not served: %r has the name", row.name, row.project, owner)
            return
        self._owners[row.name] = row.project
        if row.deleted:
            self.plans.pop(row.name, None)
            self.outcomes.pop(row.name, None)
            self.deleted[row.name] = row
        else:
            self.deleted.pop(row.name, None)
            self.plans[row.name] = EndpointPlan.from_row(row)
            self.outcomes[row.name] = dict(row.desired.get("outcome") or {})

    def _endpoints(self, project: str | None = None) -> Endpoints:
        from mlfuncs.registry import open_registry

        settings = dataclasses.replace(self._settings, project=project) if project else self._settings
        return open_registry(settings).endpoints
