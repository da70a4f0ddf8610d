"""Who may call, how often, and from which web page: tokens, a token bucket, and CORS."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from mlfuncs_runtime.routes import Access

_PREFLIGHT_MAX_AGE_S = 600
_ROUNDING_S = 1e-9  # a request is not refused for less: the clock itself is rounded to that after some months


def is_token_valid(authorization: bytes, digests: Iterable[str]) -> bool:
    """Whether an `Authorization: Bearer` value carries a token with one of these SHA-256 digests (hex).

    Every digest is compared in constant time, so the time taken says nothing of how near a guess is.

    >>> is_token_valid(b"Bearer a", [hashlib.sha256(b"a").hexdigest()])
    True
    """
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        return False
    given, valid = hashlib.sha256(token.strip()).hexdigest(), False
    for digest in digests:
        valid |= hmac.compare_digest(given, digest)
    return valid


class TokenBucket:
    """At most `rate_per_s` requests a second in the long run and `burst` at once; the clock is an argument.

    Instead of its level it keeps when it will be full again, which each request puts off by 1 / rate: the generic cell
    rate algorithm (ITU-T I.371), which lets the same requests pass as a bucket that is refilled.

    >>> bucket = TokenBucket(2.0, 1, 0.0)
    >>> bucket.take(0.0), bucket.take(0.0), bucket.take(0.5)
    (0.0, 0.5, 0.0)
    """

    __slots__ = ("_full_s", "_interval_s", "_refill_s")

    def __init__(self, rate_per_s: float, burst: int, now_s: float) -> None:
        self._interval_s = 1.0 / rate_per_s
        self._refill_s = max(burst, 1) * self._interval_s  # how long an empty bucket takes to be full
        self._full_s = now_s

    def take(self, now_s: float) -> float:
        """0.0 when the request may pass, else the seconds until one may."""
        full_s = (self._full_s if self._full_s > now_s else now_s) + self._interval_s
        wait_s = full_s - now_s - self._refill_s
        if wait_s > _ROUNDING_S:
            return wait_s
        self._full_s = full_s
        return 0.0


def cors_headers(access: Access, origin: bytes) -> bytes:
    """Header lines that let a page of `origin` read the answer; empty when it may not."""
    allowed = origin.decode("latin-1")
    if allowed not in access.cors_origins and "*" not in access.cors_origins:
        return b""
    return (
        b"Access-Control-Allow-Origin: %s\r\nVary: Origin\r\nAccess-Control-Expose-Headers: X-Request-Id\r\n" % origin
    )


def preflight_headers(access: Access, origin: bytes, method: bytes, headers: bytes) -> bytes:
    """Header lines that answer a CORS preflight for a request with `method` and `headers`; empty when refused."""
    granted = cors_headers(access, origin)
    if not granted:
        return b""
    asked = b"Access-Control-Allow-Headers: %s\r\n" % headers if headers else b""
    methods = b"Access-Control-Allow-Methods: %s\r\n" % method
    return granted + methods + asked + b"Access-Control-Max-Age: %d\r\n" % _PREFLIGHT_MAX_AGE_S
