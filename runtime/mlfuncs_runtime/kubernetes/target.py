"""The target "kubernetes": endpoints as objects of a cluster, applied by whoever deploys.

There is no reconciler of ours in the cluster: its own controllers keep what was applied. A rollout adds the new
revision's objects beside what serves, waits until the cluster calls them ready, then moves the traffic, and removes
what the endpoint no longer has. When it fails, the new revision's objects go and the registry says why.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import DeployFailed, Forbidden, MlfuncsError
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.serving.rollouts import complete_rollout, fail_rollout, outcome_of, serving_revision
from mlfuncs.serving.targets import EndpointStatus, ReplicaStatus, Report
from mlfuncs.settings import Settings
from mlfuncs_runtime.kubernetes.cluster import Cluster, Manifest, kind_of
from mlfuncs_runtime.kubernetes.evidence import explain_pods
from mlfuncs_runtime.kubernetes.images import cluster_image, push_image
from mlfuncs_runtime.kubernetes.pod_failures import Failure
from mlfuncs_runtime.manifests.kubernetes import render_kubernetes, split_warning
from mlfuncs_runtime.manifests.routing import INTERCEPTOR_PORT, KubernetesOptions
from mlfuncs_runtime.manifests.workload import MANAGER, Workload

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow
    from mlfuncs_runtime.images.builder import ImageBuilder

POLL_S = 1.0
_LOG_LINES = 20
REVISION = "mlfuncs.dev/revision"


class KubernetesTarget:
    """Deployment, Service, autoscaler and guards for each revision."""

    KINDS: tuple[str, ...] = (
        "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service", "NetworkPolicy", "ServiceAccount",
        "ScaledObject", "InterceptorRoute", "HTTPRoute",
    )  # fmt: skip
    _OPTIONAL = ("ScaledObject", "InterceptorRoute", "HTTPRoute")  # kinds that a cluster need not have

    def __init__(self, settings: Settings, cluster: Cluster | None = None, builder: ImageBuilder | None = None) -> None:
        self._settings, self._builder = settings, builder
        self._cluster = cluster or Cluster(settings.kubernetes_namespace)
        self._options = KubernetesOptions.of(settings)
        self.poll_s = POLL_S

    def apply(self, row: EndpointRow) -> None:
        """Apply what the row wishes; the revisions of a rollout beside what serves, without traffic yet."""
        rollout = row.desired.get("rollout")
        if split := self._split_warning(dict((rollout or row.desired).get("traffic") or {})):
            warnings.warn(f"endpoint {row.name!r}: {split}", stacklevel=2)
        try:
            for revision in _coming(row):
                push_image(row, revision, self._settings, self._builder, lambda _note: None)
            for manifest in self._manifests(row):
                self._cluster.apply(manifest)
        except MlfuncsError as exc:
            if rollout:
                self._fail(row, rollout["id"], str(exc))
            raise
        if not rollout:
            self._prune(row)

    def wait(self, row: EndpointRow, rollout: str, timeout_s: float, report: Report) -> None:
        """Return when the rollout's revisions are ready and the traffic is theirs.

        Raises DeployFailed: at once for what no waiting mends, else, e.g. for a pod that fits on no node yet, after
        `timeout_s` with the reason as it is then.
        """
        deadline = time.monotonic() + timeout_s
        waiting = "waiting"
        while time.monotonic() < deadline:
            states = [self._ready(row, revision) for revision in _coming(row)]
            failure = next((state for state in states if state is not None and state.is_hopeless), None)
            if failure is not None:
                self._give_up(row, rollout, failure)
            if all(state is None for state in states):
                self._complete(row, rollout)
                return
            waiting = "; ".join(state.reason for state in states if state is not None)
            report(waiting)
            time.sleep(self.poll_s)
        self._give_up(row, rollout, Failure(f"not ready after {timeout_s:g} s ({waiting})"))

    def url(self, row: EndpointRow) -> str:
        """The address at the gateway's domain when there is one, else the one inside the cluster."""
        if self._options.domain:
            return f"http://{row.name}.{self._options.domain}"
        port = f":{INTERCEPTOR_PORT}" if self._options.keda else ""
        return f"http://{row.name}.{self._cluster.namespace}.svc.cluster.local{port}"

    def status(self, row: EndpointRow) -> EndpointStatus:
        """What the cluster runs now."""
        pods = self._cluster.find("Pod", self._labels(row))
        replicas = tuple(
            ReplicaStatus(pod["metadata"]["name"], pod["metadata"]["labels"].get(REVISION, ""), _pod_state(pod))
            for pod in pods
        )
        traffic = dict(row.desired.get("traffic") or {})
        failures = [self._ready(row, revision) for revision in traffic]
        failing = next((state for state in failures if isinstance(state, Failure) and state.final), None)
        return EndpointStatus(
            row.name,
            self.url(row),
            serving_revision(traffic),
            _state(traffic, replicas, failing),
            failing.reason if failing else "",
            traffic,
            replicas,
            tuple(revision.revision for revision in row.revisions),
            {},
            row.project,
        )

    def logs(self, row: EndpointRow, n: int, follow: bool) -> Iterator[str]:
        """The last lines of every pod, oldest pod first; with `follow` then those of the newest."""
        pods = sorted(self._cluster.find("Pod", self._labels(row)), key=_age)
        for pod in pods:
            yield from self._cluster.logs(pod["metadata"]["name"], n)
        if follow and pods:
            yield from self._cluster.follow(pods[-1]["metadata"]["name"])

    def delete(self, row: EndpointRow) -> None:
        """Delete every object of the endpoint."""
        from mlfuncs.registry import open_registry

        self._prune(row, everything=True)
        open_registry(self._settings).endpoints.purge(row)

    # --- what differs between the two targets

    def _take_back(self, row: EndpointRow) -> None:
        """After a failure: the new revision's objects are its own, and go."""
        self._prune(row)

    def _split_warning(self, traffic: dict[str, int]) -> str:
        return split_warning(traffic, "", self._options)

    def _manifests(self, row: EndpointRow) -> list[Manifest]:
        """Every object of the row, each once; shared ones, e.g. the main Service, follow what has traffic."""
        found: dict[tuple[str, str], Manifest] = {}
        for revision in wanted_revisions(row):
            for manifest in render_kubernetes(self._workload(row, revision), self._options):
                found.setdefault((kind_of(manifest), manifest["metadata"]["name"]), manifest)
        return list(found.values())

    def _ready(self, row: EndpointRow, revision: str) -> Failure | None:
        """None when the revision is ready, else what it waits for, or why it never will be."""
        deployment = self._cluster.get("Deployment", f"{row.name}-{revision}")
        if deployment is None:
            return Failure(f"{revision}: its Deployment is gone")
        status = deployment.get("status") or {}
        seen = int(status.get("observedGeneration", 0)) >= int(deployment["metadata"].get("generation", 0))
        least = RevisionConfig.from_dict(row.revision(revision).config).spec.scale.min
        ready, now = int(status.get("readyReplicas") or 0), int(deployment["spec"].get("replicas", 1))
        wished = max(1, now, least)  # its autoscaler brings it to the least some seconds after it was made
        if seen and (ready >= wished or (now == least == 0 and self._options.keda)):
            return None  # at zero it is ready too: a request brings it back
        pods = self._cluster.find("Pod", {**self._labels(row), REVISION: revision})
        failure = explain_pods(self._cluster, deployment, pods) if seen else None
        return failure or Failure(f"{revision}: {ready} of {wished} pods ready", final=False)

    # --- shared

    def _workload(self, row: EndpointRow, revision: str) -> Workload:
        config = RevisionConfig.from_dict(row.revision(revision).config)
        traffic = dict(row.desired.get("traffic") or {})
        return Workload(
            row.name,
            row.project,
            revision,
            cluster_image(row, revision, self._settings),
            config.spec,
            self._cluster.namespace,
            traffic or {revision: 100},
            dict(row.desired.get("tags") or {}),
            min(config.spec.timeout_s, 3600.0),
        )

    def _complete(self, row: EndpointRow, rollout: str) -> None:
        from mlfuncs.registry import open_registry

        endpoints = open_registry(self._settings).endpoints
        after = endpoints.update(row.name, lambda desired, _row: complete_rollout(desired, rollout))
        outcome = outcome_of(after.desired, rollout)
        if outcome.state != "complete":
            raise DeployFailed(f"endpoint {row.name!r}: {outcome.message}")
        for manifest in self._manifests(after):
            self._cluster.apply(manifest)
        self._prune(after)

    def _give_up(self, row: EndpointRow, rollout: str, failure: Failure) -> None:
        lines = self._cluster.logs(failure.pod, _LOG_LINES, previous=True) if failure.pod else []
        lines = lines or (self._cluster.logs(failure.pod, _LOG_LINES) if failure.pod else [])
        self._fail(row, rollout, failure.reason)
        serving = row.desired.get("traffic")
        kept = f"; {', '.join(serving)} still serves" if serving else ""
        log = "\nlast lines of its log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""
        raise DeployFailed(f"endpoint {row.name!r}: {failure.reason}{kept}{log}")

    def _fail(self, row: EndpointRow, rollout: str, reason: str) -> None:
        """Write the failure down, and bring the objects back to what serves."""
        from mlfuncs.registry import open_registry

        endpoints = open_registry(self._settings).endpoints
        after = endpoints.update(row.name, lambda desired, _row: fail_rollout(desired, rollout, reason))
        with suppress(MlfuncsError):  # what brought us here may stand in the way of this too
            self._take_back(after)

    def _prune(self, row: EndpointRow, everything: bool = False) -> None:
        """Delete objects of the endpoint that it no longer has."""
        kept = set() if everything else {(kind_of(m), m["metadata"]["name"]) for m in self._manifests(row)}
        labels = {**self._labels(row), "app.kubernetes.io/managed-by": MANAGER}
        for kind in self.KINDS:
            with suppress(*((Forbidden,) if kind in self._OPTIONAL else ())):  # a Role of a cluster without it
                for found in self._cluster.find(kind, labels):
                    if (kind, found["metadata"]["name"]) not in kept:
                        self._cluster.delete(kind, found["metadata"]["name"])

    def _labels(self, row: EndpointRow) -> dict[str, str]:
        return {"app.kubernetes.io/name": row.name, "app.kubernetes.io/part-of": row.project}


