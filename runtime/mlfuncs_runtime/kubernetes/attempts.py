"""The pods of a Job, one attempt each, told to a run's ledger in the order in which they were made."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mlfuncs.errors import Forbidden, MlfuncsError
from mlfuncs.runs.ledger import Ledger
from mlfuncs_runtime.kubernetes.cluster import Cluster, Manifest
from mlfuncs_runtime.kubernetes.pod_failures import how_it_ended


class Attempts:
    """Follows one pod's log at a time; `count` is how many attempts have begun."""

    def __init__(self, cluster: Cluster, ledger: Ledger) -> None:
        self.count = 0
        self._cluster, self._ledger = cluster, ledger
        self._told: set[str] = set()
        self._log: _PodLog | None = None
        self._last: Manifest = {}

    def tell(self, pods: Sequence[Manifest], for_s: float) -> bool:
        """Tell what comes within `for_s` seconds; whether all that these pods have to say is told."""
        deadline = time.monotonic() + for_s
        for pod in sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", ""))):
            name = str(pod["metadata"]["name"])
            if self._last and name == self._last["metadata"]["name"]:
                self._last = pod
            if name in self._told or not _has_started(pod):
                continue
            if self._log is None:
                self._begin(pod)
            if self._log is None or self._log.pod != name or not self._drain(pod, deadline):
                return False
        if self._log is not None:  # its pod is gone from the cluster: what the stream still has is all there is
            return self._drain({}, deadline)
        time.sleep(max(0.0, deadline - time.monotonic()))
        return True

    def explain(self, said: Mapping[str, Any] | None) -> str | None:
        """Why the last attempt ended, when what it `said` itself does not tell: killed for memory, evicted, gone."""
        how = how_it_ended(self._last)
        if said is None:
            return how
        killed = (said.get("error") or {}).get("type") == "ProcessDied"
        return how if killed and how and "memory" in how else None

    def _begin(self, pod: Manifest) -> None:
        if self.count:
            error = (self._ledger.final or {}).get("error") or {"type": "ProcessDied", "message": self.explain(None)}
            self._ledger.end()
            self._ledger.text(f"attempt {self.count} failed ({error['type']}: {error['message']}); trying again\n")
        self.count += 1
        self._last = pod
        self._ledger.attempt(self.count)
        self._log = _PodLog(self._cluster, str(pod["metadata"]["name"]))

    def _drain(self, pod: Mapping[str, Any], deadline: float) -> bool:
        """Whether the pod's log was told to its end."""
        assert self._log is not None
        while True:
            try:
                line = self._log.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return False
            if isinstance(line, Forbidden):
                raise line
            if isinstance(line, str):
                self._ledger.line(line)
                continue
            if how_it_ended(pod) is None and pod:  # the stream broke, the pod goes on
                time.sleep(max(0.0, deadline - time.monotonic()))
                self._log = _PodLog(self._cluster, self._log.pod, self._log.count)
                return False
            self._ledger.end()
            self._told.add(self._log.pod)
            self._log = None
            return True


class _PodLog:
    """A thread that reads a pod's log; `lines` has its lines, then None or the error that ended it."""

    def __init__(self, cluster: Cluster, pod: str, skip: int = 0) -> None:
        self.pod, self.count = pod, 0
        self.lines: queue.SimpleQueue[str | MlfuncsError | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._read, args=(cluster, skip), name="mlfuncs-pod-log", daemon=True)
        thread.start()

    def _read(self, cluster: Cluster, skip: int) -> None:
        try:
            for line in cluster.follow(self.pod, whole=True):
                self.count += 1
                if self.count > skip:
                    self.lines.put(line)
        except MlfuncsError as exc:
            self.lines.put(exc)
        else:
            self.lines.put(None)


def _has_started(pod: Manifest) -> bool:
    """Whether there is a log to read: the function's container runs, or has run."""
    for container in (pod.get("status") or {}).get("containerStatuses") or ():
        state = container.get("state") or {}
        return "running" in state or "terminated" in state
    return False
