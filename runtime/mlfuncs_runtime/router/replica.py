"""What the router keeps of each worker and of each revision of an endpoint."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from mlfuncs_runtime.router.meter import LoadMeter, RequestCounts
from mlfuncs_runtime.routes import Replica

if TYPE_CHECKING:
    from mlfuncs_runtime.router.request import Request
    from mlfuncs_runtime.router.upstream import Upstream

IDLE_PER_REPLICA = 256  # connections kept open to one worker; a guess


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
