"""Requests to the Docker Engine on this machine, over its Unix socket, with the standard library alone.

Each replica has a small process beside its container, so what that process imports is paid for every replica: the
docker package would add 300 ms of CPU and 20 MB each. API reference: Docker Engine API v1.41.
"""

from __future__ import annotations

import json
import os
import socket
import urllib.parse
from collections.abc import Mapping
from typing import Any

from mlfuncs.errors import Conflict, MlfuncsError, NotFound, Unavailable

API = "/v1.41"  # Docker 20.10, the oldest that is tested
DEFAULT_SOCKET = "/var/run/docker.sock"
_START = "start it ('scripts/docker-engine' installs one), or set DOCKER_HOST"


class DockerEngine:
    """One engine; a connection a request. Raises Unavailable when it does not answer."""

    def __init__(self, path: str = "", timeout_s: float = 60.0) -> None:
        self._path = path or socket_path(os.environ)
        self._timeout_s = timeout_s

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded JSON answer, None for an empty one. Raises NotFound, Conflict or Unavailable."""
        connection = self.open(method, path, body)
        with connection:
            return read_answer(connection, path)

    def open(self, method: str, path: str, body: Any = None, upgrade: bool = False) -> socket.socket:
        """A connection on which the request was sent; its answer is still to be read."""
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {API}{path} HTTP/1.1", "Host: docker", f"Content-Length: {len(content)}"]
        head += ["Connection: Upgrade", "Upgrade: tcp"] if upgrade else ["Connection: close"]
        head += ["Content-Type: application/json"] if content else []
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(self._timeout_s)
            connection.connect(self._path)
            connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + content)
        except OSError as exc:
            connection.close()
            raise Unavailable(f"no Docker Engine answers at {self._path} ({exc.strerror or exc}): {_START}") from exc
        return connection

    def attach(self, container: str) -> socket.socket:
        """The standard streams of a container that is about to start: write its input, read frames of its output."""
        path = f"/containers/{container}/attach?stream=1&stdin=1&stdout=1&stderr=1"
        connection = self.open("POST", path, upgrade=True)
        status, _headers, rest = _read_head(connection)
        if status not in (101, 200) or rest:
            connection.close()
            raise Unavailable(f"the Docker Engine did not attach to {container[:12]} (status {status})")
        connection.settimeout(None)
        return connection

    def containers(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """Every container with these labels, running or not."""
        filters = json.dumps({"label": [f"{key}={value}" for key, value in labels.items()]})
        found: list[dict[str, Any]] = self.call("GET", f"/containers/json?all=1&filters={urllib.parse.quote(filters)}")
        return found

    def remove(self, container: str) -> None:
        """Kill and remove a container; one that is gone, or going, is fine."""
        try:
            self.call("DELETE", f"/containers/{container}?force=1&v=1")
        except (NotFound, Conflict):
            return


def socket_path(environ: Mapping[str, str]) -> str:
    """The engine's socket. Raises Unavailable for an engine on another machine: workers share sockets with its host."""
    host = environ.get("DOCKER_HOST") or f"unix://{DEFAULT_SOCKET}"
    if not host.startswith("unix://"):
        raise Unavailable(
            f"target 'docker' needs the engine of this machine, and DOCKER_HOST is {host!r}: unset it, or use the "
            "target 'kubernetes' for other machines"
        )
    return host.removeprefix("unix://")


def read_answer(connection: socket.socket, what: str) -> Any:
    """The JSON answer on a connection. Raises NotFound, Conflict or Unavailable with the engine's own words."""
    try:
        status, headers, rest = _read_head(connection)
        content = _read_body(connection, headers, rest)
    except (OSError, ValueError) as exc:
        raise Unavailable(f"the Docker Engine did not finish its answer to {what.partition('?')[0]}: {exc}") from exc
    values = json.loads(content) if content.strip() else None
    if status < 400:
        return values
    raise _error(status, str((values or {}).get("message") or status))


def _error(status: int, message: str) -> MlfuncsError:
    if status == 404:
        return NotFound("object of the Docker Engine", message)
    if status == 409:
        return Conflict(f"Docker: {message}")
    if "could not select device driver" in message:
        return Unavailable(f"the Docker Engine has no GPU to give ({message}): install NVIDIA's container toolkit")
    return Unavailable(f"the Docker Engine refuses (status {status}): {message}")


def _read_head(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(4096)
        if not part:
            raise OSError("the connection was closed")
        data += part
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split(" ", 2)[1]), headers, rest


def _read_body(connection: socket.socket, headers: Mapping[str, str], rest: bytes) -> bytes:
    if "content-length" in headers:
        length = int(headers["content-length"])
        while len(rest) < length and (part := connection.recv(65536)):
            rest += part
        return rest
    while part := connection.recv(65536):
        rest += part
    return _unchunked(rest) if headers.get("transfer-encoding") == "chunked" else rest


def _unchunked(data: bytes) -> bytes:
    """The content of a chunked body, RFC 9112 section 7.1.

    >>> _unchunked(b"3\\r\\nabc\\r\\n0\\r\\n\\r\\n")
    b'abc'
    """
    content = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if length == 0:
            break
        content, data = content + data[:length], data[length + 2 :]
    return content
