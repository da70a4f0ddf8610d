"""The online store on Redis: packed rows by key, written atomically.

Owns: RedisOnlineStore, the adapter of the port `online_port.OnlineRows`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import redis

from mlfuncs_featurestore.online_port import LATEST_US
from mlfuncs_featurestore.redis_client import RedisLink, Sent
from mlfuncs_featurestore.redis_keys import group_of
from mlfuncs_featurestore.redis_scripts import APPEND, NEWEST, SWAP

BATCH = 1000  # keys of one script call: measured best; Lua's `unpack` allows 7,999
IN_FLIGHT = 4  # script calls sent before the first answer is read: Redis works while Python packs
_CLOCK = struct.Struct("<q")
_SHA = {script: hashlib.sha1(script.encode()).hexdigest() for script in (NEWEST, APPEND, SWAP)}


class RedisOnlineStore:
    """Packed rows in Redis. Every write may be repeated without changing the result."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The stored bytes at each key, None where there is nothing. One round trip (one per node on a cluster)."""
        if not keys:
            return []
        if not self.link.is_cluster:
            return self.link.call(b"MGET", *keys)

        def spread() -> list[bytes | None]:
            pipe = self.link.client.pipeline()
            for key in keys:
                pipe.get(key)
            return list(pipe.execute())

        return self.link.run(spread)

    def write_newest(self, keys: Sequence[bytes], rows: Sequence[bytes], now_us: int = LATEST_US) -> int:
        """Store each row unless a newer one is there; how many were stored. A key may come only once.

        A row later than `now_us`, the writer's clock, waits beside the one before it (see `ahead`).
        """
        return sum(self._scripted(NEWEST, keys, rows, last=(_CLOCK.pack(now_us),)))

    def stream_newest(self, parts: Iterable[tuple[Sequence[bytes], Sequence[bytes]]], now_us: int = LATEST_US) -> int:
        """`write_newest` of one part (keys, rows) after another; while Redis works on one, the next is made."""
        if self.link.is_cluster:
            return sum(self.write_newest(*part, now_us) for part in parts)
        stored, calls = 0, list[tuple[Any, ...]]()
        sent: Sent | None = None
        try:
            for keys, rows in parts:
                more = self._calls(NEWEST, keys, rows, last=(_CLOCK.pack(now_us),))
                earlier, sent = sent, self.link.send(more)
                if earlier is not None:
                    stored += sum(self._checked(NEWEST, calls, self.link.receive(earlier)))
                calls = more
        except BaseException:
            if sent is not None and sent.connection is not None:
                sent.connection.disconnect()  # its answers belong to nobody
            raise
        return stored if sent is None else stored + sum(self._checked(NEWEST, calls, self.link.receive(sent)))

    def append(self, keys: Sequence[bytes], records: Sequence[bytes], header: bytes, least: int) -> list[bytes]:
        """Append records to the values at `keys`; the keys whose value has grown enough to compact (see APPEND)."""
        grown: list[bytes] = []
        for batch, numbers in zip(
            self._batches(keys), self._scripted(APPEND, keys, records, (header, str(least).encode())), strict=True
        ):
            grown += [keys[batch[number - 1]] for number in numbers]
        return grown

    def swap(self, key: bytes, seen: bytes, new: bytes) -> bool:
        """Replace the value that was `seen` by `new`; False when another writer changed it."""
        digest = hashlib.sha1(seen).hexdigest().encode()
        return bool(self._scripted(SWAP, [key], [new], (digest,))[0])

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove what is at `keys`."""
        for batch in self._batches(keys):
            chosen = [keys[place] for place in batch]
            self.link.run(lambda chosen=chosen: self.link.client.delete(*chosen))  # type: ignore[misc]

    def _batches(self, keys: Sequence[bytes]) -> list[list[int]]:
        """Places of the keys that go into one call: of one slot on a cluster."""
        if not self.link.is_cluster:
            return [list(range(start, min(start + BATCH, len(keys)))) for start in range(0, len(keys), BATCH)]
        groups: dict[bytes, list[int]] = {}
        for place, key in enumerate(keys):
            groups.setdefault(group_of(key), []).append(place)
        return [places[start : start + BATCH] for places in groups.values() for start in range(0, len(places), BATCH)]

    def _scripted(
        self,
        script: str,
        keys: Sequence[bytes],
        values: Sequence[bytes],
        first: tuple[bytes, ...] = (),
        last: tuple[bytes, ...] = (),
    ) -> list[Any]:
        calls = self._calls(script, keys, values, first, last)
        if self.link.is_cluster:
            return [self._on_cluster(script, call) for call in calls]
        answers: list[Any] = []
        for start in range(0, len(calls), IN_FLIGHT):
            some = calls[start : start + IN_FLIGHT]
            answers += self._checked(script, some, self.link.pipeline(some))
        return answers

    def _calls(
        self,
        script: str,
        keys: Sequence[bytes],
        values: Sequence[bytes],
        first: tuple[bytes, ...] = (),
        last: tuple[bytes, ...] = (),
    ) -> list[tuple[Any, ...]]:
        """The commands that run `script` over the keys, a batch each: `first`, the keys' values and `last` go along."""
        calls = []
        for batch in self._batches(keys):
            plain = len(keys) == len(batch)
            mine = keys if plain else [keys[place] for place in batch]
            theirs = values if plain else [values[place] for place in batch]
            calls.append((b"EVALSHA", _SHA[script], len(mine), *mine, *first, *theirs, *last))
        return calls

    def _checked(self, script: str, calls: list[tuple[Any, ...]], answers: list[Any]) -> list[Any]:
        """The answers to `calls`, made again where Redis did not know the script yet. Raises Unavailable."""
        if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
            self.link.call(b"SCRIPT", b"LOAD", script.encode())
            answers = self.link.pipeline(calls)
        for answer in answers:
            if isinstance(answer, redis.RedisError):
                raise self.link.fault(answer) from answer
        return answers

    def _on_cluster(self, script: str, call: tuple[Any, ...]) -> Any:
        _, sha, count, *rest = call

        def attempt() -> Any:
            try:
                return self.link.client.evalsha(sha, count, *rest)
            except redis.exceptions.NoScriptError:
                return self.link.client.eval(script, count, *rest)

        return self.link.run(attempt)
