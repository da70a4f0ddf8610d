"""Short questions to a worker's Unix socket: is it ready, is it alive, which process listens there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass

READY_PATH = "/-/ready"
LIVE_PATH = "/-/live"
_REQUEST = "GET {} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """The status of one probe, 0 when nothing answered, and the process that listens on the socket."""

    status: int
    pid: int | None = None


async def probe(path: str, target: str, timeout_s: float) -> Answer:
    """The answer to `GET target` on the Unix socket at `path` within `timeout_s`; status 0 for none."""
    pid, writer = None, None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path)
            pid = _peer(writer.get_extra_info("socket"))
            writer.write(_REQUEST.format(target).encode())
            line = await reader.readline()
        return Answer(int(line.split(b" ", 2)[1]), pid)
    except (OSError, TimeoutError, ValueError, IndexError, asyncio.IncompleteReadError):
        return Answer(0, pid)
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


def _peer(connection: socket.socket) -> int | None:
    """The id of the process that called listen(), by SO_PEERCRED of unix(7)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", raw)[0]
    return pid or None
