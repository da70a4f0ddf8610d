"""Runs as Jobs of a cluster: made, followed through their pods' logs, explained when they fail, deleted on cancel."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from mlfuncs.artifacts import ArtifactStore
from mlfuncs.bundles import store as bundle_store
from mlfuncs.errors import Unavailable
from mlfuncs.runs.elsewhere import Job, Order
from mlfuncs.runs.journal import failed
from mlfuncs.runs.ledger import Ledger
from mlfuncs.settings import Settings
from mlfuncs.signing import project_key
from mlfuncs_runtime.images.function_image import is_shared
from mlfuncs_runtime.kubernetes.attempts import Attempts
from mlfuncs_runtime.kubernetes.cluster import Cluster, Manifest
from mlfuncs_runtime.kubernetes.evidence import explain_pods
from mlfuncs_runtime.kubernetes.images import push_run_image
from mlfuncs_runtime.kubernetes.pod_failures import Failure, why_no_pod
from mlfuncs_runtime.manifests.jobs import KEPT_S, RunJob, render_order, render_run_job

if TYPE_CHECKING:
    from mlfuncs.bundles.bundle import Bundle
    from mlfuncs.spec import FunctionSpec
    from mlfuncs_runtime.images.builder import ImageBuilder

POLL_S = 1.0
PATIENCE_S = 300.0  # guess: how long a cluster may take to add a node, or other work to leave a quota
_ENDING_S = 30.0  # how long the log of a deleted pod may take to end: its grace and some


class KubernetesRuns:
    """Jobs in the namespace of the settings."""

    def __init__(self, settings: Settings, cluster: Cluster | None = None, builder: ImageBuilder | None = None) -> None:
        self._settings, self._builder = settings, builder
        self._cluster = cluster or Cluster(settings.kubernetes_namespace)
        self.poll_s, self.patience_s = POLL_S, PATIENCE_S

    def prepare(self, bundle: Bundle, spec: FunctionSpec) -> str:
        """The image for runs of this environment, pushed when the registry lacks it."""
        return push_run_image(bundle, spec, self._settings, self._builder, _say)

    def submit(self, order: Order) -> None:
        """Make the Job suspended, then its order, which it owns, and let it go."""
        job = self._run_job(order)
        render_order(job, "")  # too large is said before anything is made
        made = self._cluster.apply(render_run_job(job, suspended=True))
        self._cluster.apply(render_order(job, str(made["metadata"]["uid"])))
        self._cluster.apply(render_run_job(job))

    def follow(self, job: Job, ledger: Ledger, cancelled: threading.Event) -> dict[str, Any]:
        """Tell the ledger what the Job's pods say, attempt after attempt, and give the run's end."""
        attempts = Attempts(self._cluster, ledger)
        waiting = _Waiting(self.patience_s)
        ending: float | None = None
        while True:
            if cancelled.is_set() and ending is None:
                self.cancel(job)
                ending = time.monotonic() + _ENDING_S
            try:
                found, pods = self._cluster.get("Job", job.name), self._pods(job)
            except Unavailable as exc:  # the Job does not mind: go on when the cluster answers again
                waiting.note(ledger, str(exc))
                cancelled.wait(self.poll_s)
                continue
            told = attempts.tell(pods, self.poll_s)
            ended = found is None or _condition(found) is not None
            if (ended and told) or (ending is not None and time.monotonic() > ending):
                return self._end(job, found, attempts, ledger, cancelled)
            if not attempts.count and ending is None:
                failure = self._why_waiting(job, pods)
                if waiting.is_over(ledger, failure):
                    self.cancel(job)
                    return failed("NotStarted", failure.reason if failure else "")

    def has_ended(self, job: Job) -> bool:
        """Whether the Job is over or gone."""
        found = self._cluster.get("Job", job.name)
        return found is None or _condition(found) is not None

    def cancel(self, job: Job) -> None:
        """Delete the Job; its pods are asked to stop."""
        self._cluster.delete("Job", job.name)

    def _why_waiting(self, job: Job, pods: list[Manifest]) -> Failure | None:
        if not pods:
            return why_no_pod(self._cluster.events(job.name))
        return explain_pods(self._cluster, {}, pods)

    def _pods(self, job: Job) -> list[Manifest]:
        return self._cluster.find("Pod", {"batch.kubernetes.io/job-name": job.name})

    def _end(
        self, job: Job, found: Manifest | None, attempts: Attempts, ledger: Ledger, cancelled: threading.Event
    ) -> dict[str, Any]:
        said = {**ledger.final, "attempt": attempts.count} if ledger.final else None
        condition = _condition(found or {})
        if cancelled.is_set():
            ended = {**failed("Cancelled", "it was cancelled"), "status": "cancelled"}
        elif said and (said["status"] == "succeeded" or attempts.explain(said) is None):
            return said
        elif found is None:
            ended = _gone(job, attempts.count)
        elif condition and condition.get("reason") == "DeadlineExceeded":
            ended = failed("DeadlineExceeded", f"its Job took too long in all ({condition.get('message', '')})")
        elif condition and condition["type"] == "Complete":
            ended = failed("ResultLost", "its pod ended well, but the end of its log, with the result, is gone")
        else:
            reason = attempts.explain(said) or str((condition or {}).get("message", ""))
            ended = failed("ProcessDied", f"its pod failed: {reason}")
        return {**ended, **({"attempt": attempts.count} if attempts.count else {})}

    def _run_job(self, order: Order) -> RunJob:
        settings, spec = self._settings, order.spec
        shared = is_shared(settings)
        digests = [value["artifact"]["digest"] for value in order.values.values() if "artifact" in value]
        files: dict[str, bytes] = {}
        archive = order.bundle.path.read_bytes()
        signature = order.bundle.path.with_name(bundle_store.SIGNATURE).read_bytes()
        if shared:
            bundle_store.push(order.bundle.digest, archive, signature, settings)
        else:
            files = {bundle_store.ARCHIVE: archive, bundle_store.SIGNATURE: signature}
            store = ArtifactStore.open(settings)
            files |= {f"object-{digest}": store.read_bytes(digest) for digest in digests}
        content = {
            "run": order.job.run,
            "bundle": order.bundle.digest,
            "values": dict(order.values),
            "inputs": digests,
            "env": dict(spec.env),
            "secrets": list(spec.secrets),
            "timeout_s": order.timeout_s,
            "shared": shared,
        }
        return RunJob(
            order.job.name, order.job.function, settings.project, order.job.run, order.job.namespace, order.image,
            spec, order.timeout_s, content, files, self._environ(shared),
        )  # fmt: skip

    def _environ(self, shared: bool) -> dict[str, str]:
        """What the pod's interpreter is told; no token, no path of this machine."""
        settings = self._settings
        trusted = {project_key(settings).public, *filter(None, map(str.strip, settings.trusted_keys.split(",")))}
        return {
            "MLFUNCS_PROJECT": settings.project,
            "MLFUNCS_TRUSTED_KEYS": ",".join(sorted(trusted)),
            "MLFUNCS_LOG_LEVEL": settings.log_level,
            **({"MLFUNCS_ARTIFACTS_URL": settings.artifacts_url} if shared else {}),
        }


