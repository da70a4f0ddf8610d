"""The router's side of a client's connection: requests in, in order, and their answers out.

Clients send the same head again and again. One that came whole, was parsed, checked and routed is recognised by its
bytes from then on, and its request goes the same way without the parser; a new table of routes forgets all of them.
"""

from __future__ import annotations

import asyncio
import socket
from time import monotonic
from typing import TYPE_CHECKING, cast

from mlfuncs.errors import MlfuncsError, Unavailable
from mlfuncs_runtime.router.core import Core
from mlfuncs_runtime.router.entrance import plan_of
from mlfuncs_runtime.router.http import RequestHead, answer, problem, problem_of
from mlfuncs_runtime.router.reader import RequestReader
from mlfuncs_runtime.router.request import Plan, Request

if TYPE_CHECKING:
    from mlfuncs_runtime.router.upstream import Upstream

_LINGER_S = 2.0  # a refused client may go on sending this long, so that it reads why; nginx's lingering_timeout is 5 s
_KEY_BYTES = 2048  # a longer head is not recognised again
_NEVER = float("inf")
_PROBLEM = b"application/problem+json"
_TITLES = {408: "RequestTimeout", 413: "TooLarge", 431: "HeadersTooLarge"}


class Client(RequestReader):
    """One accepted connection."""

    __slots__ = ("_pumping", "_quiet", "half_closed", "lingering", "tunnelled", "write")

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.half_closed = self.lingering = self._pumping = False
        self._quiet = False  # nothing happened here since the request being answered came as a whole
        self.tunnelled: Upstream | None = None

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow the one being answered."""
        request = self.request
        if request is None or request.head.websocket:  # its client may take the connection for anything now
            return False
        return request.head.keep_alive and not self.core.draining

    # --- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.write = self.transport.write
        accepted = transport.get_extra_info("socket")
        if accepted is not None and accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        core = self.core
        core.clients.add(self)
        if len(core.clients) > core.options.max_clients:
            self._turn_away()

    def connection_lost(self, exc: Exception | None) -> None:
        self.core.clients.discard(self)
        self.closing, self._idle = True, False
        self._waiting.clear()
        request, self.request = self.request, None
        if request is not None and request.plan is not None:
            request.endpoint.settle(request, monotonic())
        if self.tunnelled is not None:
            self.tunnelled.transport.close()

    def eof_received(self) -> bool:
        if self.tunnelled is not None or self.lingering:
            return False
        self.half_closed, self._quiet = True, False
        if self._in_head or self._receiving is not None:
            self._refuse(400, "the connection ended in the middle of a request")
            self._pump()
            return True
        if self.request is not None and self.request.queued:
            return False  # it may be gone: what no worker has begun is not begun for it (haproxy's abortonclose)
        return self.request is not None or bool(self._waiting)  # a client may say that it sends no more, and read on

    def data_received(self, data: bytes) -> None:
        if self._idle:
            end = data.find(b"\r\n\r\n") + 4
            key = data[:end]
            plan = self.core.plans.get(key)
            if plan is not None and len(data) == end + plan.length:
                self._follow(plan, data[end:])
                return
            self._key = key
        if self.tunnelled is not None:
            self.tunnelled.transport.write(data)
        elif not self.closing:
            self._quiet = False
            self._parse(data)

    def pause_writing(self) -> None:
        self._blocked, self._idle, self._quiet = True, False, False
        self.due_s = monotonic() + self.core.options.stall_timeout_s
        if self.request is not None and self.request.upstream is not None:
            self.request.upstream.let_flow(False)

    def resume_writing(self) -> None:
        self._blocked = False
        self.due_s = _NEVER
        if self.request is not None and self.request.upstream is not None:
            self.request.upstream.let_flow(True)
        elif self.request is None and not self.closing:
            self._pump()

    # --- requests

    def _make_request(self, head: RequestHead) -> Request:
        request = Request(head, self)
        request.body = []
        return request

    def _follow(self, plan: Plan, body: bytes) -> None:
        """Take up a request whose head is known, and whose body is whole."""
        request = self.request = Request(plan.head, self)
        request.body, request.size, request.complete = [body], plan.length, True
        if plan.extra:
            request.extra = plan.extra
        else:
            request.is_plain = True
        self._idle, self._quiet, self.due_s = False, True, _NEVER
        self.core.identify(request)
        try:
            self.core.follow(request, plan)
        except MlfuncsError as exc:
            self._reply_error(request, exc)

    def _pump(self, key: bytes = b"") -> None:
        """Take up the requests that wait, one after another; `key` is the whole head of the only one."""
        if self._pumping:
            return
        self._pumping = True
        while self.request is None and self._waiting and not self._blocked and not self.transport.is_closing():
            request = self._waiting.popleft()
            if isinstance(request, tuple):
                self._refuse_now(*request)
                break
            self.request = request
            self.due_s = _NEVER
            self._take_up(request, key)
        self._pumping = False
        if self.request is None and not self.closing and not self._waiting:
            self._rest(monotonic())

    def _take_up(self, request: Request, key: bytes) -> None:
        self.core.identify(request)
        try:
            plan = plan_of(self.core, request, self)
            if plan is not None:
                self.core.follow(request, plan)
        except MlfuncsError as exc:
            self._reply_error(request, exc)
            return
        if plan is not None and plan.is_lasting and 4 < len(key) <= _KEY_BYTES:
            self.core.keep_plan(key, plan)
        if request.head.expects and not request.complete and not request.done and not request.size:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _rest(self, now_s: float) -> None:
        """Nothing to answer: wait for the next request, or close."""
        if self.half_closed:
            self._close()
            return
        options = self.core.options
        if self._in_head:
            self.due_s = now_s + options.head_timeout_s
        else:
            self._idle, self.due_s = not self._blocked, now_s + options.idle_timeout_s
        if self._paused:
            self.let_body_flow(True)

    # --- answers

    def finished(self, request: Request, now_s: float, *, close: bool = False) -> None:
        """The answer is complete; go on with the next request, or close."""
        if self.request is not request:
            return
        self.request = None
        if self._quiet and not close:
            self._idle, self.due_s = True, now_s + self.core.idle_timeout_s
        elif not request.complete:
            self._linger()
        elif close or not request.head.keep_alive or self.core.draining:
            self._close()
        elif self._waiting:
            self._pump()
        else:
            self._rest(now_s)

    def _reply_error(self, request: Request, error: MlfuncsError) -> None:
        status, body, extra = problem_of(error, request.request_id)
        self.core.refused[status] = self.core.refused.get(status, 0) + 1
        if self.core.spans is not None:
            request.status = status
            self.core.spans.note(request, monotonic())
        self.reply(request, status, body, extra)

    def reply(
        self, request: Request, status: int, body: bytes, extra: bytes = b"", content_type: bytes = _PROBLEM
    ) -> None:
        """Send the router's own answer, by default a problem document, and go on."""
        if self.request is not request:
            return
        request.status, request.head_sent = status, True
        lines = b"X-Request-Id: %s\r\n%s%s" % (request.request_id, request.extra, extra)
        close = not self.keeps_alive or not request.complete
        if not close and not request.head.minor:
            lines += b"Connection: keep-alive\r\n"
        data = answer(status, body, content_type, lines, close=close)
        self.transport.write(data[: len(data) - len(body)] if request.head.method == b"HEAD" else data)
        request.done = True
        self.finished(request, monotonic(), close=close)

    def aborted(self, request: Request) -> None:
        """The answer broke off; only a cut connection can say so."""
        self.transport.abort()

    def tunnel(self, request: Request) -> None:
        """From now on bytes pass both ways as they are."""
        self.tunnelled = request.upstream
        self.due_s = _NEVER

    def _refuse_current(self, request: Request, status: int, detail: str) -> None:
        """The body of the request being answered went wrong."""
        if request.head_sent or request.done:
            self.transport.abort()
            return
        request.status = status
        if request.plan is not None:
            request.endpoint.settle(request, monotonic())
        self._refuse_now(status, detail, request.request_id)

    def _refuse_now(self, status: int, detail: str, request_id: bytes) -> None:
        self.closing = True
        _, body = problem(status, _TITLES.get(status, "BadRequest"), detail, request_id)
        self.transport.write(answer(status, body, _PROBLEM, b"X-Request-Id: %s\r\n" % request_id, close=True))
        self.request = None
        self._linger()

    def _turn_away(self) -> None:
        """Too many are connected: say so; in a flood, when as many again as a quarter of them linger, just hang up."""
        core, limit = self.core, self.core.options.max_clients
        core.refused[503] = core.refused.get(503, 0) + 1
        if len(core.clients) > limit + max(1, limit // 4):
            self.transport.abort()
            return
        error = Unavailable(f"the router holds {limit} connections, which is its bound; try again later", 1.0)
        request_id = core.ids.request_id()
        status, body, extra = problem_of(error, request_id)
        extra += b"X-Request-Id: %s\r\n" % request_id
        self.transport.write(answer(status, body, _PROBLEM, extra, close=True))
        self._linger()

    # --- ends

    def _close(self) -> None:
        self.closing, self._idle = True, False
        self.transport.close()

    def _linger(self) -> None:
        """Close for writing and read on a while: a reset would take the answer from the client's hands."""
        self.closing, self._idle = True, False
        if self.transport.is_closing():
            return
        self.lingering = True
        self.due_s = monotonic() + _LINGER_S
        self.let_body_flow(True)
        if self.transport.can_write_eof() and not self.half_closed:
            self.transport.write_eof()
        else:
            self.transport.close()

    def hurry(self) -> None:
        """Look again whether to close when the answer is complete: the router ends."""
        self._quiet = False

    def close_if_idle(self) -> None:
        """Close a connection that has no request under way."""
        if self.request is None and not self._waiting and not self._in_head and not self.closing:
            self._close()

    def overdue(self) -> None:
        """Its time is over: tell a client that is in the middle of a request, then close."""
        answering = self.request is not None and self.request.head_sent
        if self._receiving is not None and (self._paused or (answering and not self._blocked)):
            self.due_s = _NEVER  # it is the router that does not read, or the answer that goes on
        elif answering or self.lingering or self.closing:
            self.transport.abort()
        elif self._receiving is not None or self._in_head:
            self._refuse(408, "the request did not arrive in time")
            self._pump()
        else:
            self._close()
