"""The router's heart: the endpoints, the plans for known heads, ids and deadlines, and the state of it all."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import MlfuncsError
from mlfuncs_runtime.router.endpoint import Endpoint
from mlfuncs_runtime.router.http import problem_of
from mlfuncs_runtime.router.ids import Ids
from mlfuncs_runtime.router.places import Places
from mlfuncs_runtime.router.refusals import over_rate, overdue
from mlfuncs_runtime.router.replica import ReplicaState, RevisionState
from mlfuncs_runtime.router.request import Plan, Request

if TYPE_CHECKING:
    from mlfuncs_runtime.router.client import Client
    from mlfuncs_runtime.router.spans import RouterSpans
    from mlfuncs_runtime.routes import Route

_PLANS = 2048  # heads of requests that are recognised by their bytes
_SWEEP_S = 0.01  # deadlines are looked at no more often than this


@dataclass(frozen=True)
class RouterOptions:
    """What a router process is told at its start. Times are seconds."""

    token_sha256: tuple[str, ...] = ()  # digests of the project's tokens; none: open
    max_clients: int = 10_000  # connections at once; haproxy's maxconn is of this size
    short_body: int = 65_536  # a body up to this is read whole before a worker is taken up with it
    head_timeout_s: float = 10.0  # for a request's head to arrive: haproxy's timeout http-request
    idle_timeout_s: float = 75.0  # between requests of one connection: nginx's keepalive_timeout
    stall_timeout_s: float = 60.0  # without a byte of a body, or of room for an answer
    drain_timeout_s: float = 60.0  # after SIGTERM
    access_log: str = ""  # "", "text" or "json"
    triggers: Path | None = None  # where the trigger process says how it goes
    spans: RouterSpans | None = None  # where finished requests go; None: nowhere
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("mlfuncs.router"))


class Core:
    """The state that all connections of a router share."""

    def __init__(self, options: RouterOptions, wake: Callable[[str, str], None] = lambda endpoint, revision: None):
        self.options, self.wake = options, wake
        self.log = options.log
        self.short_body = options.short_body
        self.idle_timeout_s = options.idle_timeout_s
        self.random = random.random
        self.endpoints: dict[str, Endpoint] = {}
        self.clients: set[Client] = set()
        self.active: dict[Request, None] = {}  # admitted, and without an answer yet: a deadline holds
        self.logs_access = bool(options.access_log)
        self.spans = options.spans
        self.draining: bool = False
        self.refused: dict[int, int] = {}
        self.retired: dict[tuple[str, str], Any] = {}
        self.plans: dict[bytes, Plan] = {}  # by the bytes of a request's whole head
        self._closing: set[Endpoint] = set()  # deleted, with requests in flight
        self.places = Places(self.endpoints)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.next_sweep_s = float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self.ids = Ids()

    # --- the table

    def configure(self, routes: Iterable[Route]) -> None:
        """Take a whole table; what it does not name is gone."""
        wanted = {route.endpoint: route for route in routes}
        self.places.forget()
        self.plans.clear()
        self._closing = {endpoint for endpoint in self._closing if endpoint.leaving}
        for name in [name for name in self.endpoints if name not in wanted]:
            endpoint = self.endpoints.pop(name)
            endpoint.close()
            self._closing.add(endpoint)
        for name, route in wanted.items():
            if name in self.endpoints:
                self.endpoints[name].update(route)
            else:
                self.endpoints[name] = Endpoint(self, route)

    def retire(self, endpoint: Endpoint, revision: RevisionState) -> None:
        """Keep a gone revision's counters, so that they never fall."""
        self.retired[endpoint.name, revision.name] = revision.counts

    def drain(self) -> None:
        """From now on every answer ends its connection."""
        self.draining = True
        self.plans.clear()
        for client in self.clients:
            client.hurry()
        for endpoint in self.endpoints.values():
            for replica in endpoint.replicas.values():
                replica.shapes.clear()  # an answer is not passed on as it is any more

    def replicas_of(self, replica: str) -> list[ReplicaState]:
        """The states with requests in flight at a replica, removed from the table or not."""
        endpoints = [*self.endpoints.values(), *self._closing]
        current = [e.replicas[replica] for e in endpoints if replica in e.replicas]
        leaving = [state for e in endpoints for state in e.leaving if state.replica.id == replica]
        return [*current, *leaving]

    def keep_plan(self, key: bytes, plan: Plan) -> None:
        """Follow this plan for every request whose head has these bytes, until the table changes."""
        if len(self.plans) >= _PLANS:
            self.plans.clear()
        if not self.draining:
            self.plans[key] = plan

    # --- a request's way in

    def identify(self, request: Request) -> None:
        """Give the request its id, its trace and its time of arrival."""
        request.arrived_s = monotonic()
        ids, head = self.ids, request.head
        number = ids.spare.pop() if ids.spare else ids.number()
        request.request_id = head.request_id or ids.prefix + number
        if not head.traceparent:
            request.traceparent = b"".join((ids.trace, number, b"-", number, b"-01"))
        elif self.spans is not None:
            request.traceparent = self.spans.own_traceparent(head.traceparent, number)
        else:
            request.traceparent = head.traceparent

    def follow(self, request: Request, plan: Plan) -> None:
        """Hand a request to its endpoint by a plan made for an equal head. Raises MlfuncsError when it is refused."""
        endpoint = plan.endpoint
        bucket = endpoint.bucket
        if bucket is not None and (wait_s := bucket.take(request.arrived_s)):
            endpoint.reject("rate")
            raise over_rate(endpoint, wait_s)
        request.plan = plan
        request.deadline_s = request.arrived_s + plan.timeout_s
        endpoint.admit(request, plan.state or endpoint.revision(endpoint.next_revision()))

    # --- a request's life

    def fail(self, request: Request, error: MlfuncsError) -> None:
        """Answer an admitted request with a problem document."""
        request.status = error.status
        request.endpoint.settle(request, monotonic())
        status, body, extra = problem_of(error, request.request_id)
        request.caller.reply(request, status, body, extra)

    def look_at(self, at_s: float) -> None:
        """Look for overdue requests at this time."""
        if self._timer is not None:
            self._timer.cancel()
        self.next_sweep_s = at_s
        delay_s = max(_SWEEP_S, at_s - monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._sweep)

    def _sweep(self) -> None:
        self._timer, self.next_sweep_s = None, float("inf")
        now_s = monotonic()
        for request in [request for request in self.active if request.deadline_s <= now_s]:
            if not request.done:
                self.fail(request, overdue(request))
        if self.active:
            self.look_at(min(request.deadline_s for request in self.active))

    def close(self) -> None:
        """Drop every connection to a worker, and every task."""
        for task in self._tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for endpoint in self.endpoints.values():
            endpoint.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside everything else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
