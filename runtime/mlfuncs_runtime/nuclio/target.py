"""The target "nuclio": endpoints as functions of a Nuclio dashboard.

Without an API gateway an endpoint is one function, which has one revision at a time. With one (MLFUNCS_NUCLIO_GATEWAY)
each revision is a function of its own and the gateway splits between two of them; what serves is not touched until the
new function is ready.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import DeployFailed, MlfuncsError, SpecError
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.serving.rollouts import complete_rollout, fail_rollout, outcome_of, serving_revision
from mlfuncs.serving.targets import EndpointStatus, ReplicaStatus, Report
from mlfuncs.settings import Settings
from mlfuncs_runtime.manifests.nuclio import render_api_gateway, render_nuclio
from mlfuncs_runtime.manifests.workload import Workload
from mlfuncs_runtime.nuclio.code import nuclio_code
from mlfuncs_runtime.nuclio.dashboard import Dashboard

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow

POLL_S = 1.0
_STATES = {"ready": "ready", "scaledToZero": "idle", "error": "failing", "unhealthy": "failing", "imported": "stopped"}
_ANNOTATION = "mlfuncs.dev/revision"


class NuclioTarget:
    """One Nuclio function an endpoint, or one a revision behind an API gateway."""

    def __init__(self, settings: Settings) -> None:
        if not settings.nuclio_dashboard:
            raise SpecError("target 'nuclio' needs a dashboard: set MLFUNCS_NUCLIO_DASHBOARD, e.g. http://host:8070")
        self._settings, self._domain = settings, settings.nuclio_gateway
        self._dashboard = Dashboard(settings.nuclio_dashboard, settings.kubernetes_namespace)
        self.poll_s = POLL_S

    def apply(self, row: EndpointRow) -> None:
        """Send the revisions that should serve to the dashboard, unless it has them. Returns before they are built."""
        rollout = row.desired.get("rollout")
        shares = _wished(row)
        if not shares:
            return
        try:
            self._check_split(row, shares)
            for revision in shares:
                if self._deployed(row, revision) != revision or (rollout and not self._domain):
                    self._deploy(row, revision)
            if not rollout:
                self._route(row)
        except MlfuncsError as exc:
            if rollout:
                self._end(row, rollout["id"], str(exc))
            raise

    def wait(self, row: EndpointRow, rollout: str, timeout_s: float, report: Report) -> None:
        """Return when the functions are ready and the traffic is theirs. Raises DeployFailed with what Nuclio said."""
        deadline = time.monotonic() + timeout_s
        for revision in _wished(row):
            reason = self._until_ready(self._name(row, revision), deadline, timeout_s, report)
            if reason:
                self._end(row, rollout, reason)
                serving = ", ".join(row.desired.get("traffic") or {})
                raise DeployFailed(f"endpoint {row.name!r}: {reason}" + (f"; {serving} still serves" * bool(serving)))
        self._end(row, rollout, "")
        if self._domain:
            self._until_routed(row.name, deadline, report)

    def url(self, row: EndpointRow) -> str:
        """The gateway's address, else the function's external one, else the one inside the cluster."""
        if self._domain:
            return f"http://{row.name}.{self._domain}"
        status = (self._dashboard.function(row.name) or {}).get("status") or {}
        addresses = [*(status.get("externalInvocationUrls") or ()), *(status.get("internalInvocationUrls") or ())]
        return f"http://{addresses[0]}" if addresses else f"http://nuclio-{row.name}:8080"

    def status(self, row: EndpointRow) -> EndpointStatus:
        """What Nuclio says of the function that serves, and a replica for each one that is ready."""
        traffic = dict(row.desired.get("traffic") or {})
        serving = serving_revision(traffic)
        found = {revision: self._dashboard.function(self._name(row, revision)) for revision in traffic}
        states = {revision: str(((one or {}).get("status") or {}).get("state", "")) for revision, one in found.items()}
        main = (found.get(serving) or {}).get("status") or {}
        unknown = "starting" if found.get(serving) else "stopped"
        return EndpointStatus(
            row.name,
            self.url(row),
            serving,
            _STATES.get(states.get(serving, ""), unknown),
            str(main.get("message") or ""),
            traffic,
            tuple(ReplicaStatus(self._name(row, r), r, "ready") for r, state in states.items() if state == "ready"),
            tuple(known.revision for known in row.revisions),
            {},
            row.project,
        )

    def logs(self, row: EndpointRow, n: int, follow: bool) -> Iterator[str]:
        """The last lines of the deploy log of what serves, which is what the dashboard keeps."""
        name = self._name(row, serving_revision(dict(row.desired.get("traffic") or {})))
        status = (self._dashboard.function(name) or {}).get("status") or {}
        lines = [f"({line.get('level')}) {line.get('message')}" for line in status.get("logs") or ()]
        return iter(lines[-n:])

    def delete(self, row: EndpointRow) -> None:
        """Delete the gateway first, which Nuclio asks for, and the functions."""
        from mlfuncs.registry import open_registry

        if self._domain:
            self._dashboard.delete_gateway(row.name)
        for name in sorted({self._name(row, known.revision) for known in row.revisions} or {row.name}):
            self._dashboard.delete(name)
        open_registry(self._settings).endpoints.purge(row)

    def _name(self, row: EndpointRow, revision: str) -> str:
        return f"{row.name}-{revision}" if self._domain else row.name

    def _check_split(self, row: EndpointRow, shares: dict[str, int]) -> None:
        if self._domain:
            render_api_gateway(self._workload(row, shares), "")  # refuses what a gateway cannot do
        elif len(shares) > 1:
            raise SpecError(
                f"endpoint {row.name!r}: a Nuclio function has one revision at a time, not a split of "
                f"{', '.join(shares)}: set MLFUNCS_NUCLIO_GATEWAY to the domain of Nuclio's API gateways, or use the "
                "target 'process', 'docker' or 'knative'"
            )

    def _until_ready(self, name: str, deadline: float, timeout_s: float, report: Report) -> str:
        """ "" once the function is ready, else why it is not."""
        last, state = time.time() * 1000.0, "waiting"
        while time.monotonic() < deadline:
            state, last, said = self._dashboard.state(name, last)
            if state in ("ready", "scaledToZero"):
                return ""
            if state in ("error", "unhealthy"):
                found = (self._dashboard.function(name) or {}).get("status") or {}
                reason = "\n".join(said) or str(found.get("message") or state)
                return f"Nuclio calls {name!r} {state!r}: {reason}"
            report(f"Nuclio: {said[-1] if said else state}")
            time.sleep(self.poll_s)
        return f"not ready after {timeout_s:g} s (Nuclio calls {name!r} {state!r})"

    def _until_routed(self, name: str, deadline: float, report: Report) -> None:
        """Return when the gateway routes. Raises DeployFailed when it cannot, or takes too long."""
        state = ""
        while time.monotonic() < deadline:
            state, error = self._dashboard.gateway_state(name)
            if state == "ready":
                return
            if state == "error":
                raise DeployFailed(f"endpoint {name!r}: the functions are ready, and their API gateway fails: {error}")
            report(f"Nuclio: API gateway {state}")
            time.sleep(self.poll_s)
        raise DeployFailed(f"endpoint {name!r}: the functions are ready, and their API gateway is not ({state!r})")

    def _deploy(self, row: EndpointRow, revision: str) -> None:
        name = self._name(row, revision)
        config = json.loads(json.dumps(nuclio_function(row, revision, self._settings, name)))
        config["metadata"].setdefault("annotations", {})[_ANNOTATION] = revision
        self._dashboard.deploy(name, row.project, config)

    def _deployed(self, row: EndpointRow, revision: str) -> str:
        metadata = (self._dashboard.function(self._name(row, revision)) or {}).get("metadata") or {}
        return str((metadata.get("annotations") or {}).get(_ANNOTATION, ""))

    def _route(self, row: EndpointRow) -> None:
        """Behind a gateway: let it split as the row says, and delete the functions that no traffic goes to."""
        traffic = dict(row.desired.get("traffic") or {})
        if not self._domain:
            return
        if traffic:
            self._dashboard.put_gateway(render_api_gateway(self._workload(row, traffic), f"{row.name}.{self._domain}"))
        for known in row.revisions:
            if known.revision not in traffic:
                self._dashboard.delete(self._name(row, known.revision))

    def _workload(self, row: EndpointRow, traffic: dict[str, int]) -> Workload:
        config = RevisionConfig.from_dict(row.revision(next(iter(traffic))).config)
        return Workload(row.name, row.project, "", "", config.spec, self._settings.kubernetes_namespace, traffic)

    def _end(self, row: EndpointRow, rollout: str, failure: str) -> None:
        from mlfuncs.registry import open_registry

        def change(desired: dict[str, Any], _row: EndpointRow) -> dict[str, Any]:
            return fail_rollout(desired, rollout, failure) if failure else complete_rollout(desired, rollout)

        after = open_registry(self._settings).endpoints.update(row.name, change)
        if failure:
            with suppress(MlfuncsError):  # what brought us here may stand in the way of this too
                self._restore(after)
            return
        if outcome_of(after.desired, rollout).state != "complete":
            raise DeployFailed(f"endpoint {row.name!r}: another change of its traffic came in between")
        self._route(after)

    def _restore(self, row: EndpointRow) -> None:
        """After a failure: the functions of what served, as they were."""
        traffic = dict(row.desired.get("traffic") or {})
        if self._domain:
            self._route(row)
        elif traffic and self._deployed(row, "") not in ("", serving_revision(traffic)):
            self._deploy(row, serving_revision(traffic))


def nuclio_function(row: EndpointRow, revision: str, settings: Settings, name: str = "") -> dict[str, Any]:
    """The Nuclio function of a revision; the values that a class is constructed with travel in it."""
    found = row.revision(revision)
    config = RevisionConfig.from_dict(found.config)
    workload = Workload(
        row.name, row.project, revision, "", config.spec, settings.kubernetes_namespace, {revision: 100}
    )
    return render_nuclio(workload, nuclio_code(found.digest, settings, config.init_args), name)


def _wished(row: EndpointRow) -> dict[str, int]:
    return dict((row.desired.get("rollout") or row.desired).get("traffic") or {})
