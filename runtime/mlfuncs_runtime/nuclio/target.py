"""The target "nuclio": endpoints as functions of a Nuclio dashboard, deployed by nuclio-jupyter's own calls."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import requests
from nuclio.deploy import delete_func, deploy_config, find_dashboard_url, get_deploy_status, get_function
from nuclio.utils import DeployError

from mlfuncs.errors import DeployFailed, Forbidden, NotFound, SpecError, Unavailable
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.serving.rollouts import complete_rollout, fail_rollout, outcome_of, serving_revision
from mlfuncs.serving.targets import EndpointStatus, ReplicaStatus, Report
from mlfuncs.settings import Settings
from mlfuncs_runtime.manifests.nuclio import render_nuclio
from mlfuncs_runtime.manifests.workload import Workload
from mlfuncs_runtime.nuclio.code import nuclio_code

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow

POLL_S = 1.0
_STATES = {"ready": "ready", "scaledToZero": "idle", "error": "failing", "unhealthy": "failing", "imported": "stopped"}
_ANNOTATION = "mlfuncs.dev/revision"


class NuclioTarget:
    """One Nuclio function an endpoint; a function has one revision at a time."""

    def __init__(self, settings: Settings) -> None:
        if not settings.nuclio_dashboard:
            raise SpecError("target 'nuclio' needs a dashboard: set MLFUNCS_NUCLIO_DASHBOARD, e.g. http://host:8070")
        self._settings, self._url = settings, settings.nuclio_dashboard.rstrip("/")
        self.poll_s = POLL_S

    def apply(self, row: EndpointRow) -> None:
        """Send the revision that should serve to the dashboard, unless it has it. Returns before it is built."""
        desired, rollout = row.desired, row.desired.get("rollout")
        shares = dict((rollout or desired).get("traffic") or {})
        if not shares:
            return
        try:
            if len(shares) > 1:
                raise SpecError(
                    f"endpoint {row.name!r}: a Nuclio function has one revision at a time, not a split of "
                    f"{', '.join(shares)}; the targets 'process', 'docker' and 'knative' can split"
                )
            revision = serving_revision(shares)
            if self._deployed(row) != revision or rollout:
                self._deploy(row, revision)
        except (SpecError, Unavailable, Forbidden, DeployFailed) as exc:
            if rollout:
                self._end(row, rollout["id"], str(exc))
            raise

    def wait(self, row: EndpointRow, rollout: str, timeout_s: float, report: Report) -> None:
        """Return when the function is ready. Raises DeployFailed with what Nuclio said."""
        deadline, last = time.monotonic() + timeout_s, time.time() * 1000.0
        state = "waiting"
        while time.monotonic() < deadline:
            with _translated(self._url, row.name):
                state, _address, last, said = get_deploy_status(self._api, row.name, last, resolve_address=False)
            if state in ("ready", "scaledToZero"):
                self._end(row, rollout, "")
                return
            if state in ("error", "unhealthy"):
                reason = "\n".join(said) or state
                self._end(row, rollout, reason)
                raise DeployFailed(f"endpoint {row.name!r}: Nuclio calls it {state!r}: {reason}")
            report(f"Nuclio: {said[-1] if said else state}")
            time.sleep(self.poll_s)
        reason = f"not ready after {timeout_s:g} s (Nuclio calls it {state!r})"
        self._end(row, rollout, reason)
        raise DeployFailed(f"endpoint {row.name!r}: {reason}")

    def url(self, row: EndpointRow) -> str:
        """The function's external address, else the one inside the cluster."""
        status = (self._function(row.name) or {}).get("status") or {}
        addresses = [*(status.get("externalInvocationUrls") or ()), *(status.get("internalInvocationUrls") or ())]
        return f"http://{addresses[0]}" if addresses else f"http://nuclio-{row.name}:8080"

    def status(self, row: EndpointRow) -> EndpointStatus:
        """What Nuclio says of the function."""
        found = self._function(row.name) or {}
        status = found.get("status") or {}
        state = str(status.get("state", ""))
        traffic = dict(row.desired.get("traffic") or {})
        revision = serving_revision(traffic)
        replicas = (ReplicaStatus(row.name, revision, "ready"),) if state == "ready" else ()
        return EndpointStatus(
            row.name,
            self.url(row),
            revision,
            _STATES.get(state, "starting" if found else "stopped"),
            str(status.get("message") or ""),
            traffic,
            replicas,
            tuple(known.revision for known in row.revisions),
            {},
            row.project,
        )

    def logs(self, row: EndpointRow, n: int, follow: bool) -> Iterator[str]:
        """The last lines of the function's deploy log, which is what the dashboard keeps."""
        status = (self._function(row.name) or {}).get("status") or {}
        lines = [f"({line.get('level')}) {line.get('message')}" for line in status.get("logs") or ()]
        return iter(lines[-n:])

    def delete(self, row: EndpointRow) -> None:
        """Delete the function."""
        from mlfuncs.registry import open_registry

        if self._function(row.name) is not None:
            with _translated(self._url, row.name), contextlib.redirect_stdout(None):
                delete_func(row.name, self._url)
        open_registry(self._settings).endpoints.purge(row)

    @property
    def _api(self) -> str:
        return str(find_dashboard_url(self._url))

    def _deploy(self, row: EndpointRow, revision: str) -> None:
        config = json.loads(json.dumps(nuclio_function(row, revision, self._settings)))
        config["metadata"].setdefault("annotations", {})[_ANNOTATION] = revision
        logging.getLogger("nuclio").setLevel(logging.WARNING)
        with _translated(self._url, row.name):
            deploy_config(config, self._url, name=row.name, project=row.project, create_new=True, watch=False)

    def _deployed(self, row: EndpointRow) -> str:
        metadata = (self._function(row.name) or {}).get("metadata") or {}
        return str((metadata.get("annotations") or {}).get(_ANNOTATION, ""))

    def _function(self, name: str) -> dict[str, Any] | None:
        with _translated(self._url, name):
            answer = get_function(self._api, name)
        found: dict[str, Any] | None = answer.json() if answer.ok else None
        return found

    def _end(self, row: EndpointRow, rollout: str, failure: str) -> None:
        from mlfuncs.registry import open_registry

        def change(desired: dict[str, Any], _row: EndpointRow) -> dict[str, Any]:
            return fail_rollout(desired, rollout, failure) if failure else complete_rollout(desired, rollout)

        after = open_registry(self._settings).endpoints.update(row.name, change)
        if not failure and outcome_of(after.desired, rollout).state != "complete":
            raise DeployFailed(f"endpoint {row.name!r}: another change of its traffic came in between")


