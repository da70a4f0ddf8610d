"""Messages from a Redis stream by a consumer group (Redis 6.2 or newer; redis.io/docs/latest/commands/xautoclaim).

The server is one alone or a cluster. In a cluster the stream of dead letters must lie in the slot of the stream, or no
step could write the one and acknowledge in the other: its name then has the stream's as hash tag, `{orders}.dead`.

An entry is pending at this home's consumer from the moment it is read until it is acknowledged, and Redis counts how
often it was handed out; a process that dies loses nothing. The next one of this home takes its own pending entries
at once; those of a consumer that is gone are claimed when nobody touched them for `claim_after_s`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlfuncs.errors import MissingExtra, SpecError, Unavailable
from mlfuncs.triggers import RedisStream
from mlfuncs_runtime.triggers.pump import Message

CLAIM_AFTER_S = 60.0
_CLAIM_EVERY_S = 10.0
_LOOK_EVERY_S = 5.0  # how often it is asked how much waits
_TIMEOUT_S = 5.0
_BURY = "redis.call('xadd', KEYS[2], '*', unpack(ARGV, 3)); return redis.call('xack', KEYS[1], ARGV[1], ARGV[2])"


class RedisStreamSource:
    """A `Source` over one stream and group. `consumer` names this home, the same at every start.

    `find` gives the server's URL, and starts the server when it is ours; it is asked again when the server is gone.
    """

    def __init__(
        self,
        spec: RedisStream,
        find: Callable[[], str],
        consumer: str,
        claim_after_s: float = CLAIM_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            import redis
        except ModuleNotFoundError as exc:
            raise MissingExtra("a Redis stream as trigger", "triggers") from exc
        self._spec, self._consumer, self._claim_after_ms = spec, consumer, int(claim_after_s * 1000)
        self._clock = clock
        self._find, self._gone = find, redis.ConnectionError
        self._errors = (redis.RedisError, redis.exceptions.RedisClusterException)
        self.waiting: int | None = None
        self._look_next_s = clock()
        self._redis: Any = self._connect()
        self._dead = dead_stream(spec.stream, isinstance(self._redis, redis.RedisCluster))
        self._has_group = False
        self._own_after: str | None = "-"  # where the next look at our own pending entries begins; None: all seen
        self._claim_from, self._claim_next_s = "0-0", clock()

    def receive(self, limit: int, wait_s: float) -> Sequence[Message]:
        """Own pending entries first, then stale ones of others, then new ones."""
        with self._talking():
            self._make_group()
            self._look()
            if limit < 1:
                time.sleep(wait_s)
                return []
            found = self._own_pending(limit)
            if not found and self._clock() >= self._claim_next_s:
                found = self._stale(limit)
            return found or self._new(limit, wait_s)

    def settle(self, message: Message) -> None:
        """Acknowledge it; the entry stays in the stream, which its writers trim."""
        with self._talking():
            self._redis.xack(self._spec.stream, self._spec.group, message.id)

    def bury(self, message: Message, reason: str) -> None:
        """Copy it to the stream of dead letters and acknowledge it, both or neither."""
        note = {"mlfuncs-id": message.id, "mlfuncs-reason": reason[:2000], "mlfuncs-tries": message.tries}
        fields = [part for pair in {**message.raw, **note}.items() for part in pair]
        with self._talking():
            self._redis.eval(_BURY, 2, self._spec.stream, self._dead, self._spec.group, message.id, *fields)

    def retried(self, message: Message) -> None:
        """Count one more delivery in Redis."""
        with self._talking():
            self._claim([message.id])

    def keep(self, messages: Sequence[Message]) -> None:
        """Set their idle time back; the count of deliveries stays."""
        if messages:
            ids = [message.id for message in messages]
            with self._talking():
                self._redis.xclaim(self._spec.stream, self._spec.group, self._consumer, 0, ids, justid=True)

    def close(self) -> None:
        """End the connections; what is pending stays ours."""
        self._redis.close()

    def _own_pending(self, limit: int) -> list[Message]:
        if self._own_after is None:
            return []
        spec = self._spec
        rows = self._redis.xpending_range(spec.stream, spec.group, self._own_after, "+", limit, self._consumer)
        if not rows:
            self._own_after = None
            return []
        ids = [_text(row["message_id"]) for row in rows]
        self._own_after = f"({ids[-1]}"
        return self._messages(self._claim(ids), {_text(row["message_id"]): row["times_delivered"] + 1 for row in rows})

    def _stale(self, limit: int) -> list[Message]:
        spec = self._spec
        answer = self._redis.xautoclaim(
            spec.stream, spec.group, self._consumer, self._claim_after_ms, self._claim_from, count=limit
        )
        self._claim_from = _text(answer[0])
        if self._claim_from == "0-0":
            self._claim_next_s = self._clock() + min(_CLAIM_EVERY_S, self._claim_after_ms / 2000)
        entries = [entry for entry in answer[1] if entry and entry[1] is not None]
        return self._messages(entries, {_text(entry[0]): self._deliveries(entry[0]) for entry in entries})

    def _new(self, limit: int, wait_s: float) -> list[Message]:
        spec = self._spec
        block = {"block": max(1, int(wait_s * 1000))} if wait_s > 0 else {}
        answer = self._redis.xreadgroup(spec.group, self._consumer, {spec.stream: ">"}, count=limit, **block)
        streams = answer.items() if isinstance(answer, dict) else answer or []
        entries = [entry for _, batch in streams for entry in batch]
        if entries and isinstance(entries[0], list):
            entries = entries[0]
        return self._messages(entries, {})

    def _claim(self, ids: Sequence[str]) -> list[Any]:
        spec = self._spec
        entries = self._redis.xclaim(spec.stream, spec.group, self._consumer, 0, list(ids))
        return [entry for entry in entries if entry and entry[0] is not None and entry[1] is not None]

    def _deliveries(self, entry_id: bytes) -> int:
        rows = self._redis.xpending_range(self._spec.stream, self._spec.group, entry_id, entry_id, 1)
        return int(rows[0]["times_delivered"]) if rows else 1

    def _messages(self, entries: Sequence[Any], tries: Mapping[str, int]) -> list[Message]:
        return [
            Message(_text(entry_id), body_of(fields), tries.get(_text(entry_id), 1), dict(fields))
            for entry_id, fields in entries
        ]

    def _connect(self) -> Any:
        import redis

        options = {"socket_timeout": _TIMEOUT_S, "socket_connect_timeout": _TIMEOUT_S}
        url = self._find()
        plain = url.replace("+cluster", "", 1)
        with self._talking():
            try:
                return (redis.Redis if plain == url else redis.RedisCluster).from_url(plain, **options)
            except ValueError as exc:
                raise SpecError(f"stream {self._spec.stream!r}: the Redis address is not valid ({exc})") from exc

    def _look(self) -> None:
        """Ask how much waits: the group's lag, which Redis tells from 7.0 on, unless entries were deleted."""
        if self._clock() < self._look_next_s:
            return
        self._look_next_s = self._clock() + _LOOK_EVERY_S
        groups = {_text(group["name"]): group for group in self._redis.xinfo_groups(self._spec.stream)}
        lag = groups.get(self._spec.group, {}).get("lag")
        self.waiting = None if lag is None else int(lag)

    def _make_group(self) -> None:
        """The group begins with what is in the stream already."""
        if self._has_group:
            return
        try:
            self._redis.xgroup_create(self._spec.stream, self._spec.group, id="0", mkstream=True)
        except self._errors as exc:
            if "BUSYGROUP" not in str(exc):
                raise
        self._has_group = True

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except self._errors as exc:
            if "NOGROUP" in str(exc):
                self._has_group = False  # the stream was deleted: it and the group are made again
            if isinstance(exc, self._gone):
                self._find()
            raise Unavailable(f"Redis stream {self._spec.stream!r} cannot be used: {exc}") from exc


def dead_stream(stream: str, is_cluster: bool) -> str:
    """Where the dead letters of a stream go.

    >>> dead_stream("orders", False), dead_stream("orders", True), dead_stream("{shop}.orders", True)
    ('orders.dead', '{orders}.dead', '{shop}.orders.dead')
    """
    return f"{{{stream}}}.dead" if is_cluster and "{" not in stream else f"{stream}.dead"


def body_of(fields: Mapping[bytes, bytes]) -> bytes:
    """The JSON an entry stands for: its field `body` as it is, else its fields by name.

    A value that is JSON is taken as that, any other as text.

    >>> body_of({b"x": b"[1, 2]", b"name": b"ann"})
    b'{"x": [1, 2], "name": "ann"}'
    """
    if set(fields) == {b"body"}:
        return fields[b"body"]
    return json.dumps({_text(name): _value(value) for name, value in fields.items()}).encode()


def _value(value: bytes) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return _text(value)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
