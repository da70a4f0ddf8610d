"""One HTTP request and its answer, over ASGI: headers, bounded body, JSON and problem documents (RFC 9457)."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from mlfuncs.errors import DeadlineExceeded, InvalidInput, MlfuncsError, Overloaded, TooLarge, Unavailable
from mlfuncs.serving.request_context import RequestContext
from mlfuncs_runtime.worker.shortcut import arrived_body, cycle_of, write_answer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON = b"application/json"
PROBLEM = b"application/problem+json"
_ID_MAX = 128  # characters of a caller's request id that are kept
_counter = itertools.count(1)
_process_id = ""


def new_request_id() -> str:
    """A request id that no other process of this endpoint makes: random per process, then counted."""
    return f"{_process_id or _renew_process_id()}-{next(_counter):08x}"


def _renew_process_id() -> str:
    global _process_id
    _process_id = os.urandom(6).hex()
    return _process_id


os.register_at_fork(after_in_child=_renew_process_id)


class Exchange(RequestContext):
    """One request being answered; `status` is 0 until the answer's head is sent.

    It is the request's context as well: one object less on the fast path.
    """

    __slots__ = ("_cycle", "close", "headers", "receive", "scope", "send", "status")

    def __init__(self, scope: Scope, receive: Receive, send: Send, timeout_s: float) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status = 0
        self.close = False  # the connection ends with this answer
        self._cycle = cycle_of(send)
        find = self.headers.get
        given, allowed, trace = find(b"x-request-id"), find(b"x-mlfuncs-timeout-ms"), find(b"traceparent")
        self.request_id = given.decode("latin-1")[:_ID_MAX] if given else new_request_id()
        self.deadline_s = time.monotonic() + (timeout_s if allowed is None else _shorter(timeout_s, allowed))
        self.traceparent = trace.decode("latin-1") if trace else ""

    @property
    def method(self) -> str:
        """The request's method, upper case."""
        return self.scope["method"]

    @property
    def path(self) -> str:
        """The decoded path, from "/"."""
        return self.scope["path"]

    def content_type(self) -> bytes:
        """The request's media type in lower case, without parameters; empty when none came."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()

    async def body(self, limit: int) -> bytes:
        """The whole request body. Raises TooLarge past `limit` bytes, and InvalidInput when the client goes away."""
        if self._cycle is not None and (body := arrived_body(self._cycle)) is not None and len(body) <= limit:
            return body
        return await self.rest_of_body(await self.receive(), limit)

    async def rest_of_body(self, message: MutableMapping[str, Any], limit: int) -> bytes:
        """The whole body, whose first message is received already. Raises as `body` does."""
        if int(self.headers.get(b"content-length", b"0")) > limit:
            raise self._too_large(limit)
        chunks, size = [], 0
        while True:
            if message["type"] != "http.request":
                self.close = True
                raise InvalidInput("the client closed the connection before the body was complete")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise self._too_large(limit)
            chunks.append(chunk)
            if not message.get("more_body"):
                return b"".join(chunks)
            try:
                async with asyncio.timeout(max(0.0, self.remaining_s())):
                    message = await self.receive()
            except TimeoutError as exc:
                self.close = True
                raise DeadlineExceeded(f"the body did not arrive in time: {size} bytes came") from exc

    def _too_large(self, limit: int) -> TooLarge:
        self.close = True  # the rest of the body is not read
        return TooLarge(f"the request body is over the bound of {limit} bytes; send less at once")

    async def answer(self, status: int, body: bytes, content_type: bytes = JSON, headers: Headers = ()) -> None:
        """Send a whole answer."""
        self.status = status
        if self._cycle is not None and not headers and not self.close:
            request_id = self.request_id.encode("latin-1", "replace")
            head = b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
            if write_answer(self._cycle, status, head % (content_type, len(body), request_id), body):
                return
        fields = [
            (b"content-type", content_type),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self.request_id.encode("latin-1", "replace")),
            *headers,
        ]
        if self.close:
            fields.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": status, "headers": fields})
        await self.send({"type": "http.response.body", "body": b"" if self.scope["method"] == "HEAD" else body})

    async def start(self, status: int, content_type: bytes, headers: Headers = ()) -> None:
        """Send the head of an answer whose body follows through `send`."""
        self.status = status
        head = [
            (b"content-type", content_type),
            (b"x-request-id", self.request_id.encode("latin-1", "replace")),
            *headers,
        ]
        if self.close:
            head.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": status, "headers": head})

    async def fail(self, error: MlfuncsError) -> None:
        """Send `error` as a problem document; 429 and 503 carry Retry-After in whole seconds."""
        headers = []
        if isinstance(error, Overloaded | Unavailable):
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        problem = error.to_problem(self.request_id)
        await self.answer(error.status, json.dumps(problem, default=str).encode(), PROBLEM, headers)

    async def refuse(self, status: int, title: str, detail: str, headers: Headers = ()) -> None:
        """Send a problem document for a fault of HTTP itself (405, 415), which no exception stands for."""
        problem = {
            "type": "about:blank",
            "title": title,
            "status": status,
            "detail": detail,
            "request_id": self.request_id,
        }
        await self.answer(status, json.dumps(problem).encode(), PROBLEM, headers)


def _shorter(timeout_s: float, allowed_ms: bytes) -> float:
    """The lesser of the endpoint's timeout and the one a caller still has; a value that is no number is ignored."""
    try:
        return min(timeout_s, max(0.0, float(allowed_ms) / 1000))
    except ValueError:
        return timeout_s
