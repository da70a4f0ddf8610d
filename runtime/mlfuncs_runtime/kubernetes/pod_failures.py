"""Why pods do not become ready, from their status, for people; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")

_NOT_THERE = ("not found", "non-existent")
_REFUSALS = (  # a word of the API server's -> how to mend it
    ("exceeded quota", "lower resources or scale, or have the quota raised"),
    ("must specify", "the namespace's quota asks for resources: set resources.cpu and resources.memory"),
    ("violates PodSecurity", "leave out what pod.volumes has beyond the restricted standard, e.g. hostPath"),
    ("usage per Container", "keep resources.cpu and resources.memory within the namespace's LimitRange"),
    ("admission webhook", "ask whoever runs that webhook in the cluster"),
    ("priority class", "name a pod.priority_class that the cluster has"),
)


@dataclass(frozen=True)
class Failure:
    """What is wrong, with the cluster's own words; `pod` is where the log is, "" when none has one."""

    reason: str
    pod: str = ""
    final: bool = True  # waiting longer would not help
    may_pass: bool = False  # unless something else in the cluster changes: a node is added, other work ends

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing but another deploy or run mends it."""
        return self.final and not self.may_pass


def failure_of(deployment: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> Failure | None:
    """The first thing that keeps a deployment from being ready, or None while it may just need time."""
    for condition in (deployment.get("status") or {}).get("conditions") or ():
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            message = str(condition.get("message", ""))
            return _refused(message)
        if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return _of_pods(pods) or Failure(str(condition.get("message", "it made no progress in time")))
    return _of_pods(pods)


def why_no_pod(events: Sequence[str]) -> Failure | None:
    """What the events of a Job without pods say; None when there is nothing wrong yet."""
    refused = next((event for event in reversed(events) if event.startswith("FailedCreate: ")), None)
    if refused is None:
        return None
    return _refused(refused.removeprefix("FailedCreate: "))


def why_not_mounted(events: Sequence[str]) -> Failure | None:
    """What the events of a pod say whose containers are being made: a Secret, a key or a claim that is not there."""
    for event in reversed(events):
        reason, _, message = event.partition(": ")
        if reason == "FailedMount" and any(word in message for word in _NOT_THERE):
            return Failure(f"a volume cannot be mounted: {message}; make what it names, in the same namespace")
    return None


def being_made(pods: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of pods that wait for their containers, e.g. for volumes, and do not say for what."""
    return [str(pod["metadata"]["name"]) for pod in pods if "ContainerCreating" in _waiting_for(pod)]


def _waiting_for(pod: Mapping[str, Any]) -> list[str]:
    containers = (pod.get("status") or {}).get("containerStatuses") or ()
    return [((c.get("state") or {}).get("waiting") or {}).get("reason", "") for c in containers]


def _refused(message: str) -> Failure:
    """What the API server said when it refused a pod, and what to do."""
    mend = next((mend for word, mend in _REFUSALS if word in message), "see the namespace's events")
    return Failure(f"no pod can be made: {message}; {mend}", may_pass="exceeded quota" in message)


def how_it_ended(pod: Mapping[str, Any]) -> str | None:
    """Why a pod's function ended without having said so: memory, eviction, an exit code; None when it did not."""
    status = pod.get("status") or {}
    for container in status.get("containerStatuses") or ():
        ended = _ended(container)
        if ended:
            return _how(ended).removeprefix(": ").strip() or "it ended"
    if status.get("phase") == "Failed":
        return f"{status.get('reason', 'Failed')}: {status.get('message', '')}".removesuffix(": ")
    return None


def _of_pods(pods: Sequence[Mapping[str, Any]]) -> Failure | None:
    return next(filter(None, map(_of_pod, pods)), None)


def _of_pod(pod: Mapping[str, Any]) -> Failure | None:
    name, status = str(pod["metadata"]["name"]), pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            said = condition.get("message", "")
            return Failure(
                f"pod {name} fits on no node: {said}; lower resources, or change pod.node_selector and tolerations",
                may_pass=True,
            )
    for container in status.get("containerStatuses") or ():
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = str(waiting.get("reason", "")), str(waiting.get("message", ""))
        if reason in _PULL:
            image = container.get("image", "")
            return Failure(
                f"the image {image} cannot be pulled ({reason}: {message}); push it, or name a login in "
                "pod.image_pull_secrets"
            )
        if reason in _CONFIG:
            return Failure(f"pod {name} cannot start ({reason}: {message}); is its Secret there?")
        ended = _ended(container)
        if reason == "CrashLoopBackOff" or (ended and int(container.get("restartCount", 0)) >= 1):
            return Failure(f"pod {name} ends again and again{_how(ended)}", name)
    return None


def _ended(container: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("state", "lastState"):
        ended: Mapping[str, Any] = (container.get(key) or {}).get("terminated") or {}
        if ended:
            return ended
    return {}


def _how(ended: Mapping[str, Any]) -> str:
    if not ended:
        return ""
    if ended.get("reason") == "OOMKilled":
        return ": it needs more memory than its limit; raise resources.memory"
    message = str(ended.get("message") or "").strip()
    return f" (exit code {ended.get('exitCode')})" + (f": {message}" if message else "")
