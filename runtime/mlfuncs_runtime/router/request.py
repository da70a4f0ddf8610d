"""One request on its way through the router: whose it is, what is sent to a worker, and how far it has come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from mlfuncs_runtime.router.http import CRLF, RequestHead, decode_unreserved

if TYPE_CHECKING:
    from mlfuncs_runtime.router.endpoint import Endpoint
    from mlfuncs_runtime.router.replica import ReplicaState, RevisionState
    from mlfuncs_runtime.router.upstream import Upstream

IDEMPOTENT = frozenset((b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"))  # RFC 9110, 9.2.2
REPLAY_BYTES = 32_768  # a body up to this is kept until its answer begins, so that it can be sent elsewhere
_WITH_LENGTH = (b"POST", b"PUT", b"PATCH")  # their length is sent also when it is 0: RFC 9110, 8.6
_WAITED_S = 0.001  # a wait above this is taken off the time that the worker is told


class Caller(Protocol):
    """Who gets the answer: a client's connection, or nobody for a mirrored copy."""

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow this one."""

    def write(self, data: bytes) -> object:
        """Send bytes of the answer on."""

    def finished(self, request: Request, now_s: float, *, close: bool = False) -> None:
        """The answer is complete; with `close` no further request can be read after it."""

    def reply(self, request: Request, status: int, body: bytes, extra: bytes = b"") -> None:
        """Send a whole problem document in the worker's place, and finish."""

    def aborted(self, request: Request) -> None:
        """The answer broke off in its middle."""

    def let_body_flow(self, flow: bool) -> None:
        """Whether more of the request's body is welcome now."""

    def tunnel(self, request: Request) -> None:
        """From now on bytes pass both ways as they are."""


class Plan:
    """What is the same for all requests with one head: where they go, and the bytes that are sent there.

    `state` is the revision's; None when the traffic's shares decide. `extra` is header lines that the answer gets. A
    plan holds for one table of routes; `is_lasting` says whether it may be used again for an equal head.
    """

    __slots__ = (
        "_first",
        "_is_quick",
        "_last",
        "endpoint",
        "extra",
        "head",
        "is_lasting",
        "length",
        "path",
        "state",
        "timeout_s",
    )

    def __init__(
        self, head: RequestHead, endpoint: Endpoint, state: RevisionState | None, path: bytes, authorization: bytes
    ) -> None:
        self.head, self.endpoint, self.state, self.path = head, endpoint, state, path
        self.extra = b""
        self.timeout_s = min(endpoint.route.limits.timeout_s, head.timeout_s)
        lines = [head.method, b" ", path, b" HTTP/1.1\r\n", *head.lines]
        if path not in (b"/", head.target):  # a page of the function's own application, which links to others
            name, _, _ = head.target[1:].partition(b"/")
            lines += (b"X-Forwarded-Prefix: ", head.prefix, b"/", decode_unreserved(name.partition(b"?")[0]), CRLF)
        rest = ((b"Cookie: ", head.cookie), (b"Origin: ", head.origin), (b"Authorization: ", authorization))
        for name, value in rest:
            if value:
                lines += (name, value, CRLF)
        self._first = b"".join((*lines, b"X-Request-Id: "))
        sized = not head.chunked and (head.length or head.method in _WITH_LENGTH)
        self._last = b"\r\nContent-Length: %d\r\n\r\n" % head.length if sized else b"\r\n\r\n"
        is_simple = not (head.chunked or head.websocket or head.timeout_s < math.inf)
        self.length = head.length
        self._is_quick = is_simple and head.length <= REPLAY_BYTES
        given = head.request_id or head.traceparent or head.chunked or head.websocket or head.expects
        self.is_lasting = not given and head.keep_alive and head.minor == 1

    def opening(self, request: Request, now_s: float) -> bytes:
        """The bytes that begin a request at a worker: its head, and the body as far as it is here.

        A body that is too long to keep, or not complete, is let go.
        """
        last, body = self._last, request.body
        if request.is_plain and self._is_quick and now_s == request.arrived_s:
            parts = (self._first, request.request_id, b"\r\ntraceparent: ", request.traceparent, last, body[0])
            return b"".join(parts)
        if self.head.timeout_s < math.inf or now_s - request.arrived_s > _WAITED_S:
            last = b"\r\nX-Mlfuncs-Timeout-Ms: %d%s" % (max(1, (request.deadline_s - now_s) * 1000), last)
        if self.head.websocket:
            last = b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        elif self.head.chunked:
            if request.complete:
                last = b"%s\r\nContent-Length: %d\r\n\r\n" % (last[:-4], request.size)
            else:
                last = b"%s\r\nTransfer-Encoding: chunked\r\n\r\n" % last[:-4]
                body = [chunk(piece) for piece in body]
        whole = body[0] if len(body) == 1 else b"".join(body)
        if not request.complete or request.size > REPLAY_BYTES:
            request.replayable, request.body = False, []
        return b"%s%s\r\ntraceparent: %s%s%s" % (self._first, request.request_id, request.traceparent, last, whole)


class Request:
    """A request with its body so far and its place in the router. `status` is 0 until an answer is known."""

    # Slots without defaults of the class, whose look-ups Python 3.11 does not specialise: 3 % of the router's own time.
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
        "head",
        "head_sent",
        "is_copy",
        "is_plain",
        "plan",
        "queued",
        "replayable",
        "replica",
        "request_id",
        "revision",
        "size",
        "status",
        "traceparent",
        "upstream",
        "waits_for_body",
    )

    def __init__(self, head: RequestHead, caller: Caller) -> None:
        self.head = head
        self.caller = caller
        self.size = self.attempts = self.status = 0
        self.complete = self.done = self.queued = self.head_sent = self.waits_for_body = self.is_copy = False
        self.is_plain = False  # whole when sent, by a lasting plan: a worker's bytes may be its answer as they are
        self.replayable = True
        self.extra = b""
        self.plan: Plan | None = None
        self.replica: ReplicaState | None = None
        self.upstream: Upstream | None = None
        self.body: list[bytes]
        self.arrived_s: float
        self.deadline_s: float  # known once it is routed
        self.request_id: bytes
        self.traceparent: bytes
        self.endpoint: Endpoint
        self.revision: RevisionState


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)
