"""The router's side of a client's connection: requests in, in order, and their answers out."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from mlfuncs.errors import MlfuncsError
from mlfuncs_runtime.router_core import Core, too_large
from mlfuncs_runtime.router_http import HEAD_BYTES, HEADER_COUNT, BadRequest, answer, problem, problem_of
from mlfuncs_runtime.router_request import Request

if TYPE_CHECKING:
    from mlfuncs_runtime.router_upstream import Upstream

_PIPELINED = 16  # requests read ahead on one connection; a guess
_LINGER_S = 2.0  # how long a refused client may go on sending, so that it reads why: nginx's lingering_timeout is 5 s
_NEVER = float("inf")
_PROBLEM = b"application/problem+json"


class Client(asyncio.Protocol):
    """One accepted connection. `due_s` is when it is closed unless something happens before."""

    __slots__ = (
        "_blocked",
        "_fed",
        "_headers",
        "_in_head",
        "_parser",
        "_paused",
        "_pumping",
        "_receiving",
        "_url",
        "_waiting",
        "closing",
        "core",
        "due_s",
        "half_closed",
        "known_token",
        "lingering",
        "request",
        "transport",
        "tunnelled",
    )

    def __init__(self, core: Core) -> None:
        self.core = core
        self.request: Request | None = None  # being answered
        self.known_token: tuple[bytes, tuple[str, ...]] | None = None
        self.closing = self.half_closed = self.lingering = False
        self._paused = self._blocked = self._pumping = self._in_head = False
        self.tunnelled: Upstream | None = None
        self.due_s = time.monotonic() + core.options.head_timeout_s
        self._receiving: Request | None = None  # whose body is arriving
        self._waiting: deque[Request | tuple[int, str]] = deque()
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._fed = 0
        self._parser = HttpRequestParser(self)
        self.transport: asyncio.Transport

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow the one being answered."""
        request = self.request
        return request is not None and request.keep_alive and not self.core.draining

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        accepted = transport.get_extra_info("socket")
        if accepted is not None and accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.core.clients.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.core.clients.discard(self)
        self.closing = True
        self._waiting.clear()
        request, self.request = self.request, None
        if request is not None and not request.done and hasattr(request, "endpoint"):
            request.endpoint.settle(request)
        if self.tunnelled is not None:
            self.tunnelled.transport.close()

    def eof_received(self) -> bool:
        if self.tunnelled is not None or self.lingering:
            return False
        self.half_closed = True
        if self._in_head or self._receiving is not None:
            self._refuse(400, "the connection ended in the middle of a request")
            return True
        return self.request is not None or bool(self._waiting)  # a client may say that it sends no more, and read on

    def pause_writing(self) -> None:
        self._blocked = True
        self.due_s = time.monotonic() + self.core.options.stall_timeout_s
        if self.request is not None and self.request.upstream is not None:
            self.request.upstream.let_flow(False)

    def resume_writing(self) -> None:
        self._blocked = False
        self.due_s = _NEVER
        if self.request is not None and self.request.upstream is not None:
            self.request.upstream.let_flow(True)
        elif self.request is None and not self.closing:
            self._pump()

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        self._in_head = True
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        headers, self._headers = self._headers, []  # what follows the body is a trailer, and dropped
        if self.closing:
            return
        if self._fed > HEAD_BYTES:
            size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in headers)
            if size > HEAD_BYTES:
                self._refuse(431, f"the request's head is over the bound of {HEAD_BYTES} bytes")
                return
        if len(headers) > HEADER_COUNT:
            self._refuse(431, f"the request has {len(headers)} headers; the bound is {HEADER_COUNT}")
            return
        parser = self._parser
        version, keep_alive = parser.get_http_version(), parser.should_keep_alive()
        try:
            request = Request(parser.get_method(), self._url, version, headers, keep_alive)
        except BadRequest as exc:
            self._refuse(exc.status, exc.detail)
            return
        request.caller = self
        self._receiving = request
        self._waiting.append(request)

    def on_body(self, data: bytes) -> None:
        request = self._receiving
        if request is None:
            return
        request.size += len(data)
        if request.upstream is not None:
            request.upstream.send_body(request, data)
            return
        if request.done:
            return
        request.body.append(data)
        if request.queued:
            request.endpoint.queued_bytes += len(data)
        if request.size > self.core.short_body:
            self.let_body_flow(False)

    def on_message_complete(self) -> None:
        request, self._receiving = self._receiving, None
        self._fed = 0
        if request is None:
            return
        request.complete = True
        if request.upstream is not None:
            request.upstream.end_body(request)
        elif request.waits_for_body and not request.done:
            request.endpoint.submit(request)

    # --- bytes in

    def data_received(self, data: bytes) -> None:
        if self.tunnelled is not None:
            self.tunnelled.transport.write(data)
            return
        if self.closing:
            return
        self._fed += len(data)
        in_head = self._in_head
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as exc:
            self._after_upgrade(data[exc.args[0] :])
        except HttpParserError as exc:
            self._refuse_bytes(exc)
        if self._receiving is not None:
            self._check_body(self._receiving)
        elif self._in_head and self._fed > HEAD_BYTES and not self.closing:
            self._refuse(431, f"the request's head is over the bound of {HEAD_BYTES} bytes")
        if self.request is None:
            if self._waiting:
                self._pump()
            elif self._in_head and not in_head:
                self.due_s = time.monotonic() + self.core.options.head_timeout_s
        elif len(self._waiting) >= _PIPELINED:
            self.let_body_flow(False)

    def _after_upgrade(self, rest: bytes) -> None:
        """The parser stops after a request that asks for an upgrade; only a WebSocket's is taken up."""
        self._parser = HttpRequestParser(self)
        last = self._waiting[-1] if self._waiting else None
        if isinstance(last, Request) and last.websocket:
            if rest:  # a client must wait for the 101 before it speaks the new protocol
                self._refuse(400, "bytes came after a WebSocket request, before its answer")
        elif rest:
            self.data_received(rest)

    def _refuse_bytes(self, exc: HttpParserError) -> None:
        if self._waiting and isinstance(self._waiting[-1], Request) and not self._waiting[-1].keep_alive:
            return  # bytes after the last request of a connection are nobody's
        if self.request is not None and not self.request.keep_alive and self._receiving is None:
            return
        if isinstance(exc.__context__, MlfuncsError | BadRequest):
            raise exc
        self._refuse(400, f"the request is not HTTP/1.1 as it is written: {exc}")

    def _check_body(self, request: Request) -> None:
        self.due_s = time.monotonic() + self.core.options.stall_timeout_s
        if request.done or not request.chunked or not hasattr(request, "endpoint"):
            return
        limit = request.endpoint.route.limits.body_bytes
        if request.size > limit:
            self.core.fail(request, too_large(limit))

    def _refuse(self, status: int, detail: str) -> None:
        """Answer what came before, then refuse, then close; nothing that follows is read."""
        self.closing = True
        receiving, self._receiving = self._receiving, None
        self.core.refused[status] = self.core.refused.get(status, 0) + 1
        if receiving is not None and receiving is self.request:
            self._abandon(receiving, status, detail)
            return
        if receiving is not None and self._waiting and self._waiting[-1] is receiving:
            self._waiting.pop()
        self._waiting.append((status, detail))
        if self.request is None:
            self._pump()

    def _abandon(self, request: Request, status: int, detail: str) -> None:
        """The body of the request being answered went wrong."""
        if request.head_sent or request.done:
            self.transport.abort()
            return
        request.status = status
        if hasattr(request, "endpoint"):
            request.endpoint.settle(request)
        self._answer_refusal(status, detail, request.request_id)

    # --- answers out

    def _pump(self) -> None:
        """Take up the requests that wait, one after another."""
        if self._pumping:
            return
        self._pumping = True
        while self.request is None and self._waiting and not self._blocked and not self.transport.is_closing():
            request = self._waiting.popleft()
            if isinstance(request, tuple):
                self._answer_refusal(*request, b"")
                break
            self.request = request
            self.due_s = _NEVER
            self._take_up(request)
        self._pumping = False
        if self.request is None and not self.closing:
            self._rest()

    def _take_up(self, request: Request) -> None:
        core = self.core
        core.identify(request)
        try:
            core.route(request, self)
        except MlfuncsError as exc:
            status, body, extra = problem_of(exc, request.request_id)
            core.refused[status] = core.refused.get(status, 0) + 1
            self.reply(request, status, body, extra)
            return
        if request.expects and not request.complete and not request.done and not request.size:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _rest(self) -> None:
        """Nothing to answer: wait for the next request, or close."""
        if self.half_closed:
            self.transport.close()
            return
        now_s, options = time.monotonic(), self.core.options
        self.due_s = now_s + (options.head_timeout_s if self._in_head else options.idle_timeout_s)
        if self._paused:
            self.let_body_flow(True)

    def write(self, data: bytes) -> None:
        """Send bytes of the answer on."""
        self.transport.write(data)

    def finished(self, request: Request, *, close: bool) -> None:
        """The answer is complete; go on with the next request, or close."""
        if self.request is not request:
            return
        self.request = None
        self.due_s = _NEVER
        if not request.complete:
            self._linger()
        elif close or not request.keep_alive or self.core.draining:
            self._close()
        elif self._waiting:
            self._pump()
        else:
            self._rest()

    def reply(self, request: Request, status: int, body: bytes, extra: bytes = b"", *, close: bool = False) -> None:
        """Send the router's own answer and go on."""
        content_type = _PROBLEM if status >= 400 else b"application/json"
        self.reply_with(request, status, body, content_type, extra, close=close)

    def reply_with(
        self,
        request: Request,
        status: int,
        body: bytes,
        content_type: bytes,
        extra: bytes = b"",
        *,
        close: bool = False,
    ) -> None:
        """Send the router's own answer of any type and go on."""
        if self.request is not request:
            return
        request.status, request.head_sent = status, True
        lines = b"X-Request-Id: %s\r\n%s%s" % (request.request_id, request.extra, extra)
        close = close or not self.keeps_alive or not request.complete
        if not close and not request.minor:
            lines += b"Connection: keep-alive\r\n"
        data = answer(status, body, content_type, lines, close=close)
        self.transport.write(data[: len(data) - len(body)] if request.method == b"HEAD" else data)
        request.done = True
        self.finished(request, close=close)

    def aborted(self, request: Request) -> None:
        """The answer broke off; only a cut connection can say so."""
        self.transport.abort()

    def tunnel(self, request: Request) -> None:
        """From now on bytes pass both ways as they are."""
        self.tunnelled = request.upstream
        self.due_s = _NEVER

    def let_body_flow(self, flow: bool) -> None:
        """Read on, or stop reading, so that the sender is held by its own socket."""
        if flow == self._paused:
            self._paused = not flow
            if not self.transport.is_closing():
                (self.transport.resume_reading if flow else self.transport.pause_reading)()

    def platform(self, request: Request, path: bytes) -> None:
        """Answer a request for the platform's own pages."""
        from mlfuncs_runtime.router_pages import answer_page

        answer_page(self, request, path)

    def _answer_refusal(self, status: int, detail: str, request_id: bytes) -> None:
        self.closing = True
        title = {431: "HeadersTooLarge", 408: "RequestTimeout", 413: "TooLarge"}.get(status, "BadRequest")
        _, body = problem(status, title, detail, request_id)
        self.transport.write(answer(status, body, _PROBLEM, close=True))
        self.request = None
        self._linger()

    def _close(self) -> None:
        self.closing = True
        self.transport.close()

    def _linger(self) -> None:
        """Close for writing and read on a while: a reset would take the answer from the client's hands."""
        self.closing = True
        if self.transport.is_closing():
            return
        self.lingering = True
        self.due_s = time.monotonic() + _LINGER_S
        self.let_body_flow(True)
        if self.transport.can_write_eof() and not self.half_closed:
            self.transport.write_eof()
        else:
            self.transport.close()

    def close_if_idle(self) -> None:
        """Close a connection that has no request under way."""
        if self.request is None and not self._waiting and not self._in_head and not self.closing:
            self._close()

    def overdue(self) -> None:
        """Its time is over: tell a client that is in the middle of a request, then close."""
        answering = self.request is not None and self.request.head_sent
        if answering or self.lingering or self.closing:
            self.transport.abort()
        elif self._receiving is not None or self._in_head:
            self._refuse(408, "the request did not arrive in time")
        else:
            self._close()
