"""TCP ports for servers of the tests that must be told one, because they cannot say which one they got."""

from __future__ import annotations

import random
import socket

BUS_OFFSET = 10_000  # a Redis Cluster node listens on its port and on this many above it

_chance = random.SystemRandom()  # no seed: two test processes at once draw different ports


def free_port() -> int:
    """A loopback port that is free now, and so is the one 10,000 above it.

    Both lie below the range that the kernel gives to connections and to listeners on port 0 (32,768 and up), so that
    nothing takes the port before the server that was told it does.
    """
    for _ in range(1000):
        port = _chance.randrange(12_000, 22_000)
        if _is_free(port) and _is_free(port + BUS_OFFSET):
            return port
    raise OSError("no free pair of ports was found on 127.0.0.1 in 1,000 tries")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
