"""One endpoint in the router: its revisions and replicas, what waits for them, and who goes where."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from random import random
from typing import TYPE_CHECKING

from mlfuncs.errors import NotFound, Unavailable
from mlfuncs_runtime.router.access import TokenBucket
from mlfuncs_runtime.router.access_log import log_access
from mlfuncs_runtime.router.mirror import Mirror
from mlfuncs_runtime.router.refusals import BadGateway, broken, no_traffic, queue_full
from mlfuncs_runtime.router.replica import ReplicaState, RevisionState
from mlfuncs_runtime.router.request import Request
from mlfuncs_runtime.router.split import Split, choose_replica
from mlfuncs_runtime.router.upstream import Upstream
from mlfuncs_runtime.routes import Route

if TYPE_CHECKING:
    from mlfuncs_runtime.router.core import Core

_ATTEMPTS = 8  # times one request is sent anew after connections that never read it; a guess
_DOWN_S = (0.02, 1.0)  # first and longest pause after a worker's socket refused a connection; a guess


class Endpoint:
    """The living state behind one `Route`; `update` takes a new one without losing a request."""

    def __init__(self, core: Core, route: Route) -> None:
        self.core = core
        self.name = route.endpoint
        self.revisions: dict[str, RevisionState] = {}
        self.replicas: dict[str, ReplicaState] = {}
        self.queued = self.queued_bytes = 0
        self.rejected: dict[str, int] = {}
        self.retried = 0
        self.leaving: set[ReplicaState] = set()  # removed from the table with requests in flight
        self.bucket: TokenBucket | None = None
        self.route = route
        self.mirror = Mirror(self, {})
        self.update(route)

    # --- the table

    def update(self, route: Route) -> None:
        """Take a new route: new replicas are used at once, replicas that are gone finish what they have."""
        if self.bucket is None or route.access != self.route.access:
            rate, burst = route.access.rate_per_s, route.access.burst
            self.bucket = TokenBucket(rate, burst, time.monotonic()) if rate > 0 else None
        self.route = route
        self.split = Split(route.traffic)
        self.mirror.update(route.mirror)
        for name in {*route.traffic, *route.tags.values(), *route.mirror, *(r.revision for r in route.replicas)}:
            self.revision(name)
        for name, revision in self.revisions.items():
            revision.concurrency = route.concurrency.get(name, 0)
        wanted = {replica.id: replica for replica in route.replicas}
        for key, state in list(self.replicas.items()):
            if wanted.get(key) != state.replica:
                self._drop(state)
        for key, replica in wanted.items():
            if key not in self.replicas:
                state = ReplicaState(replica, self.revision(replica.revision))
                self.replicas[key] = state
                state.revision.replicas.append(state)
        self._tidy(route)
        for revision in self.revisions.values():
            self.pump(revision)
            if revision.queue and (error := broken(self, revision)):
                for request in list(revision.queue):
                    self.core.fail(request, error)

    def revision(self, name: str) -> RevisionState:
        """The revision's state, made when it is new."""
        state = self.revisions.get(name)
        if state is None:
            state = self.revisions[name] = RevisionState(name, time.monotonic())
            state.concurrency = self.route.concurrency.get(name, 0)
        return state

    def _drop(self, state: ReplicaState) -> None:
        del self.replicas[state.replica.id]
        if state in state.revision.replicas:
            state.revision.replicas.remove(state)
        state.remove()
        if state.in_flight:
            self.leaving.add(state)

    def _tidy(self, route: Route) -> None:
        """Requests that wait for a revision without traffic go where the traffic goes; empty revisions end."""
        reachable = {*route.traffic, *route.tags.values()}
        for name, revision in list(self.revisions.items()):
            if name not in reachable and not revision.replicas:
                for request in list(revision.queue):
                    self._unqueue(request)
                    self._move(request)
                if not revision.meter.active and name not in route.mirror:
                    self.core.retire(self, revision)
                    del self.revisions[name]

    def _move(self, request: Request) -> None:
        now_s = time.monotonic()
        try:
            chosen = self.revision(self.split.next())
        except LookupError:
            self.core.fail(request, no_traffic(self.name))
            return
        request.revision.meter.leave(now_s)
        request.revision = chosen
        chosen.meter.enter(now_s)
        self.submit(request, now_s)

    def close(self) -> None:
        """The endpoint is deleted: what waits is told so, what is in flight finishes."""
        for revision in self.revisions.values():
            for request in list(revision.queue):
                self.core.fail(request, NotFound("endpoint", self.name))
        for state in list(self.replicas.values()):
            self._drop(state)

    # --- requests

    def next_revision(self) -> str:
        """The revision of the next request, by the traffic's shares. Raises Unavailable when none has traffic."""
        try:
            return self.split.next()
        except LookupError:
            self.reject("no-traffic")
            raise no_traffic(self.name) from None

    def reject(self, reason: str) -> None:
        """Count a request that was turned away."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def admit(self, request: Request, revision: RevisionState) -> None:
        """Take a request in. Its body is waited for when it is short, so that a slow sender holds no replica."""
        request.endpoint, request.revision = self, revision
        revision.meter.enter(request.arrived_s)
        core = self.core
        core.active[request] = None
        if request.deadline_s < core.next_sweep_s:
            core.look_at(request.deadline_s)
        head = request.head
        if not request.complete and not head.chunked and 0 < head.length <= core.short_body:
            request.waits_for_body = True
            return
        self.submit(request, request.arrived_s)

    def submit(self, request: Request, now_s: float) -> None:
        """Send a request to a replica, or let it wait for one; turned away when too much waits."""
        request.waits_for_body = False
        revision = request.revision
        if self.mirror.shares and not request.is_copy:
            self.mirror.copy(request)
        replica = None
        if not revision.queue:
            replica = choose_replica(revision.replicas, revision.concurrency, random)
        if replica is None:
            self._enqueue(request)
        elif replica.idle:  # what `_assign` does, without the call: this is on the fast path
            replica.in_flight += 1
            request.replica = replica
            replica.idle.pop().send(request, now_s)
        else:
            self._assign(request, replica, now_s)

    def _enqueue(self, request: Request) -> None:
        limits, revision = self.route.limits, request.revision
        if request.is_copy:
            self.core.fail(request, Unavailable("copies do not wait"))
            return
        if not revision.replicas and (error := broken(self, revision)):
            self.reject("broken")
            self.core.fail(request, error)
            return
        if self.queued >= limits.queue_size or self.queued_bytes + request.size > limits.queue_bytes:
            self.reject("queue")
            self.core.fail(request, queue_full(self, revision))
            return
        request.queued = True
        revision.queue[request] = None
        self.queued += 1
        self.queued_bytes += request.size
        self.core.wake(self.name, revision.name)

    def _unqueue(self, request: Request) -> None:
        request.queued = False
        del request.revision.queue[request]
        self.queued -= 1
        self.queued_bytes -= request.size

    def pump(self, revision: RevisionState) -> None:
        """Send what waits as long as a replica has room."""
        while revision.queue:
            replica = choose_replica(revision.replicas, revision.concurrency, random)
            if replica is None:
                return
            request = next(iter(revision.queue))
            self._unqueue(request)
            self._assign(request, replica, time.monotonic())

    def _assign(self, request: Request, replica: ReplicaState, now_s: float) -> None:
        replica.in_flight += 1
        request.replica = replica
        if replica.idle:
            replica.idle.pop().send(request, now_s)
        else:
            self.core.spawn(self._connect(request, replica))

    async def _connect(self, request: Request, replica: ReplicaState) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, upstream = await loop.create_unix_connection(lambda: Upstream(replica), replica.replica.socket)
        except OSError as exc:
            self._unreachable(request, replica, exc)
            return
        replica.failures = 0
        if request.done or request.replica is not replica:
            replica.park(upstream)
        else:
            upstream.send(request, time.monotonic())

    def _unreachable(self, request: Request, replica: ReplicaState, exc: OSError) -> None:
        """A worker's socket refused: rest it for a moment; the request was never sent, so it goes elsewhere."""
        self.core.log.warning("%s %s: no connection to its socket (%s)", self.name, replica.replica.id, exc)
        revision = replica.revision
        if replica in revision.replicas:
            revision.replicas.remove(replica)
            pause_s = min(_DOWN_S[0] * 2**replica.failures, _DOWN_S[1])
            replica.failures += 1
            asyncio.get_running_loop().call_later(pause_s, lambda: self._revive(replica))
        if not request.done and request.replica is replica:
            self._again(request)

    def _revive(self, replica: ReplicaState) -> None:
        if self.replicas.get(replica.replica.id) is replica and replica not in replica.revision.replicas:
            replica.revision.replicas.append(replica)
            self.pump(replica.revision)

    def _again(self, request: Request) -> None:
        replica, request.replica = request.replica, None
        if replica is not None:
            replica.in_flight -= 1
            self._left(replica)
        self.retried += 1
        others = [other for other in request.revision.replicas if other is not replica]
        chosen = choose_replica(others, request.revision.concurrency, random)
        if chosen is not None:
            self._assign(request, chosen, time.monotonic())
            return
        self._enqueue(request)
        if request.queued:  # first of all, and for the same worker when it is still there in a moment
            revision = request.revision
            revision.queue.move_to_end(request, last=False)
            asyncio.get_running_loop().call_later(_DOWN_S[0], lambda: self.pump(revision))

    def lost(self, request: Request, reason: str, *, again: bool) -> None:
        """The connection broke under a request: send it elsewhere when that is safe, else say so."""
        if again and request.attempts < _ATTEMPTS:
            self._again(request)
        elif request.head_sent:
            self.settle(request, time.monotonic())
            request.caller.aborted(request)
        else:
            self.core.fail(request, BadGateway(f"{reason}; the request may have been carried out"))

    def settle(self, request: Request, now_s: float) -> None:
        """A request is over, however: free its place, and count it."""
        if request.done:
            return
        request.done = True
        if request.queued:
            self._unqueue(request)
        upstream, request.upstream = request.upstream, None
        if upstream is not None:
            upstream.drop()
        revision = request.revision
        revision.meter.leave(now_s)
        revision.counts.count(request.status, now_s - request.arrived_s)
        core = self.core
        if not request.head_sent:
            core.active.pop(request, None)
        if core.logs_access and not request.is_copy:
            log_access(core, request, now_s - request.arrived_s)
        replica, request.replica = request.replica, None
        if core.spans is not None:
            core.spans.note(request, now_s, replica.replica.id if replica is not None else "")
        if replica is not None:
            replica.in_flight -= 1
            if replica.is_gone or replica.waiters:
                self._left(replica)
            if replica.revision.queue:
                self.pump(replica.revision)

    def _left(self, replica: ReplicaState) -> None:
        if not replica.in_flight:
            self.leaving.discard(replica)
            replica.tell_waiters()

    def in_flight(self) -> Mapping[str, int]:
        """Requests in flight by replica id."""
        return {key: state.in_flight for key, state in self.replicas.items()}