def nuclio_function(row: EndpointRow, revision: str, settings: Settings) -> dict[str, Any]:
    """The Nuclio function of a revision. Raises SpecError for one with constructor values, which Nuclio cannot bind."""
    found = row.revision(revision)
    config = RevisionConfig.from_dict(found.config)
    if config.init_args:
        raise SpecError(
            f"{row.name!r} binds {', '.join(config.init_args)} to its constructor: load them in the constructor "
            "instead, or use another target"
        )
    workload = Workload(
        row.name, row.project, revision, "", config.spec, settings.kubernetes_namespace, {revision: 100}
    )
    return render_nuclio(workload, nuclio_code(found.digest, settings))


@contextlib.contextmanager
def _translated(url: str, name: str) -> Iterator[None]:
    """nuclio-jupyter's errors as ours."""
    try:
        yield
    except DeployError as exc:
        answer = getattr(exc, "response", None)
        said = getattr(answer, "text", "") or str(exc)
        if getattr(answer, "status_code", 0) in (401, 403):
            raise Forbidden(f"the Nuclio dashboard {url} refuses {name!r}: {said}; check its credentials") from exc
        raise DeployFailed(f"Nuclio did not take {name!r}: {exc}: {said}") from exc
    except KeyError as exc:
        raise NotFound("Nuclio function", name) from exc
    except (requests.RequestException, OSError) as exc:
        if str(exc).endswith(("401", "403")):  # "nuclio API call failed. status code: 403"
            raise Forbidden(f"the Nuclio dashboard {url} refuses: {exc}; check its credentials") from exc
        raise Unavailable(
            f"the Nuclio dashboard {url} does not answer ({exc}): check MLFUNCS_NUCLIO_DASHBOARD"
        ) from exc
