"""What a handler's code may know of the request it answers: its id, its trace, and how long it may still take.

The worker sets it around every call; code that calls further (another endpoint) passes it on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


class RequestContext:
    """One request: `deadline_s` is on the clock of time.monotonic(); `traceparent` is W3C's, empty when none came."""

    __slots__ = ("deadline_s", "request_id", "traceparent")

    def __init__(self, request_id: str, deadline_s: float, traceparent: str = "") -> None:
        self.request_id, self.deadline_s, self.traceparent = request_id, deadline_s, traceparent

    def remaining_s(self) -> float:
        """Seconds left before the deadline; below 0 when it is over."""
        return self.deadline_s - time.monotonic()

    def extend(self, timeout_s: float) -> None:
        """Move the deadline to `timeout_s` from now: a stream's next item has the same time as its first."""
        self.deadline_s = time.monotonic() + timeout_s


@dataclass(frozen=True)
class OutgoingCall:
    """A call that the running request made of an endpoint. `status` is the answer's, 0 when none came."""

    url: str
    parent: str  # the running request's traceparent
    traceparent: str  # the one that was sent
    started_s: float  # time.monotonic()
    status: int


_watch: Callable[[OutgoingCall], None] | None = None


def watch_calls(watcher: Callable[[OutgoingCall], None] | None) -> None:
    """Tell `watcher` of every call made inside a request of this process, once it is over; None ends it."""
    global _watch
    _watch = watcher


def note_call(url: str, traceparent: str, started_s: float, status: int) -> None:
    """Tell the watcher, when there is one and a request is running."""
    request = CURRENT_REQUEST.get()
    if _watch is not None and request is not None:
        _watch(OutgoingCall(url, request.traceparent, traceparent, started_s, status))


CURRENT_REQUEST: ContextVar[RequestContext | None] = ContextVar("mlfuncs_request", default=None)


def current_request() -> RequestContext | None:
    """The request that the running code answers, or None outside one."""
    return CURRENT_REQUEST.get()