class _Waiting:
    """What keeps a Job from starting: said once each, and borne until it is hopeless or has lasted too long."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._noted, self._since = patience_s, "", time.monotonic()

    def note(self, ledger: Ledger, reason: str) -> None:
        """Write a new reason into the run's log."""
        if reason != self._noted:
            self._noted = reason
            ledger.text(f"mlfuncs: waiting: {reason}\n")

    def is_over(self, ledger: Ledger, failure: Failure | None) -> bool:
        """Whether waiting longer for this is of no use."""
        if failure is None:
            return False
        if failure.may_pass and time.monotonic() < self._since + self._patience_s:
            self.note(ledger, failure.reason)
            return False
        return failure.final


def _condition(job: Manifest) -> dict[str, Any] | None:
    """The condition that says that the Job is over."""
    conditions: list[dict[str, Any]] = (job.get("status") or {}).get("conditions") or []
    over = [item for item in conditions if item["type"] in ("Complete", "Failed") and item["status"] == "True"]
    return over[0] if over else None


def _gone(job: Job, attempts: int) -> dict[str, Any]:
    if attempts:
        return {**failed("Cancelled", f"its Job {job.name} was deleted from the cluster"), "status": "cancelled"}
    return failed(
        "JobGone",
        f"its Job {job.name} is not in namespace {job.namespace!r}: it was deleted, or it ended more than "
        f"{KEPT_S // 3600} hours ago",
    )


def _say(note: str) -> None:
    print(f"mlfuncs: {note}", file=sys.stderr, flush=True)
