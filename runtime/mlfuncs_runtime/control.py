"""Orders between our processes: JSON lines over a Unix socket, one answer per request, in order.

An answer {"error": title, "message": ...} becomes the MlfuncsError of that name on the asking side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from mlfuncs.errors import InvalidInput, MlfuncsError, Unavailable
from mlfuncs.serving.client import error_of

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

_LINE_LIMIT = 64 * 2**20  # a whole route table fits; guess
_log = logging.getLogger("mlfuncs.control")


def call(path: Path, message: Mapping[str, Any], timeout_s: float = 10.0) -> dict[str, Any]:
    """The answer to one order. Raises Unavailable when nobody answers within `timeout_s`, or the error that came."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(_encode(message))
            with connection.makefile("rb") as file:
                line = file.readline()
    except OSError as exc:
        raise Unavailable(f"nothing answers on {str(path)!r} ({exc.strerror or exc})") from exc
    return _decode(line, path)


class ControlClient:
    """A connection that is kept between orders and opened again when it broke; orders wait for each other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, message: Mapping[str, Any], timeout_s: float = 5.0) -> dict[str, Any]:
        """The answer to one order. Raises Unavailable when none comes within `timeout_s`, or the error that came."""
        async with self._turn:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._exchange(message)
            except (OSError, TimeoutError, ValueError) as exc:
                self.close()
                raise Unavailable(f"nothing answers on {str(self._path)!r} ({exc})") from exc
            except asyncio.CancelledError:
                self.close()  # an answer may still come, and would be taken for that of the next order
                raise

    async def _exchange(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self._streams is None or self._streams[0].at_eof():
            self.close()
            self._streams = await asyncio.open_unix_connection(str(self._path), limit=_LINE_LIMIT)
        reader, writer = self._streams
        writer.write(_encode(message))
        await writer.drain()
        line = await reader.readline()
        if not line:
            self.close()
        return _decode(line, self._path)

    def close(self) -> None:
        """End the connection; the next order opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def serve(path: Path, handle: Handler) -> asyncio.Server:
    """A server on `path` (replacing a dead socket there) that answers each line with what `handle` returns."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, asyncio.CancelledError):  # cancelled: the server ends
            while line := await reader.readline():
                writer.write(_encode(await _answer(handle, line)))
                await writer.drain()
        writer.close()

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(talk, str(path), limit=_LINE_LIMIT)
    path.chmod(0o600)
    return server


async def _answer(handle: Handler, line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
        if not isinstance(message, dict):
            raise InvalidInput(f"an order is a JSON object, not {type(message).__name__}")
        return await handle(message)
    except MlfuncsError as exc:
        return {"error": exc.title, "message": str(exc)}
    except ValueError as exc:
        return {"error": "InvalidInput", "message": f"the order is not JSON: {exc}"}
    except Exception as exc:  # noqa: BLE001  a server loop: one bad order must not end it
        _log.exception("order failed: %r", line[:200])
        return {"error": "MlfuncsError", "message": f"the order failed: {type(exc).__name__}: {exc}"}


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _decode(line: bytes, path: Path) -> dict[str, Any]:
    if not line:
        raise Unavailable(f"the connection to {str(path)!r} was closed before an answer came")
    answer = json.loads(line)
    if "error" in answer:
        raise error_of(str(answer["error"]), str(answer.get("message", answer["error"])))
    return dict(answer)
