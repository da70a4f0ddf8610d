"""The router's side of a connection to a worker: one request at a time, its answer passed on as it comes.

A worker's answers mostly have the same head but for the request's id. Once the parser has understood a head, its equals
are recognised by their bytes (the id put aside) and passed on without being parsed again.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from mlfuncs_runtime.router.answer import CHUNKED, END, HOP, ID, LENGTH, AnswerReader
from mlfuncs_runtime.router.http import CRLF
from mlfuncs_runtime.router.request import IDEMPOTENT, Request, chunk

if TYPE_CHECKING:
    from mlfuncs_runtime.router.replica import ReplicaState

_HEAD_BYTES = 65_536  # of an answer's head; a guess, four times what a client may send
_SHAPES = 256  # heads that are recognised per worker
_NOT_IN_HEADS = b"\0"  # stands for the request's id in a recognised head


class Upstream(AnswerReader):
    """One pooled connection to a replica."""

    __slots__ = ("replica", "request", "transport")

    def __init__(self, replica: ReplicaState) -> None:
        super().__init__()
        self.replica = replica
        self.request: Request | None = None
        self.transport: asyncio.Transport

    # --- requests out

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, request: Request, now_s: float) -> None:
        """Begin a request; the connection must be idle."""
        if not self._is_fresh:
            self._reset()
        assert request.plan is not None
        self.request = request
        request.upstream = self
        request.attempts += 1
        self.transport.write(request.plan.opening(request, now_s))
        if not request.complete:
            request.caller.let_body_flow(True)

    def send_body(self, request: Request, data: bytes) -> None:
        """More of the request's body."""
        self.transport.write(chunk(data) if request.head.chunked else data)

    def end_body(self, request: Request) -> None:
        """The request's body is complete."""
        if request.head.chunked:
            self.transport.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Give the request up, and the connection with it."""
        self.request = None
        self.transport.abort()

    def let_flow(self, flow: bool) -> None:
        """Read on, or stop reading because the caller does not keep up."""
        if not self.transport.is_closing():
            (self.transport.resume_reading if flow else self.transport.pause_reading)()

    def pause_writing(self) -> None:
        if self.request is not None:
            self.request.caller.let_body_flow(False)

    def resume_writing(self) -> None:
        if self.request is not None:
            self.request.caller.let_body_flow(True)

    # --- answers in

    def data_received(self, data: bytes) -> None:
        request = self.request
        if request is None:  # nobody asked: the worker is out of step
            self.replica.forget(self)
            self.transport.abort()
            return
        if self._is_fresh:
            end = data.find(END) + 4
            shape = self.replica.shapes.get(data[:end].replace(request.request_id, _NOT_IN_HEADS, 1))
            if shape is not None and len(data) == end + shape[1] and request.is_plain:
                self._pass_whole(request, data, shape[0])
                return
            self._is_fresh = False
        self._parse(request, data)

    def _pass_whole(self, request: Request, data: bytes, status: int) -> None:
        request.status = status
        request.caller.write(data)
        self.request = request.upstream = None
        now_s = monotonic()
        self.replica.park(self)
        request.endpoint.settle(request, now_s)
        request.caller.finished(request, now_s)

    def _parse(self, request: Request, data: bytes) -> None:
        if request.head_sent and self._status == 101:
            request.caller.write(data)
            return
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            pass
        except HttpParserError:
            self._break("the worker's answer is not HTTP")
            return
        if request.head_sent:
            if self._excess:
                self._break("the worker sent more than its answer")
                return
            request.caller.write(self._dechunk.feed(data) if self._dechunk is not None else data)
        else:
            raw = self._raw + data if self._raw else data
            if not self._status:
                self._raw = raw
                if len(raw) > _HEAD_BYTES:
                    self._break("the worker's answer has an oversized head")
                return
            if not self._begin(request, raw):
                return
        if self._done:
            self._finish(request)

    def _begin(self, request: Request, raw: bytes) -> bool:
        """Pass the head on, rewritten as far as it must be; False when the answer was refused instead."""
        for _ in range(self._informational):
            raw = raw[raw.index(END) + 4 :]
        status, flags = self._status, self._flags
        if status == 101:
            return self._begin_tunnel(request, raw)
        if request.head.method == b"HEAD":
            if not raw.endswith(END):
                self._break("the worker answered HEAD with a body")
                return False
            self._done, self._parser = True, HttpResponseParser(self)
        elif not flags & (LENGTH | CHUNKED) and status not in (204, 304):
            self._until_close = True
        elif flags == LENGTH | ID and self._done and self._keeps and not self._informational:
            self._remember(request, raw)
        if self._excess:
            self._break("the worker sent more than its answer")
            return False
        request.head_sent, request.status = True, status
        request.endpoint.core.active.pop(request, None)  # no deadline holds any more
        extra = request.extra
        if not flags & ID:
            extra = b"%sX-Request-Id: %s\r\n" % (extra, request.request_id)
        is_old = not (request.head.minor and raw.startswith(b"HTTP/1.1"))
        if flags & HOP or self._until_close or not request.caller.keeps_alive or is_old:
            raw = self._rewrite(request, raw, extra)
        elif extra:
            cut = raw.index(CRLF) + 2
            raw = raw[:cut] + extra + raw[cut:]
        request.caller.write(raw)
        return True

    def _remember(self, request: Request, raw: bytes) -> None:
        """Recognise answers with this head from now on; only an id of our own making can stand for no other bytes."""
        if request.head.request_id or self._status in (204, 304) or request.endpoint.core.draining:
            return
        shapes = self.replica.shapes
        if len(shapes) >= _SHAPES:
            shapes.clear()
        key = raw[: raw.index(END) + 4].replace(request.request_id, _NOT_IN_HEADS, 1)
        shapes[key] = (self._status, self._length)

    def _begin_tunnel(self, request: Request, raw: bytes) -> bool:
        if not request.head.websocket:
            self._break("the worker switched protocols unasked")
            return False
        self._done = False
        request.head_sent, request.status = True, 101
        request.endpoint.core.active.pop(request, None)  # no deadline holds any more
        request.caller.write(raw)
        request.caller.tunnel(request)
        return True

    def _finish(self, request: Request) -> None:
        self.request = request.upstream = None
        now_s = monotonic()
        reusable = self._keeps and request.complete and not self._excess and not self._until_close
        if reusable and self.transport.is_reading():
            self.replica.park(self)
        else:
            self.transport.close()
        request.endpoint.settle(request, now_s)
        close = self._until_close or not request.complete or request.head.websocket
        request.caller.finished(request, now_s, close=close)

    def _break(self, reason: str) -> None:
        request = self.request
        assert request is not None
        self.request = request.upstream = None
        self.transport.abort()
        request.endpoint.lost(request, reason, again=False)

    # --- ends

    def eof_received(self) -> None:
        self.replica.forget(self)
        self._unsent = self.transport.get_write_buffer_size() > 0

    def connection_lost(self, exc: Exception | None) -> None:
        self.replica.forget(self)
        request, self.request = self.request, None
        if request is None:
            return
        request.upstream = None
        if self._until_close and request.head_sent and exc is None:
            now_s = monotonic()
            request.endpoint.settle(request, now_s)
            request.caller.finished(request, now_s, close=True)
            return
        silent = not request.head_sent and not self._raw
        # A Unix socket is reset, not ended, when its peer goes with bytes unread: then no handler saw the request.
        unread = self._unsent or isinstance(exc, ConnectionResetError | BrokenPipeError)
        repeatable = request.head.method in IDEMPOTENT and request.attempts < 2
        again = silent and request.replayable and (unread or repeatable)
        request.endpoint.lost(request, "the worker ended before it answered", again=again)
