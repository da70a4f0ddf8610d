"""What an endpoint in a container needs to read online features: definitions, their code, and a way to Redis.

Owns: Lent, found as "features:lend". The container has a registry of its own, which starts with the definitions as
they are when it starts.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from mlfuncs.errors import SpecError
from mlfuncs.registry import open_registry
from mlfuncs.settings import Settings
from mlfuncs_featurestore.catalog import _KINDS
from mlfuncs_featurestore.redis_client import _address

_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Lent:
    """`documents` are (kind, name, body), oldest versions first; `connect`, when there is one, opens Redis here."""

    documents: list[tuple[str, str, Any]]
    bundles: list[str]
    redis_url: str
    connect: Callable[[], socket.socket] | None


def lend(settings: Settings, socket_inside: str) -> Lent:
    """What to lend; `socket_inside` is where `connect` will be offered in the container.

    Raises SpecError for a Redis that only this machine reaches and that cannot be passed on.
    """
    documents = _documents(settings)
    named = [body.get(key) for _, _, body in documents if body for key in ("transform_bundle", "function_bundle")]
    url, connect = _way_to_redis(settings, socket_inside)
    return Lent(documents, sorted({digest for digest in named if digest}), url, connect)


def _documents(settings: Settings) -> list[tuple[str, str, Any]]:
    stored = open_registry(settings).definitions
    versions = [one for kind in _KINDS for row in stored.list(kind) for one in stored.versions(kind, row.name)]
    return [(one.kind, one.name, one.body) for one in sorted(versions, key=lambda one: (one.kind, one.version))]


def _way_to_redis(settings: Settings, inside: str) -> tuple[str, Callable[[], socket.socket] | None]:
    url = settings.redis_url
    if not url:
        from mlfuncs_featurestore.redis_embedded import ensure_embedded

        return f"unix://{inside}", lambda: _connect_unix(ensure_embedded(settings))
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "unix":
        return f"unix://{inside}?{parts.query}", lambda: _connect_unix(parts.path)
    if parts.hostname not in _LOCAL:
        return url, None
    if parts.scheme != "redis":
        raise SpecError(
            f"features are read from Redis at {_address(url)}, which is this machine's own and no container reaches: "
            "set MLFUNCS_REDIS_URL to an address that other machines reach"
        )
    query |= {"db": parts.path.strip("/") or "0"}
    query |= {"username": parts.username} if parts.username else {}
    query |= {"password": parts.password} if parts.password else {}
    host, port = parts.hostname, parts.port or 6379
    return f"unix://{inside}?{urlencode(query, quote_via=quote)}", lambda: _connect_tcp(host, port)


def _connect_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def _connect_tcp(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=5.0)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
