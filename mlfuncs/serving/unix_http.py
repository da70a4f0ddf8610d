"""HTTP over Unix sockets for urllib3: "http+unix://<percent-encoded path>/<rest>", as containers call their router."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import quote, unquote

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.poolmanager import key_fn_by_scheme, pool_classes_by_scheme

SCHEME = "http+unix"


def unix_url(path: str) -> str:
    """The base URL of what listens on the socket at `path`.

    >>> unix_url("/run/router.sock")
    'http+unix://%2Frun%2Frouter.sock'
    """
    return f"{SCHEME}://{quote(path, safe='')}"


class UnixConnection(HTTPConnection):
    """A connection to a socket whose path is given as the host."""

    def __init__(self, host: str, **options: Any) -> None:
        super().__init__("localhost", **options)
        self._path = unquote(host)

    def _new_conn(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(self.timeout)
            connection.connect(self._path)
        except OSError as exc:
            connection.close()
            raise urllib3.exceptions.NewConnectionError(self, f"{self._path}: {exc.strerror or exc}") from exc
        return connection


class UnixPool(urllib3.HTTPConnectionPool):
    """Connections to one socket."""

    ConnectionCls = UnixConnection


def pool_manager(**options: Any) -> urllib3.PoolManager:
    """A pool manager that knows Unix sockets besides TCP."""
    manager = urllib3.PoolManager(**options)
    manager.pool_classes_by_scheme = {**pool_classes_by_scheme, SCHEME: UnixPool}
    manager.key_fn_by_scheme = {**key_fn_by_scheme, SCHEME: key_fn_by_scheme["http"]}
    return manager
