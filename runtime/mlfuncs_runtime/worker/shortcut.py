"""A request's whole body in, and a whole answer out, without ASGI's messages, when the server is uvicorn.

Most requests here are small: the body has arrived when the application starts, and the answer is one write. uvicorn's
`send` then costs more than the validation of the input (two coroutines, three regular expressions a header, two
writes; benchmarks/worker_fast_path.py). Both functions look at uvicorn's own request object, and do nothing when it is
not what they know: the caller then speaks plain ASGI. tests/runtime/test_worker_shortcut.py holds both ways to the
same bytes.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_NEEDED = {
    "body",
    "default_headers",
    "disconnected",
    "flow",
    "keep_alive",
    "message_event",
    "more_body",
    "on_response",
    "response_complete",
    "response_started",
    "scope",
    "transport",
    "waiting_for_100_continue",
}
_known: bool | None = None  # whether uvicorn's request object has what is used here
_heads: dict[int, tuple[Any, bytes]] = {}  # status -> (the server's own headers, status line and those as bytes)


def cycle_of(send: Any) -> Any:
    """uvicorn's object behind a `send`, or None when it is another server's."""
    global _known
    cycle = getattr(send, "__self__", None)
    if type(cycle) is not RequestResponseCycle:
        return None
    if _known is None:
        _known = vars(cycle).keys() >= _NEEDED
    return cycle if _known else None


def arrived_body(cycle: Any) -> bytes | None:
    """The whole body, when it has arrived; None when more is to come or the client waits for "100 Continue"."""
    if cycle.more_body or cycle.disconnected or cycle.waiting_for_100_continue:
        return None
    body = bytes(cycle.body)
    cycle.body = bytearray()
    cycle.message_event.clear()
    return body


def write_answer(cycle: Any, status: int, head: bytes, body: bytes) -> bool:
    """Write an answer whose `head` is header lines with their line ends; False when the caller has to use `send`."""
    if cycle.response_started or cycle.disconnected or cycle.flow.write_paused or cycle.scope["method"] == "HEAD":
        return False
    known = _heads.get(status)
    if known is None or known[0] is not cycle.default_headers:  # uvicorn makes a new list with every new date
        lines = b"".join(b"%b: %b\r\n" % pair for pair in cycle.default_headers)
        known = _heads[status] = (cycle.default_headers, STATUS_LINE[status] + lines)
    cycle.response_started = cycle.response_complete = True
    if cycle.keep_alive:
        cycle.transport.write(b"%b%b\r\n%b" % (known[1], head, body))
        cycle.message_event.set()
    else:
        cycle.transport.write(b"%b%bconnection: close\r\n\r\n%b" % (known[1], head, body))
        cycle.message_event.set()
        cycle.transport.close()
    cycle.on_response()
    return True
