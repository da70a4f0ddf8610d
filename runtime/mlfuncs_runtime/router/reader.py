"""Requests read from a client's bytes, in order, with the refusals that end a connection."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

from mlfuncs_runtime.router.core import Core
from mlfuncs_runtime.router.http import HEAD_BYTES, HEADER_COUNT, BadRequest, RequestHead, given_id
from mlfuncs_runtime.router.refusals import too_large
from mlfuncs_runtime.router.request import Request

_PIPELINED = 16  # requests read ahead on one connection; a guess


class RequestReader(asyncio.Protocol, ABC):
    """The reading half of a client's connection. `due_s` is when it is closed unless something happens before."""

    __slots__ = (
        "_blocked",
        "_fed",
        "_headers",
        "_idle",
        "_in_head",
        "_key",
        "_parser",
        "_paused",
        "_receiving",
        "_unread",
        "_url",
        "_waiting",
        "closing",
        "core",
        "due_s",
        "request",
        "transport",
    )

    def __init__(self, core: Core) -> None:
        self.core = core
        self.request: Request | None = None  # being answered
        self.due_s = time.monotonic() + core.options.head_timeout_s
        self.closing = self._paused = self._blocked = self._in_head = False
        self._idle = True  # between two requests, with nothing to answer
        self._key = b""  # the head that the bytes at hand begin with, when it is whole
        self._receiving: Request | None = None  # whose body is arriving
        self._waiting: deque[Request | tuple[int, str, bytes]] = deque()  # requests, and at the end a refusal
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._fed = 0  # bytes since the message began
        self._unread = 0  # bytes since the head or the last byte of the body: chunk extensions and trailers
        self._parser = HttpRequestParser(self)
        self.transport: asyncio.Transport

    # --- what the writing half does

    @abstractmethod
    def _make_request(self, head: RequestHead) -> Request:
        """A request of this connection, its body to come."""

    @abstractmethod
    def _pump(self, key: bytes = b"") -> None:
        """Take up the requests that wait, one after another; `key` is the whole head of the only one."""

    @abstractmethod
    def _refuse_current(self, request: Request, status: int, detail: str) -> None:
        """The body of the request being answered went wrong."""

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        self._in_head = True
        self._url = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self._headers.append((name, value))
            return
        self._unread += len(name) + len(value) + 4  # a trailer, which is dropped
        if self._unread > HEAD_BYTES and not self.closing:
            self._refuse(431, f"the request's trailers are over the bound of {HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._in_head = False
        headers, self._headers, self._unread = self._headers, [], 0
        if self.closing:
            return
        if self._fed > HEAD_BYTES:
            size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in headers)
            if size > HEAD_BYTES:
                self._refuse(431, f"the request's head is over the bound of {HEAD_BYTES} bytes", headers)
                return
        if len(headers) > HEADER_COUNT:
            self._refuse(431, f"the request has {len(headers)} headers; the bound is {HEADER_COUNT}", headers)
            return
        parser = self._parser
        version, keep_alive = parser.get_http_version(), parser.should_keep_alive()
        try:
            head = RequestHead(parser.get_method(), self._url, version, headers, keep_alive)
        except BadRequest as exc:
            self._refuse(exc.status, exc.detail, headers)
            return
        self._receiving = self._make_request(head)
        self._waiting.append(self._receiving)

    def on_body(self, data: bytes) -> None:
        self._unread = 0
        request = self._receiving
        if request is None or request.done:
            return
        request.size += len(data)
        if request.upstream is not None:
            request.upstream.send_body(request, data)
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
            request.endpoint.submit(request, time.monotonic())

    # --- bytes in

    def _parse(self, data: bytes) -> None:
        in_head = self._in_head
        self._idle = False
        self._fed += len(data)
        self._unread += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as exc:
            self._after_upgrade(data[exc.args[0] :])
        except HttpParserCallbackError:
            raise  # a fault of ours
        except HttpParserError as exc:
            self._refuse_bytes(exc)
        if self._receiving is not None:
            self._check_body(self._receiving)
        elif self._in_head and self._fed > HEAD_BYTES and not self.closing:
            self._refuse(431, f"the request's head is over the bound of {HEAD_BYTES} bytes")
        if len(self._waiting) >= _PIPELINED:
            self.let_body_flow(False)
        if self.request is None:
            self._go_on(in_head)
        if self._receiving is not None and not self.closing:
            self.due_s = time.monotonic() + self.core.options.stall_timeout_s
        self._key = b""

    def _go_on(self, was_in_head: bool) -> None:
        """Nothing is being answered: take up what was read, or wait for more."""
        if self._waiting:
            alone = len(self._waiting) == 1 and self._receiving is None and not self._in_head
            self._pump(self._key if alone else b"")
        elif not self.closing:
            if self._in_head and not was_in_head:
                self.due_s = time.monotonic() + self.core.options.head_timeout_s
            self._idle = not self._in_head and self._receiving is None

    def _after_upgrade(self, rest: bytes) -> None:
        """The parser stops after a request that asks for an upgrade; only a WebSocket's is taken up."""
        self._parser = HttpRequestParser(self)
        self._key = b""
        last = self._waiting[-1] if self._waiting else None
        if isinstance(last, Request) and last.head.websocket:
            if rest:  # a client must wait for the 101 before it speaks the new protocol
                self._waiting.pop()
                self._refuse(400, "bytes came after a WebSocket request, before its answer")
        elif rest:
            self._parse(rest)

    def _refuse_bytes(self, exc: HttpParserError) -> None:
        last = self._waiting[-1] if self._waiting else self.request
        if isinstance(last, Request) and not last.head.keep_alive and self._receiving is None:
            return  # bytes after the last request of a connection are nobody's
        self._refuse(400, f"the request is not HTTP/1.1 as it is written: {exc}")

    def _check_body(self, request: Request) -> None:
        if request.head.chunked and self._unread > HEAD_BYTES and not self.closing:
            self._refuse(431, f"over {HEAD_BYTES} bytes of chunk extensions or trailers came with the request")
        elif request.head.chunked and request.plan is not None and not request.done:
            limit = request.endpoint.route.limits.body_bytes
            if request.size > limit:
                request.endpoint.reject("body")
                self.core.fail(request, too_large(limit))

    def _refuse(self, status: int, detail: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer what came before, then refuse, then close; nothing that follows is read.

        `headers` are those of the refused request, when its head is whole.
        """
        self.closing = True
        receiving, self._receiving = self._receiving, None
        self.core.refused[status] = self.core.refused.get(status, 0) + 1
        if receiving is not None and receiving is self.request:
            self._refuse_current(receiving, status, detail)
            return
        if receiving is not None and self._waiting and self._waiting[-1] is receiving:
            self._waiting.pop()
            headers = receiving.head.headers
        elif self._in_head:
            headers = self._headers
        self._waiting.append((status, detail, given_id(headers) or self.core.ids.request_id()))

    def let_body_flow(self, flow: bool) -> None:
        """Read on, or stop reading, so that the sender is held by its own socket."""
        if flow == self._paused:
            self._paused = not flow
            if flow and self._receiving is not None and not self.closing:
                self.due_s = time.monotonic() + self.core.options.stall_timeout_s
            if not self.transport.is_closing():
                (self.transport.resume_reading if flow else self.transport.pause_reading)()
