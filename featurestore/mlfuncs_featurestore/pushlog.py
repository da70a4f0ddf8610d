"""The push log: rows that are durable before they are acknowledged, and not yet in the Delta table.

Owns: one view's log on this machine, in home/features/<project>/<view>. Appends are checksummed and fsynced under a
lock file, so that any number of processes may push. A push is pending until a marker says that its rows are online; a
process that died in between leaves it pending, and the next flush completes it.

A segment is a file of records (`pushlog_records`). Its first record carries on the numbers of the segment before. A
torn record at the end was never acknowledged; the next writer cuts it off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlfuncs.errors import StorageError
from mlfuncs.files import sync_folder
from mlfuncs.settings import Settings, ensure_home
from mlfuncs_featurestore.checkpoints import reached
from mlfuncs_featurestore.pushlog_records import framed, read_records, sync_file

REMEMBERED = 50_000  # ids kept after their rows were committed, so that a repeated push or stream entry is known


@dataclass(frozen=True)
class Push:
    """One logged push: `rows` are conformed and carry `__ingest`; `aside` are its quarantined rows."""

    number: int
    push_id: str
    at_us: int
    rows: pa.Table = field(repr=False)
    aside: pa.Table | None = field(default=None, repr=False)
    is_online: bool = False
    aliases: tuple[str, ...] = ()  # other ids by which its rows are known: the entries of a stream


@dataclass
class _Tail:
    """What this process knows of the log: up to which byte of which segment, and what stood there."""

    segment: str = ""
    end: int = 0
    number: int = 0  # of the last push
    sequence: int = 0  # the first ingest number that is free
    oldest_ns: int = 0  # when the first push that waits was logged
    pending: set[str] = field(default_factory=set)

    def take(self, head: dict[str, Any]) -> None:
        """Take a record into account."""
        self.number = max(self.number, head.get("number", 0))
        self.sequence = max(self.sequence, head.get("first", 0) + head.get("rows", 0))
        if "push" in head:
            self.oldest_ns = self.oldest_ns or head["first"]
            self.pending.update([head["push"], *head["aliases"]])


class PushLog:
    """One view's log. The methods that change it take the lock, but for `clear`."""

    def __init__(self, settings: Settings, view: str) -> None:
        self.settings, self.view = settings, view
        self.folder = settings.home / "features" / settings.project / view
        self._tail = _Tail()
        self._done: tuple[tuple[int, int], set[str]] = ((0, 0), set())

    @property
    def size(self) -> int:
        """Bytes in the log; what is pending is read only when this is not 0."""
        return sum(path.stat().st_size for path in self._segments())

    @property
    def waits_since_ns(self) -> int:
        """The clock, in nanoseconds, when the oldest row that this process knows to wait was logged."""
        return self._tail.oldest_ns or time.time_ns()

    def append(self, ids: Sequence[str], at_us: int, rows: pa.Table, aside: pa.Table) -> Push | None:
        """Log the rows durably and return them with their `__ingest` numbers; None when the push is known already.

        `ids` are the push's own and its aliases.

        Raises StorageError when the disk refuses; then nothing was logged.
        """
        from mlfuncs_featurestore.online_write import number_rows

        push_id = ids[0]
        with self.locked():
            self._catch_up()
            if push_id in self._tail.pending or push_id in self._committed():
                return None
            first, number = max(time.time_ns(), self._tail.sequence), self._tail.number + 1
            kept = aside if aside.num_rows else None
            push = Push(number, push_id, at_us, number_rows(rows, first), kept, aliases=tuple(ids[1:]))
            self._write(*_record(push), durable=True)
        reached("push:logged")
        return push

    def knows(self, push_id: str) -> bool:
        """Whether a push or a stream entry of this id was logged."""
        with self.locked():
            self._catch_up()
            return push_id in self._tail.pending or push_id in self._committed()

    def mark_online(self, push: Push) -> None:
        """Note that a push is readable online. Not fsynced: without it, its rows are written again, to no effect."""
        with self.locked():
            self._catch_up()
            self._write({"online": push.push_id}, [], durable=False)

    def pushes(self) -> list[Push]:
        """The pushes that wait, in order; one that stands in two segments (a crash while flushing) comes once.

        One that was committed, but was not yet forgotten, is left out.
        """
        found: dict[str, Push] = {}
        online: set[str] = set()
        for path in self._segments():
            for head, tables, _ in read_records(path):
                if "online" in head:
                    online.add(head["online"])
                elif "push" in head and head["push"] not in found:
                    aside = tables[1] if len(tables) > 1 else None
                    others = tuple(head["aliases"])
                    one = Push(head["number"], head["push"], head["at_us"], tables[0], aside, aliases=others)
                    found[one.push_id] = one
        done = self._committed()
        return [
            dataclasses.replace(one, is_online=one.push_id in online)
            for one in found.values()
            if one.push_id not in done
        ]

    def intend(self, commit_id: str, after: int, pushes: Sequence[Push]) -> None:
        """Note, before the commit, what is about to be committed by which commit after which version."""
        intent = {
            "commit": commit_id,
            "after": after,
            "pushes": [one for push in pushes for one in (push.push_id, *push.aliases)],
        }
        self._replace("intent.json", json.dumps(intent))

    @property
    def intent(self) -> dict[str, Any] | None:
        """The commit that was under way when a flush was interrupted; None when none was."""
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads((self.folder / "intent.json").read_text(encoding="utf-8"))
            return found
        return None

    def settle(self, committed: bool) -> None:
        """The interrupted commit did or did not happen: remember its pushes, or let them wait on."""
        if committed and self.intent is not None:
            self._remember(self.intent["pushes"])
        (self.folder / "intent.json").unlink(missing_ok=True)

    def clear(self, kept: Sequence[Push]) -> None:
        """Forget the pushes that were committed, and keep those in `kept`. The caller holds the lock."""
        self.settle(committed=True)
        reached("flush:remembered")
        old = self._segments()
        self._catch_up()
        number = int(old[-1].stem) + 1 if old else 1
        fresh = self.folder / f"{number:012}.log"
        base = {"base": True, "number": self._tail.number, "first": self._tail.sequence, "rows": 0}
        with open(f"{fresh}.part", "wb") as file:
            file.write(framed(base, []) + b"".join(framed(*_record(push)) for push in kept))
            sync_file(file)
        os.replace(f"{fresh}.part", fresh)
        sync_folder(self.folder)
        reached("flush:rotated")
        for path in old:
            path.unlink()
        sync_folder(self.folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with this log, among all threads and processes."""
        ensure_home(self.settings)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = open(self.folder / "lock", "w")  # noqa: SIM115 - closed below
        except OSError as exc:
            raise StorageError(f"the push log {self.folder} cannot be written: {exc.strerror or exc}") from exc
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _segments(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.log"))

    def _catch_up(self) -> None:
        """Read what others wrote since this process last looked."""
        segments = self._segments()
        if not segments or segments[-1].name != self._tail.segment:
            self._tail = _Tail(segments[-1].name if segments else "")
            for path in segments[:-1]:
                for head, _, _ in read_records(path):
                    self._tail.take(head)
        for head, _, end in read_records(segments[-1], self._tail.end) if segments else ():
            self._tail.take(head)
            self._tail.end = end

    def _write(self, head: dict[str, Any], tables: list[pa.Table], durable: bool) -> None:
        """Append one record after the last whole one."""
        path = self.folder / (self._tail.segment or f"{1:012}.log")
        is_new = not path.exists()
        try:
            with open(path, "wb" if is_new else "r+b") as file:
                file.truncate(self._tail.end)
                file.seek(self._tail.end)
                try:
                    file.write(framed(head, tables))
                    file.flush()
                    reached("push:written")
                    if durable:
                        sync_file(file)
                except OSError:
                    file.truncate(self._tail.end)
                    raise
                self._tail.segment, self._tail.end = path.name, file.tell()
            if is_new:
                sync_folder(self.folder)
        except OSError as exc:
            raise StorageError(f"the push log {path} cannot be written: {exc.strerror or exc}") from exc
        self._tail.take(head)

    def _committed(self) -> set[str]:
        """The ids whose rows are committed; read again when the file changed."""
        path = self.folder / "committed"
        try:
            status = path.stat()
        except OSError:
            return set()
        version = (status.st_mtime_ns, status.st_ino)
        if version != self._done[0]:
            self._done = (version, set(path.read_text(encoding="utf-8").splitlines()))
        return self._done[1]

    def _remember(self, push_ids: list[str]) -> None:
        known: list[str] = []
        with contextlib.suppress(OSError):
            known = (self.folder / "committed").read_text(encoding="utf-8").splitlines()
        keep = [*known, *push_ids][-max(REMEMBERED, len(push_ids)) :]
        self._replace("committed", "".join(f"{one}\n" for one in keep))

    def _replace(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        with open(self.folder / f"{name}.part", "w", encoding="utf-8") as file:
            file.write(text)
            sync_file(file)
        os.replace(self.folder / f"{name}.part", self.folder / name)
        sync_folder(self.folder)


def _record(push: Push) -> tuple[dict[str, Any], list[pa.Table]]:
    first = push.rows["__ingest"][0].as_py() if push.rows.num_rows else 0
    head = {"push": push.push_id, "number": push.number, "at_us": push.at_us, "aliases": push.aliases}
    head |= {"first": first, "rows": push.rows.num_rows}
    return head, [push.rows] if push.aside is None else [push.rows, push.aside]
