"""Copies of requests to other revisions: bounded, dropped first, and never in the caller's way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlfuncs_runtime.router.request import Request
from mlfuncs_runtime.router.split import choose_replica

if TYPE_CHECKING:
    from mlfuncs_runtime.router.endpoint import Endpoint

COPIES = 64  # copies of one endpoint's requests under way at once; a guess
COPY_BYTES = 1 << 20  # a larger body is not copied; a guess


class Mirror:
    """The copies of one endpoint. A copy goes to an idle place of the mirrored revision or is dropped."""

    def __init__(self, endpoint: Endpoint, shares: Mapping[str, int]) -> None:
        self._endpoint = endpoint
        self.shares: Mapping[str, int] = {}
        self._credit: dict[str, int] = {}
        self.under_way = self.sent = self.dropped = 0
        self.update(shares)

    def update(self, shares: Mapping[str, int]) -> None:
        """Take new percentages by revision."""
        self.shares = {revision: share for revision, share in shares.items() if share > 0}
        self._credit = {revision: self._credit.get(revision, 0) for revision in self.shares}

    def copy(self, request: Request) -> None:
        """Copy a request to the revisions whose turn it is."""
        for revision, share in self.shares.items():
            self._credit[revision] += min(share, 100)
            if self._credit[revision] >= 100:
                self._credit[revision] -= 100
                self._send(request, revision)

    def _send(self, request: Request, name: str) -> None:
        endpoint = self._endpoint
        revision = endpoint.revision(name)
        chosen = choose_replica(revision.replicas, revision.concurrency, endpoint.core.random)
        fits = request.complete and request.size <= COPY_BYTES and not request.head.websocket
        if chosen is None or revision.queue or not fits or self.under_way >= COPIES:
            self.dropped += 1
            return
        self.under_way += 1
        self.sent += 1
        copy = Request(request.head, Nobody(self))
        copy.plan, copy.is_copy = request.plan, True
        copy.request_id, copy.traceparent = request.request_id, request.traceparent
        copy.body, copy.size, copy.complete = list(request.body), request.size, True
        copy.arrived_s = time.monotonic()
        copy.deadline_s = copy.arrived_s + endpoint.route.limits.timeout_s
        endpoint.admit(copy, revision)


class Nobody:
    """The caller of a copy: the answer is read and forgotten."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    @property
    def keeps_alive(self) -> bool:
        """A copy never ends a connection."""
        return True

    def write(self, data: bytes) -> None:
        """Forget a part of the answer."""

    def finished(self, request: Request, now_s: float, *, close: bool = False) -> None:
        """The copy is over."""
        self._mirror.under_way -= 1

    def reply(self, request: Request, status: int, body: bytes, extra: bytes = b"") -> None:
        """The router answered in the worker's place: the copy is over."""
        self._mirror.under_way -= 1

    def aborted(self, request: Request) -> None:
        """The answer broke off: the copy is over."""
        self._mirror.under_way -= 1

    def let_body_flow(self, flow: bool) -> None:
        """A copy's body is here as a whole."""

    def tunnel(self, request: Request) -> None:
        """A copy never switches protocols."""