def _coming(row: EndpointRow) -> list[str]:
    """The revisions that a rollout leads to."""
    return list((row.desired.get("rollout") or {}).get("traffic") or {})


def wanted_revisions(row: EndpointRow) -> list[str]:
    """Revisions that must exist in the cluster, the one that serves first."""
    desired = row.desired
    traffic = dict(desired.get("traffic") or {})
    first = [serving_revision(traffic)] if traffic else []
    names = [*first, *traffic, *(desired.get("tags") or {}).values(), *_coming(row)]
    return list(dict.fromkeys(names))


def condition_of(found: Manifest, kind: str) -> dict[str, Any] | None:
    """The condition of that type in an object's status; None while its controller has not set one."""
    conditions = (found.get("status") or {}).get("conditions") or ()
    return next((condition for condition in conditions if condition["type"] == kind), None)


def _pod_state(pod: Manifest) -> str:
    if pod["metadata"].get("deletionTimestamp"):
        return "stopping"
    ready = condition_of(pod, "Ready")
    return "ready" if ready and ready["status"] == "True" else "starting"


def _state(traffic: dict[str, int], replicas: tuple[ReplicaStatus, ...], failing: Failure | None) -> str:
    if not traffic:
        return "empty"
    if any(replica.state == "ready" for replica in replicas):
        return "ready"
    if failing:
        return "failing"
    return "starting" if replicas else "idle"


def _age(pod: Manifest) -> str:
    return str(pod["metadata"].get("creationTimestamp", ""))
