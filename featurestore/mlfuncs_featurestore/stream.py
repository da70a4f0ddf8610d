"""Redis Streams as a view's source: entries read by a consumer group, transformed and pushed.

Owns: StreamReader and `consume`. A view with source "redis-stream:<name>" takes its rows from that stream of the online
store's Redis. An entry has one field `row` with the row as a JSON object, or one field per column. Entries are pushed
in batches, through the view's transform (the very function that `ingest` runs on tables), and acknowledged after that.
The push log keeps the ids of entries, the last 50,000 committed ones too, so an entry that is delivered again because
its consumer died counts once. Entries that do not fit are moved to "<stream>:rejected" with the reason.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis

from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.json_rows import read_row
from mlfuncs_featurestore.push import flush, log_of
from mlfuncs_featurestore.types import INTEGERS

if TYPE_CHECKING:
    from mlfuncs_featurestore.store import FeatureStore

BATCH = 500
IDLE_MS = 60_000  # an entry that another consumer took this long ago without acknowledging is taken over
Entry = tuple[bytes, Mapping[bytes, bytes]]


@dataclass(frozen=True)
class Consumed:
    """What one `consume` did: rows pushed, entries set aside as not fitting."""

    view: str
    rows: int
    rejected: int


def consume(
    store: FeatureStore, view: str, *, group: str = "mlfuncs", block_ms: int = 0, max_entries: int = 10_000
) -> Consumed:
    """Push what waits in the view's stream, up to `max_entries`; wait up to `block_ms` for a first entry.

    Call it in a loop, in any number of processes: the group gives each entry to one of them. Raises SpecError when the
    view has no stream, Unavailable when Redis is away (what was not acknowledged comes again).
    """
    return StreamReader(store, view, group).consume(block_ms, max_entries)


class StreamReader:
    """One consumer of a view's stream."""

    def __init__(self, store: FeatureStore, view: str, group: str = "mlfuncs") -> None:
        self.store, self.view, self.group = store, store.catalog.view(view), group
        source = self.view.source
        if source is None or source.kind != "redis-stream":
            raise SpecError(f"view {view!r} has no stream: apply it with source='redis-stream:<name>'")
        self.stream = source.location
        self.consumer = f"{socket.gethostname()}-{os.getpid()}"
        self._link = store.online.rows.link

    def consume(self, block_ms: int = 0, max_entries: int = 10_000) -> Consumed:
        """See the module's `consume`."""
        self._ensure_group()
        rows = rejected = seen = 0
        entries = self._take_over()
        while seen < max_entries:
            redelivered = bool(entries)
            entries = entries or self._read(min(BATCH, max_entries - seen), block_ms if not seen else 0)
            if not entries:
                break
            seen += len(entries)
            pushed = self._push(entries, redelivered)
            rows, rejected = rows + pushed, rejected + len(entries) - pushed
            entries = []
        return Consumed(self.view.name, rows, rejected)

    def _ensure_group(self) -> None:
        def make() -> None:
            try:
                self._link.client.xgroup_create(self.stream, self.group, id="0", mkstream=True)
            except redis.ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

        self._link.run(make)

    def _take_over(self) -> list[Entry]:
        """Entries that a consumer took and never acknowledged, this one before a crash included."""
        client = self._link.client
        own = self._link.run(lambda: client.xreadgroup(self.group, self.consumer, {self.stream: "0"}, count=BATCH))
        entries = _entries(own)
        if entries:
            return entries
        claimed = self._link.run(
            lambda: client.xautoclaim(self.stream, self.group, self.consumer, IDLE_MS, "0-0", count=BATCH)
        )
        return [entry for entry in claimed[1] if entry[1]]

    def _read(self, count: int, block_ms: int) -> list[Entry]:
        client, block = self._link.client, min(block_ms, 1000) or None  # shorter than the socket's time-out
        streams = {self.stream: ">"}
        return _entries(
            self._link.run(lambda: client.xreadgroup(self.group, self.consumer, streams, count=count, block=block))
        )

    def _id(self, entry: Entry) -> str:
        return f"{self.stream}:{entry[0].decode()}"

    def _push(self, entries: Sequence[Entry], redelivered: bool) -> int:
        """Push the entries and acknowledge them; how many fitted. When the batch does not fit, each one by itself."""
        log = log_of(self.store, self.view.name)
        fresh = [entry for entry in entries if not log.knows(self._id(entry))] if redelivered else entries
        if len(fresh) < len(entries):
            flush(self.store, self.view.name)  # those that are known may not be online yet
        try:
            rows = [self._row(fields) for _, fields in fresh]
            if rows:
                self.store.push(self.view.name, rows, aliases=[self._id(entry) for entry in fresh])
        except InvalidInput as exc:
            if len(entries) > 1:
                return sum(self._push([entry], redelivered) for entry in entries)
            self._reject(entries[0], str(exc))
            return 0
        numbers = [number for number, _ in entries]
        self._link.run(lambda: self._link.client.xack(self.stream, self.group, *numbers))
        return len(entries)

    def _reject(self, entry: Entry, reason: str) -> None:
        number, fields = entry
        kept = {**fields, b"__reason": reason.encode(), b"__id": number}

        def move() -> None:
            self._link.client.xadd(f"{self.stream}:rejected", kept, maxlen=100_000, approximate=True)
            self._link.client.xack(self.stream, self.group, number)

        self._link.run(move)

    def _row(self, fields: Mapping[bytes, bytes]) -> dict[str, Any]:
        """An entry as a row: times of ISO text, other values as JSON or as the view's field says."""
        try:
            if b"row" in fields and len(fields) == 1:
                row = json.loads(fields[b"row"])
                if not isinstance(row, dict):
                    raise ValueError("it is not an object")
            else:
                row = {name.decode(): _typed(self.view, name.decode(), value) for name, value in fields.items()}
        except (ValueError, UnicodeDecodeError) as exc:
            raise InvalidInput(f"an entry of stream {self.stream!r} is not a row: {exc}") from exc
        return read_row(self.view, row)


def _entries(answer: Any) -> list[Entry]:
    """The entries in redis-py's answer, of which RESP2 and RESP3 have different forms."""
    if not answer:
        return []
    streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer]
    found: list[Entry] = []
    for entries in streams:
        nested = entries and isinstance(entries[0], list) and entries[0] and isinstance(entries[0][0], (list, tuple))
        found += [entry for entry in (entries[0] if nested else entries) if entry[1]]
    return found


def _typed(view: FeatureView, name: str, value: bytes) -> Any:
    """A field of an entry, which Redis keeps as bytes, as JSON would have it."""
    text = value.decode()
    kind = view.keys.get(name) or (str(view.fields[name].kind) if name in view.fields else "")
    if kind in INTEGERS:
        return int(text)
    if kind in ("float64", "float32"):
        return float(text)
    if kind == "bool":
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    return json.loads(text) if kind in ("list", "vector", "struct") else text
