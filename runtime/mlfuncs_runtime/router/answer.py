"""Answers read from a worker's bytes: what their heads say, and the heads as the client gets them."""

from __future__ import annotations

import asyncio

from httptools import HttpResponseParser

from mlfuncs_runtime.router.http import CRLF
from mlfuncs_runtime.router.request import Request

END = b"\r\n\r\n"  # of a head
LENGTH, CHUNKED, HOP, ID = 1, 2, 4, 8  # flags of headers that came
_FLAGS = {
    b"content-length": LENGTH,
    b"transfer-encoding": CHUNKED,
    b"x-request-id": ID,
    b"connection": HOP,
    b"keep-alive": HOP,
    b"proxy-connection": HOP,
    b"upgrade": HOP,
}
_HOP_NAMES = frozenset(name for name, flag in _FLAGS.items() if flag == HOP)


class AnswerReader(asyncio.Protocol):
    """The reading half of a connection to a worker: one answer at a time."""

    __slots__ = (
        "_dechunk",
        "_done",
        "_excess",
        "_flags",
        "_informational",
        "_is_fresh",
        "_keeps",
        "_length",
        "_parser",
        "_raw",
        "_status",
        "_unsent",
        "_until_close",
    )

    def __init__(self) -> None:
        self._parser = HttpResponseParser(self)
        self._reset()

    def _reset(self) -> None:
        """Forget the last answer; `_is_fresh` says that there is nothing to forget."""
        self._is_fresh = True
        self._raw = b""
        self._flags = self._status = self._informational = self._length = 0
        self._done = self._excess = self._keeps = self._until_close = self._unsent = False
        self._dechunk: _Dechunker | None = None

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        if self._done:
            self._excess = True
        self._flags = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        flag = _FLAGS.get(name.lower())
        if flag:
            self._flags |= flag
            if flag == LENGTH:
                self._length = int(value)

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._keeps = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200 and self._status != 101:
            self._informational += 1
            self._status = 0
        else:
            self._done = True

    # --- the head for the client

    def _rewrite(self, request: Request, raw: bytes, extra: bytes) -> bytes:
        end = raw.index(END)
        first, *lines = raw[:end].split(CRLF)
        dropped = _HOP_NAMES
        if not request.head.minor and self._flags & CHUNKED:
            dropped = _HOP_NAMES | {b"transfer-encoding"}
            self._dechunk = _Dechunker()
            self._until_close = True
        kept = [line for line in lines if line.partition(b":")[0].lower() not in dropped]
        if self._until_close or not request.caller.keeps_alive:
            kept.append(b"Connection: close")
        elif not request.head.minor:
            kept.append(b"Connection: keep-alive")
        body = self._dechunk.feed(raw) if self._dechunk is not None else raw[end + 4 :]
        return b"%s\r\n%s%s\r\n\r\n%s" % (b"HTTP/1.1" + first[8:], extra, CRLF.join(kept), body)


class _Dechunker:
    """The plain body of a chunked answer, for HTTP/1.0 clients."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._parser = HttpResponseParser(self)

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def feed(self, raw: bytes) -> bytes:
        """The body bytes in the next bytes of the answer, which begin with its head."""
        self._parser.feed_data(raw)
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
