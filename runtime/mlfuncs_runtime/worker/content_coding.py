"""Bodies that come compressed: Content-Encoding gzip and deflate, within the endpoint's bound on a body."""

from __future__ import annotations

import zlib

from mlfuncs.errors import InvalidInput, TooLarge
from mlfuncs_runtime.worker.exchange import Exchange

_CODINGS = (b"gzip", b"x-gzip", b"deflate")
_NONE = (b"", b"identity")


async def read_body(exchange: Exchange, limit: int) -> bytes | None:
    """The whole body, decompressed, of at most `limit` bytes before and after; None: refused with a 415.

    Raises InvalidInput when the body is not what its Content-Encoding says, and TooLarge past the bound.
    """
    coding = exchange.headers.get(b"content-encoding", b"").strip().lower()
    if coding in _NONE:
        return await exchange.body(limit)
    if coding not in _CODINGS:
        exchange.close = True  # the body is not read
        detail = f"content encoding {coding.decode('latin-1')!r} is not understood here; use gzip, deflate or none"
        await exchange.refuse(415, "UnsupportedMediaType", detail, [(b"accept-encoding", b"gzip, deflate")])
        return None
    return _inflate(await exchange.body(limit), coding.decode(), limit)


def _inflate(body: bytes, coding: str, limit: int) -> bytes:
    inflater = zlib.decompressobj(wbits=47)  # either format, by its own header
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as exc:
        raise InvalidInput(f"the body is not {coding}, as its Content-Encoding says: {exc}") from exc
    if len(plain) > limit:
        raise TooLarge(f"the decompressed body is over the bound of {limit} bytes; send less at once")
    if not inflater.eof or inflater.unused_data:
        raise InvalidInput(f"the body is not one whole {coding} stream, as its Content-Encoding says")
    return plain
