"""HTTP/1.1 as the router reads it: a request's head, checked beyond what the parser checks.

llhttp (in httptools) refuses bare CR or LF, obs-fold, a space before the colon, conflicting or repeated lengths, a
length beside a transfer coding, and bad chunking. What it lets through and haproxy does not is refused here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

from mlfuncs.errors import MlfuncsError, Overloaded, Unauthorized, Unavailable

CRLF = b"\r\n"
HEAD_BYTES = 16_384  # of a request's line and headers: haproxy's tune.bufsize
HEADER_COUNT = 101  # haproxy's tune.http.maxhdr
_ID = re.compile(rb"[!-~]{1,128}")
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?@]+)(/.*|\?.*)?")
_PREFIX = re.compile(rb"(/[A-Za-z0-9._~-]+)+/?")  # no "//", which would name another host
_TIMEOUT = re.compile(rb"\d{1,9}(\.\d{1,6})?")

# Headers that mean something to this hop; all others pass as they came.
_SPECIAL = frozenset(
    b"host content-length transfer-encoding connection keep-alive proxy-connection te trailer upgrade expect "
    b"authorization proxy-authorization cookie origin x-request-id traceparent x-mlfuncs-timeout-ms "
    b"x-forwarded-prefix".split()
)


class BadRequest(Exception):
    """A request that is not forwarded: its status, and a line for the caller."""

    def __init__(self, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class RequestHead:
    """What one request's head says, with the header lines that are sent on in `lines`. Never changed once made."""

    __slots__ = (
        "authorization",
        "chunked",
        "cookie",
        "expects",
        "headers",
        "keep_alive",
        "length",
        "lines",
        "method",
        "minor",
        "origin",
        "prefix",
        "request_id",
        "target",
        "timeout_s",
        "traceparent",
        "websocket",
    )

    def __init__(
        self, method: bytes, target: bytes, version: str, headers: Sequence[tuple[bytes, bytes]], keep_alive: bool
    ) -> None:
        if version == "1.1":
            self.minor = 1
        elif version == "1.0":
            self.minor = 0
        else:
            raise BadRequest(f"HTTP version {version!r} is not spoken here; use HTTP/1.1", 505)
        if method == b"CONNECT":
            raise BadRequest("CONNECT asks for a tunnel to elsewhere, and there is none here")
        self.method, self.target, self.headers, self.keep_alive = method, target, headers, keep_alive
        self.length = 0
        self.chunked = self.expects = self.websocket = False
        self.request_id = self.traceparent = self.authorization = self.cookie = self.origin = self.prefix = b""
        self.timeout_s = math.inf
        self.lines: list[bytes] = []
        self._read(headers)

    def _read(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        lines, special = self.lines, []
        for name, value in headers:
            key = name.lower()
            if key in _SPECIAL:
                special.append((key, value.strip()))
            else:
                lines += (name, b": ", value, CRLF)
        hosts, host, options, upgrade = 0, b"", b"", b""
        for key, value in special:
            if key == b"host":
                hosts, host = hosts + 1, value
                lines += (b"Host: ", value, CRLF)
            elif key == b"content-length":
                self.length = int(value)
            elif key == b"connection":
                options += b"," + value.lower()
            elif key == b"upgrade":
                upgrade += value.lower()
            else:
                self._read_rare(key, value)
        if hosts != 1 and (self.minor or hosts):
            raise BadRequest(f"a request names one Host; this one names {hosts}")
        if not self.target.startswith(b"/") or b"#" in self.target:
            self.target = _origin_form(self.target, host)
        if upgrade or len(options) > 11:  # more than ",keep-alive"
            self._read_options(options, upgrade)

    def _read_rare(self, key: bytes, value: bytes) -> None:
        if key == b"authorization":
            self._once(key, self.authorization)
            self.authorization = value
        elif key == b"cookie":
            self.cookie = self.cookie + b"; " + value if self.cookie else value
        elif key == b"origin":
            self.origin = value
        elif key == b"x-request-id":
            self.request_id = value if _ID.fullmatch(value) else b""
        elif key == b"traceparent":
            self.traceparent = value if _TRACEPARENT.fullmatch(value) else b""
        elif key == b"x-forwarded-prefix":  # what a proxy before us took off the path
            self.prefix = value.rstrip(b"/") if _PREFIX.fullmatch(value) else b""
        elif key == b"x-mlfuncs-timeout-ms":
            if not _TIMEOUT.fullmatch(value):
                raise BadRequest(f"X-Mlfuncs-Timeout-Ms must be milliseconds, not {value[:40].decode('latin-1')!r}")
            self.timeout_s = float(value) / 1000
        elif key == b"transfer-encoding":
            if not self.minor:
                raise BadRequest("HTTP/1.0 has no transfer codings; send a Content-Length")
            if value.lower() != b"chunked" or self.chunked:
                raise BadRequest(f"transfer coding {value[:40].decode('latin-1')!r} is not understood; use 'chunked'")
            self.chunked = True
        elif key == b"expect":
            if value.lower() != b"100-continue":
                raise BadRequest(f"expectation {value[:40].decode('latin-1')!r} cannot be met", 417)
            self.expects = self.minor == 1

    def _once(self, key: bytes, before: bytes) -> None:
        if before:
            raise BadRequest(f"the header {key.decode()} came twice")

    def _read_options(self, options: bytes, upgrade: bytes) -> None:
        named = {option.strip() for option in options.split(b",")}
        if upgrade and b"upgrade" in named:
            if self.length or self.chunked:
                raise BadRequest("a request that asks for an upgrade cannot have a body")
            self.websocket = upgrade == b"websocket" and self.method == b"GET" and self.minor == 1
        dropped = named - _SPECIAL - {b"", b"close"}
        if dropped:
            self.lines = [
                piece
                for at in range(0, len(self.lines), 4)
                if self.lines[at].lower() not in dropped
                for piece in self.lines[at : at + 4]
            ]


def _origin_form(target: bytes, host: bytes) -> bytes:
    """The path of an absolute target that names the request's own host: RFC 9112, 3.2.2. Raises BadRequest."""
    match = _ABSOLUTE.fullmatch(target)
    if match is None or match[1].lower() != host.lower() or b"#" in target:
        shown = target[:80].decode("latin-1")
        raise BadRequest(f"the request target {shown!r} must be a path that starts with '/', or a URL of the Host")
    path = match[2] or b""
    return path if path.startswith(b"/") else b"/" + path


def given_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The request id that a caller gave among these headers; empty when there is none that can be kept."""
    values = [value.strip() for name, value in headers if name.lower() == b"x-request-id"]
    return values[-1] if values and _ID.fullmatch(values[-1]) else b""


def decode_unreserved(segment: bytes) -> bytes:
    """A segment of a path with letters, digits and "-._~" out of their escapes: RFC 3986, 6.2.2.2.

    >>> decode_unreserved(b"%61dd%2Fone")
    b'add%2Fone'
    """

    def decode(match: re.Match[bytes]) -> bytes:
        value = int(match[1], 16)
        return bytes([value]) if value in _UNRESERVED else match[0]

    return _ESCAPE.sub(decode, segment) if b"%" in segment else segment


def answer(
    status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b"", *, close: bool = False
) -> bytes:
    """A whole response. `extra` is header lines with their CRLF; a HEAD's answer is cut by its sender."""
    phrase = HTTPStatus(status).phrase.encode()
    length = b"" if status in (204, 304) else b"Content-Length: %d\r\n" % len(body)
    end = b"Connection: close\r\n\r\n" if close else CRLF
    return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n%s%s%s%s" % (status, phrase, content_type, length, extra, end, body)


def problem(
    status: int, title: str, detail: str, request_id: bytes, more: Iterable[tuple[str, Any]] = ()
) -> tuple[int, bytes]:
    """(status, body) of an RFC 9457 problem document."""
    document = {"type": "about:blank", "title": title, "status": status, "detail": detail, **dict(more)}
    if request_id:
        document["request_id"] = request_id.decode("latin-1")
    return status, json.dumps(document).encode()


def problem_of(error: MlfuncsError, request_id: bytes) -> tuple[int, bytes, bytes]:
    """(status, body, header lines) for an error of ours; 429 and 503 carry Retry-After in whole seconds."""
    body = json.dumps(error.to_problem(request_id.decode("latin-1")), default=str).encode()
    if isinstance(error, Overloaded | Unavailable):
        return error.status, body, b"Retry-After: %d\r\n" % max(1, math.ceil(error.retry_after_s))
    if isinstance(error, Unauthorized):
        return error.status, body, b'WWW-Authenticate: Bearer realm="mlfuncs"\r\n'
    return error.status, body, b""
