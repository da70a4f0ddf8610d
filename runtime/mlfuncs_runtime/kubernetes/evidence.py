"""Why pods do not become ready, with the cluster's events where the pods' own status is silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlfuncs_runtime.kubernetes.cluster import Cluster
from mlfuncs_runtime.kubernetes.pod_failures import Failure, being_made, failure_of, why_not_mounted


def explain_pods(cluster: Cluster, deployment: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> Failure | None:
    """The first thing that keeps the pods from being ready, or None while they may just need time."""
    failure = failure_of(deployment, pods)
    if failure is None:
        mounts = (why_not_mounted(cluster.events(name)) for name in being_made(pods))
        failure = next(filter(None, mounts), None)
    return failure
