"""One endpoint in the router: its revisions and replicas, what waits for them, and who goes where."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from random import random
from typing import TYPE_CHECKING

from mlfuncs.errors import DeadlineExceeded, MlfuncsError, NotFound, Overloaded, Unavailable
from mlfuncs_runtime.router.access import TokenBucket
from mlfuncs_runtime.router.meter import LoadMeter, RequestCounts
from mlfuncs_runtime.router.mirror import Mirror
from mlfuncs_runtime.router.request import Request
from mlfuncs_runtime.router.split import Split, choose_replica
from mlfuncs_runtime.router.upstream import Upstream
from mlfuncs_runtime.routes import Replica, Route

if TYPE_CHECKING:
    from mlfuncs_runtime.router.core import Core

IDLE_PER_REPLICA = 256  # connections kept open to one worker; a guess
_ATTEMPTS = 8  # times one request is sent anew after connections that never read it; a guess
_DOWN_S = (0.02, 1.0)  # first and longest pause after a worker's socket refused a connection; a guess


class ReplicaState:
    """One worker: requests in flight there, and idle connections to it."""

    __slots__ = ("failures", "idle", "in_flight", "is_gone", "replica", "revision", "shapes", "waiters")

    def __init__(self, replica: Replica, revision: RevisionState) -> None:
        self.replica, self.revision = replica, revision
        self.in_flight = self.failures = 0
        self.idle: list[Upstream] = []
        self.shapes: dict[bytes, tuple[int, int]] = {}  # an answer's head without its id -> (status, body length)
        self.is_gone = False
        self.waiters: list[asyncio.Future[None]] = []

    def park(self, upstream: Upstream) -> None:
        """Keep an idle connection for later."""
        if self.is_gone or len(self.idle) >= IDLE_PER_REPLICA:
            upstream.transport.close()
        else:
            self.idle.append(upstream)

    def forget(self, upstream: Upstream) -> None:
        """Never use this connection again."""
        if upstream in self.idle:
            self.idle.remove(upstream)

    def tell_waiters(self) -> None:
        """Nothing is in flight any more: go on, whoever waits for that."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.waiters.clear()

    def remove(self) -> None:
        """The worker takes no new requests; those in flight finish."""
        self.is_gone = True
        for upstream in self.idle:
            upstream.transport.close()
        self.idle.clear()


class RevisionState:
    """One revision of an endpoint: replicas that answer now, and requests that wait for one."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.concurrency = 0  # requests at once per replica; 0: no limit
        self.replicas: list[ReplicaState] = []
        self.queue: OrderedDict[Request, None] = OrderedDict()
        self.meter = LoadMeter(now_s)
        self.counts = RequestCounts()


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
            if revision.queue and (broken := self._broken(revision)):
                for request in list(revision.queue):
                    self.core.fail(request, broken)

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
            self.core.fail(request, self.no_traffic())
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

    def no_traffic(self) -> Unavailable:
        """The error while no revision has traffic: the first one still loads, or could not."""
        mend = f"see 'mlfuncs status' and 'mlfuncs logs {self.name}', and deploy again"
        what = f"endpoint {self.name!r} has no revision that serves: its deploy failed or is under way"
        return Unavailable(f"{what}; {mend}", 2.0)

    # --- requests

    def over_rate(self, wait_s: float) -> Overloaded:
        """The error for a request that found the token bucket empty, counted."""
        self.reject("rate")
        rate = self.route.access.rate_per_s
        return Overloaded(f"endpoint {self.name!r} takes {rate:g} requests per second; try again later", wait_s)

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
        if not revision.replicas and (broken := self._broken(revision)):
            self.reject("broken")
            self.core.fail(request, broken)
            return
        if self.queued >= limits.queue_size or self.queued_bytes + request.size > limits.queue_bytes:
            self.reject("queue")
            what = f"{self.queued} requests ({self.queued_bytes} bytes) wait for endpoint {self.name!r} already"
            error: MlfuncsError = Unavailable(f"{what}, which has no worker ready", self._retry_after_s())
            if revision.replicas:
                error = Overloaded(f"{what}; try again later", self._retry_after_s())
            self.core.fail(request, error)
            return
        request.queued = True
        revision.queue[request] = None
        self.queued += 1
        self.queued_bytes += request.size
        self.core.wake(self.name, revision.name)

    def _broken(self, revision: RevisionState) -> Unavailable | None:
        """The error while a revision without workers waits to be started again after failing time and again."""
        if revision.replicas or not (until_s := self.route.broken_until_s.get(revision.name)):
            return None
        wait_s = until_s - time.monotonic()
        if wait_s <= 0:  # it is being tried
            return None
        what = f"{revision.name} of endpoint {self.name!r} does not start; 'mlfuncs logs {self.name}' says why"
        return Unavailable(what, max(1.0, math.ceil(wait_s)))

    def _retry_after_s(self) -> float:
        """About how long the queue takes at the pace of this moment, between 1 and 30 s."""
        busy = sum(replica.in_flight for replica in self.replicas.values())
        return min(30.0, max(1.0, math.ceil(self.queued / (10 * max(1, busy)))))

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
            self.core.call_later(pause_s, lambda: self._revive(replica))
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
        if request.queued:
            request.revision.queue.move_to_end(request, last=False)

    def lost(self, request: Request, reason: str, *, again: bool) -> None:
        """The connection broke under a request: send it elsewhere when that is safe, else say so."""
        if again and request.attempts < _ATTEMPTS:
            self._again(request)
        elif request.head_sent:
            self.settle(request, time.monotonic())
            request.caller.aborted(request)
        else:
            self.core.fail(request, _BadGateway(f"{reason}; the request may have been carried out"))

    def expire(self, request: Request) -> None:
        """The request's time is over."""
        waited = "for a worker" if request.queued else "for the answer"
        detail = f"endpoint {self.name!r}: {request.deadline_s - request.arrived_s:g} s were over, waiting {waited}"
        self.core.fail(request, DeadlineExceeded(detail))

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
            core.log_access(request, now_s - request.arrived_s)
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


class _BadGateway(MlfuncsError):
    """A worker broke off; nobody knows how far the request came."""

    status = 502

    @property
    def title(self) -> str:
        return "BadGateway"
