"""The errors that an endpoint answers with in a worker's place."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from mlfuncs.errors import DeadlineExceeded, MlfuncsError, Overloaded, TooLarge, Unavailable

if TYPE_CHECKING:
    from mlfuncs_runtime.router.endpoint import Endpoint
    from mlfuncs_runtime.router.replica import RevisionState
    from mlfuncs_runtime.router.request import Request


class BadGateway(MlfuncsError):
    """A worker broke off; nobody knows how far the request came."""

    status = 502


def too_large(limit: int) -> TooLarge:
    """The error for a body over `limit` bytes."""
    return TooLarge(f"the request body is over the bound of {limit} bytes; send less at once")


def no_traffic(name: str) -> Unavailable:
    """The error while no revision of an endpoint has traffic: the first one still loads, or could not."""
    mend = f"see 'mlfuncs status' and 'mlfuncs logs {name}', and deploy again"
    what = f"endpoint {name!r} has no revision that serves: its deploy failed or is under way"
    return Unavailable(f"{what}; {mend}", 2.0)


def over_rate(endpoint: Endpoint, wait_s: float) -> Overloaded:
    """The error for a request that found the token bucket empty."""
    rate = endpoint.route.access.rate_per_s
    return Overloaded(f"endpoint {endpoint.name!r} takes {rate:g} requests per second; try again later", wait_s)


def queue_full(endpoint: Endpoint, revision: RevisionState) -> Overloaded | Unavailable:
    """The error for one request more than may wait; to be tried again after about as long as the queue takes now."""
    busy = sum(replica.in_flight for replica in endpoint.replicas.values())
    after_s = min(30.0, max(1.0, math.ceil(endpoint.queued / (10 * max(1, busy)))))
    what = f"{endpoint.queued} requests ({endpoint.queued_bytes} bytes) wait for endpoint {endpoint.name!r} already"
    if revision.replicas:
        return Overloaded(f"{what}; try again later", after_s)
    return Unavailable(f"{what}, which has no worker ready", after_s)


def broken(endpoint: Endpoint, revision: RevisionState) -> Unavailable | None:
    """The error while a revision without workers waits to be started again after failing time and again."""
    if revision.replicas or not (until_s := endpoint.route.broken_until_s.get(revision.name)):
        return None
    wait_s = until_s - time.monotonic()
    if wait_s <= 0:  # it is being tried
        return None
    logs = f"'mlfuncs logs {endpoint.name}'"
    what = f"{revision.name} of endpoint {endpoint.name!r} does not start; {logs} says why"
    return Unavailable(what, max(1.0, math.ceil(wait_s)))


def overdue(request: Request) -> DeadlineExceeded:
    """The error for a request whose time is over."""
    waited = "for a worker" if request.queued else "for the answer"
    allowed_s = request.deadline_s - request.arrived_s
    return DeadlineExceeded(f"endpoint {request.endpoint.name!r}: {allowed_s:g} s were over, waiting {waited}")
