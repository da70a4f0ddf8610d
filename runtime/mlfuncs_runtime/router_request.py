"""One request on its way through the router: whose it is, what is sent to a worker, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mlfuncs_runtime.router_http import CRLF, RequestHead

if TYPE_CHECKING:
    from mlfuncs_runtime.router_endpoint import Endpoint, ReplicaState, RevisionState
    from mlfuncs_runtime.router_upstream import Upstream

IDEMPOTENT = frozenset((b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"))  # RFC 9110, 9.2.2
REPLAY_BYTES = 32_768  # a body up to this is kept until its answer begins, so that it can be sent elsewhere
_WAITED_S = 0.001  # a wait above this is taken off the time that the worker is told


class Caller(Protocol):
    """Who gets the answer: a client's connection, or nobody for a mirrored copy."""

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow this one."""

    def write(self, data: bytes) -> None:
        """Send bytes of the answer on."""

    def finished(self, request: Request, *, close: bool) -> None:
        """The answer is complete; with `close` no further request can be read after it."""

    def reply(self, request: Request, status: int, body: bytes, extra: bytes = b"", *, close: bool = False) -> None:
        """Send a whole problem document in the worker's place, and finish."""

    def aborted(self, request: Request) -> None:
        """The answer broke off in its middle."""

    def let_body_flow(self, flow: bool) -> None:
        """Whether more of the request's body is welcome now."""

    def tunnel(self, request: Request) -> None:
        """From now on bytes pass both ways as they are."""


class Request(RequestHead):
    """A request head with its body so far and its place in the router. `status` is 0 until an answer is known."""

    __slots__ = (
        "arrived_s",
        "attempts",
        "body",
        "caller",
        "complete",
        "deadline_s",
        "done",
        "endpoint",
        "extra",
        "head_sent",
        "is_copy",
        "keep_alive",
        "path",
        "prefix",
        "queued",
        "replayable",
        "replica",
        "revision",
        "size",
        "status",
        "upstream",
        "waits_for_body",
    )

    def __init__(
        self, method: bytes, target: bytes, version: str, headers: Sequence[tuple[bytes, bytes]], keep_alive: bool
    ) -> None:
        super().__init__(method, target, version, headers)
        self.keep_alive = keep_alive
        self.body: list[bytes] = []
        self.size = 0
        self.complete = self.done = self.queued = self.head_sent = self.waits_for_body = self.is_copy = False
        self.replayable = True
        self.attempts = self.status = 0
        self.extra = self.path = self.prefix = b""
        self.arrived_s, self.deadline_s = 0.0, math.inf
        self.caller: Caller
        self.endpoint: Endpoint
        self.revision: RevisionState
        self.replica: ReplicaState | None = None
        self.upstream: Upstream | None = None

    def opening(self, now_s: float) -> bytes:
        """The bytes that begin this request at a worker: its head, and the body as far as it is here."""
        lines = self.lines
        parts = [self.method, b" ", self.path, b" HTTP/1.1\r\n", *lines]
        parts += (b"X-Request-Id: ", self.request_id, b"\r\ntraceparent: ", self.traceparent, CRLF)
        if self.cookie:
            parts += (b"Cookie: ", self.cookie, CRLF)
        if self.origin:
            parts += (b"Origin: ", self.origin, CRLF)
        if self.authorization:
            parts += (b"Authorization: ", self.authorization, CRLF)
        if self.timeout_s < math.inf or now_s - self.arrived_s > _WAITED_S:
            parts.append(b"X-Mlfuncs-Timeout-Ms: %d\r\n" % max(1, (self.deadline_s - now_s) * 1000))
        if self.websocket:
            parts.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            return b"".join(parts)
        if self.complete:
            if self.size or self.length or self.method in (b"POST", b"PUT", b"PATCH"):
                parts.append(b"Content-Length: %d\r\n" % self.size)
            parts.append(CRLF)
            parts += self.body
        elif self.chunked:
            parts.append(b"Transfer-Encoding: chunked\r\n\r\n")
            parts += [chunk(piece) for piece in self.body]
        else:
            parts.append(b"Content-Length: %d\r\n\r\n" % self.length)
            parts += self.body
        if not self.complete or self.size > REPLAY_BYTES:
            self.replayable = False
            self.body.clear()
        return b"".join(parts)


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)
