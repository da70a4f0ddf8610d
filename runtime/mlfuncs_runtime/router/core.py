"""The router's heart: which endpoint a request is for, who may call it, its deadline, and the endpoints' state."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from mlfuncs.errors import MlfuncsError, NotFound, TooLarge, Unauthorized
from mlfuncs_runtime.router.access import cors_headers, is_token_valid, preflight_headers
from mlfuncs_runtime.router.endpoint import Endpoint, ReplicaState, RevisionState
from mlfuncs_runtime.router.http import RequestHead, decode_unreserved, problem_of
from mlfuncs_runtime.router.ids import Ids
from mlfuncs_runtime.router.request import Plan, Request

if TYPE_CHECKING:
    from mlfuncs_runtime.router.client import Client
    from mlfuncs_runtime.router.spans import RouterSpans
    from mlfuncs_runtime.routes import Route

_PLACES = 4096  # request targets whose place is remembered
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


class Place(NamedTuple):
    """Where a request target leads: `endpoint` None is the platform itself."""

    endpoint: Endpoint | None
    revision: str  # of a tag; empty: by the traffic's shares
    path: bytes


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
        self._places: dict[bytes, Place] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.next_sweep_s = float("inf")
        self._timer: asyncio.TimerHandle | None = None
        self.ids = Ids()

    # --- the table

    def configure(self, routes: Iterable[Route]) -> None:
        """Take a whole table; what it does not name is gone."""
        wanted = {route.endpoint: route for route in routes}
        self._places.clear()
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

    def place_of(self, target: bytes) -> Place:
        """Where a target leads. Raises NotFound."""
        place = self._places.get(target)
        if place is None:
            place = self._find_place(target)
            if len(self._places) >= _PLACES:
                self._places.clear()
            self._places[target] = place
        return place

    def _find_place(self, target: bytes) -> Place:
        path, mark, query = target.partition(b"?")
        name, _, rest = path[1:].partition(b"/")
        if name in (b"-", b"v2"):
            model, _, _ = rest.removeprefix(b"models/").partition(b"/")
            if name == b"-" or not rest.startswith(b"models/") or not model:
                return Place(None, "", path)
            return self._endpoint(model, target)
        return self._endpoint(name, b"/" + rest + mark + query)

    def _endpoint(self, segment: bytes, path: bytes) -> Place:
        name = decode_unreserved(segment).decode("latin-1")
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            return Place(endpoint, "", path)
        base, mark, tag = name.rpartition("--")
        tagged = self.endpoints.get(base) if mark else None
        if tagged is not None and tag in tagged.route.tags:
            return Place(tagged, tagged.route.tags[tag], path)
        if tagged is not None:
            raise NotFound("tag of endpoint " + base, tag, tagged.route.tags)
        raise NotFound("endpoint", name[:100], self.endpoints)

    # --- a request's way in

    def new_id(self) -> bytes:
        """An id for a request that is refused before its head is understood."""
        return self.ids.prefix + self.ids.number()

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

    def route(self, request: Request, client: Client) -> Plan | None:
        """Check a request and hand it to its endpoint; the plan that was followed. None: the platform answered.

        Raises MlfuncsError when the request is refused.
        """
        head = request.head
        try:
            place = self.place_of(head.target)
        except NotFound:
            self._check_token(head, self.options.token_sha256)
            raise
        endpoint = place.endpoint
        if endpoint is None:
            if place.path != b"/-/healthz":
                self._check_token(head, self.options.token_sha256)
            client.platform(request, place.path)
            return None
        access = endpoint.route.access
        extra = b""
        if head.origin and access.cors_origins:
            if head.method == b"OPTIONS" and self._answer_preflight(request, client, endpoint):
                return None
            extra = request.extra = cors_headers(access, head.origin)
        is_ours = self._check_token(head, (*self.options.token_sha256, *access.token_sha256))
        if head.length > endpoint.route.limits.body_bytes:
            endpoint.reject("body")
            raise too_large(endpoint.route.limits.body_bytes)
        revision, cookie = self._choose_revision(head, endpoint, place.revision)
        revision = revision or endpoint.split.only or ""
        state = endpoint.revision(revision) if revision else None
        plan = Plan(head, endpoint, state, place.path, b"" if is_ours else head.authorization)
        plan.extra = extra
        request.extra = extra + cookie
        if cookie or head.length > self.short_body:
            plan.is_lasting = False
        self.follow(request, plan)
        return plan

    def follow(self, request: Request, plan: Plan) -> None:
        """Hand a request to its endpoint by a plan made for an equal head. Raises MlfuncsError when it is refused."""
        endpoint = plan.endpoint
        bucket = endpoint.bucket
        if bucket is not None and (wait_s := bucket.take(request.arrived_s)):
            raise endpoint.over_rate(wait_s)
        request.plan = plan
        request.deadline_s = request.arrived_s + plan.timeout_s
        endpoint.admit(request, plan.state or endpoint.revision(self._next_revision(endpoint)))

    def _next_revision(self, endpoint: Endpoint) -> str:
        try:
            return endpoint.split.next()
        except LookupError:
            endpoint.reject("no-traffic")
            raise endpoint.no_traffic() from None

    def _check_token(self, head: RequestHead, tokens: tuple[str, ...]) -> bool:
        """Whether the caller's token is one of ours. Raises Unauthorized when it must be and is not."""
        if tokens and not is_token_valid(head.authorization, tokens):
            what = "a wrong token came with" if head.authorization else "no token came with"
            raise Unauthorized(f"{what} the request: send 'Authorization: Bearer <token>'")
        return bool(tokens)

    def _answer_preflight(self, request: Request, client: Client, endpoint: Endpoint) -> bool:
        headers = request.head.headers
        wanted = {name.lower(): value for name, value in headers if name.lower().startswith(b"access-control")}
        method = wanted.get(b"access-control-request-method")
        if method is None:
            return False
        asked = wanted.get(b"access-control-request-headers", b"")
        access = endpoint.route.access
        client.reply(request, 204, b"", preflight_headers(access, request.head.origin, method, asked))
        return True

    def _choose_revision(self, head: RequestHead, endpoint: Endpoint, tagged: str) -> tuple[str, bytes]:
        """(revision, header line that makes the caller stick to it); empty: the shares decide, request by request."""
        split, route = endpoint.split, endpoint.route
        if tagged or split.only is not None or not route.traffic:
            return tagged, b""
        if route.sticky_header:
            name = route.sticky_header.lower().encode()
            for key, value in head.headers:
                if key.lower() == name:
                    return split.of(value), b""
        if not route.sticky_cookie:
            return "", b""
        wanted = route.sticky_cookie.encode()
        for pair in head.cookie.split(b";"):
            name, _, value = pair.strip().partition(b"=")
            if name == wanted and value:
                return split.of(value), b""
        value = os.urandom(8).hex().encode()
        given = (wanted, value, endpoint.name.encode())
        return split.of(value), b"Set-Cookie: %s=%s; Path=/%s; HttpOnly; SameSite=Lax\r\n" % given

    # --- a request's life

    def began(self, request: Request) -> None:
        """The answer has begun: no deadline holds any more."""
        self.active.pop(request, None)

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
                request.endpoint.expire(request)
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

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back after a while."""
        asyncio.get_running_loop().call_later(delay_s, callback)

    def log_access(self, request: Request, seconds: float) -> None:
        """Write a line about a request that is over."""
        values = {
            "method": request.head.method.decode("latin-1"),
            "target": request.head.target.decode("latin-1"),
            "status": request.status,
            "duration_ms": round(seconds * 1000, 3),
            "endpoint": request.endpoint.name,
            "revision": request.revision.name,
            "request_id": request.request_id.decode("latin-1"),
        }
        if self.options.access_log == "json":
            self.log.info("%s", json.dumps(values))
        else:
            self.log.info("%(method)s %(target)s %(status)s %(duration_ms)s ms %(revision)s %(request_id)s", values)


def too_large(limit: int) -> TooLarge:
    """The error for a body over `limit` bytes."""
    return TooLarge(f"the request body is over the bound of {limit} bytes; send less at once")
