"""Connections to Redis: by URL, to a cluster, or to the embedded server; their time-outs, retries and errors.

Owns: everything that touches redis-py. A fault of Redis leaves here as Unavailable, naming the address and never the
password. URLs: redis://, rediss:// (TLS), unix://, redis+cluster:// and rediss+cluster://, with redis-py's query
options, e.g. rediss://user:secret@host:6380/0?ssl_ca_certs=/etc/ca.pem&socket_timeout=0.5
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit, urlunsplit

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthorizationError
from redis.retry import Retry

from mlfuncs.errors import SpecError, Unavailable
from mlfuncs.settings import Settings

T = TypeVar("T")
CONNECT_S = 2.0
ANSWER_S = 2.0
RETRIES = 2  # after the first attempt, with jitter; every command that is retried here may run twice
PAUSE_S = 0.05
SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")


class _Replica(redis.ConnectionError):
    """A write met a replica: a fail-over made another server the primary, to which a new connection may lead."""


@dataclass(frozen=True)
class Sent:
    """Commands under way: as they were packed, and the connection they went by (None: it failed)."""

    packed: list[bytes]
    connection: Any


class RedisLink:
    """One Redis, standalone or cluster. `client` is the redis-py client; `address` is safe to show.

    Besides the client it keeps idle connections of its own for the commands that `call` packs: redis-py's client
    spends more time on one MGET than Redis does.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url = settings.redis_url
        self.is_embedded = not url
        self.is_cluster = "+cluster" in url.partition("://")[0]
        self.address = _address(url) if url else f"embedded server of {settings.home}"
        self._url = url
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._idle: list[Any] = []
        self.client: Any = self.run(self._connect)

    def _connect(self) -> Any:
        options: dict[str, Any] = {"socket_connect_timeout": CONNECT_S, "socket_timeout": ANSWER_S}
        if self.is_embedded:
            from mlfuncs_featurestore.redis_embedded import ensure_embedded

            return redis.Redis(unix_socket_path=ensure_embedded(self.settings), retry=_no_retry(), **options)
        scheme = self._url.partition("://")[0]
        if scheme not in SCHEMES:
            raise SpecError(f"redis_url {self.address!r} must start with one of {', '.join(SCHEMES)}")
        query = parse_qs(urlsplit(self._url).query)
        options = {name: value for name, value in options.items() if name not in query}
        plain = self._url.replace("+cluster", "", 1)
        try:
            if self.is_cluster:
                return redis.RedisCluster.from_url(plain, **options)
            return redis.Redis.from_url(plain, retry=_no_retry(), **options)
        except ValueError as exc:
            raise SpecError(f"redis_url {self.address!r} cannot be used: {exc}") from exc

    def call(self, *arguments: Any) -> Any:
        """The raw answer to one command on a standalone server; retried, so it must bear running twice."""
        answer = self.pipeline([arguments])[0]
        if isinstance(answer, redis.RedisError):
            raise self.fault(answer) from answer
        return answer

    def pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The raw answers to commands sent together on a standalone server; retried as a whole.

        What Redis refuses comes back as an exception in its place.
        """
        return self.receive(self.send(commands))

    def send(self, commands: Sequence[tuple[Any, ...]]) -> Sent:
        """Send commands to a standalone server without waiting for it; `receive` gives the answers."""
        packed = [hiredis.pack_command(command) for command in commands]
        if self._pid != os.getpid():  # a fork must not share its parent's sockets
            self._open()
        try:
            return Sent(packed, self._start(packed))
        except redis.RedisError:
            return Sent(packed, None)

    def receive(self, sent: Sent) -> list[Any]:
        """The answers to what was sent; sent again as a whole when the connection failed."""
        try:
            if sent.connection is not None:
                return self._finish(sent.connection, sent.packed)
        except redis.RedisError:
            pass
        self._idle.clear()  # idle connections are as old as the one that failed
        return self.run(lambda: self._finish(self._start(sent.packed), sent.packed), attempts=RETRIES)

    def _start(self, packed: list[bytes]) -> Any:
        """Send on an idle connection or a new one, which is returned."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self.client.connection_pool.make_connection()
        try:
            connection.send_packed_command(packed)
        except BaseException:
            connection.disconnect()
            raise
        return connection

    def _finish(self, connection: Any, packed: list[bytes]) -> list[Any]:
        """Read the answers; the connection is idle then."""
        try:
            answers = [_answer(connection) for _ in packed]
            for answer in answers:
                if isinstance(answer, redis.exceptions.ReadOnlyError):
                    raise _Replica(str(answer))
        except BaseException as exc:
            connection.disconnect()
            if isinstance(exc, _Replica):
                self._disconnect()
            raise
        self._idle.append(connection)
        return answers

    def run(self, action: Callable[[], T], attempts: int = RETRIES + 1) -> T:
        """What `action` returns; tried again when the connection fails. Raises Unavailable."""
        for attempt in range(attempts):
            try:
                return action()
            except (redis.AuthenticationError, AuthorizationError) as exc:
                raise self.fault(exc) from exc
            except (redis.ConnectionError, redis.TimeoutError) as exc:
                if attempt == attempts - 1:
                    raise self.fault(exc) from exc
                if self.is_embedded and os.getpid() == self._pid:
                    self._revive()
                time.sleep(random.uniform(PAUSE_S / 2, PAUSE_S) * (attempt + 1))
            except redis.RedisError as exc:
                raise self.fault(exc) from exc
        raise AssertionError("attempts is at least 1")

    def _revive(self) -> None:
        """Start the embedded server again when it is gone."""
        from mlfuncs_featurestore.redis_embedded import ensure_embedded

        ensure_embedded(self.settings)

    def settle(self) -> None:
        """Have what was written so far on disk, where that is in our hands: on the embedded server."""
        if self.is_embedded:
            from mlfuncs_featurestore.redis_embedded import sync_embedded

            sync_embedded(self.settings)

    def fault(self, exc: redis.RedisError) -> Unavailable:
        """The error to raise for a fault of Redis."""
        if isinstance(exc, redis.TimeoutError):
            what = "did not answer in time"
        elif isinstance(exc, (redis.AuthenticationError, AuthorizationError)):
            what = "refuses the user or password of redis_url"
        elif isinstance(exc, _Replica):
            what = "is a replica, and no other answers at its address"
        elif isinstance(exc, redis.ConnectionError):
            what = "cannot be reached"
        else:
            what = "refused a command"
        reason = _without_password(str(exc), self._url)
        return Unavailable(f"the online store (Redis at {self.address}) {what}: {reason}; check MLFUNCS_REDIS_URL")

    def close(self) -> None:
        """Close every connection; the next command opens new ones."""
        self._disconnect()
        self.client.close()

    def _disconnect(self) -> None:
        while self._idle:
            self._idle.pop().disconnect()


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except redis.ResponseError as exc:
        return exc


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)  # `RedisLink.run` retries


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def _without_password(text: str, url: str) -> str:
    parts = urlsplit(url)
    hidden = [parts.password or "", *parse_qs(parts.query).get("password", [])]
    for secret in filter(None, hidden):
        text = text.replace(secret, "***")
    return text
