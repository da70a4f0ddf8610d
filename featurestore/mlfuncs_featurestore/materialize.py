"""`materialize`: the online store brought up to the offline tables' last commit.

Owns: how far each view is online, and the way from Delta files to Redis. Incremental by commit, never by event time: a
late row is in the next commit and so in the next run. What was reached is noted in Redis itself, beside the rows, file
by file: a run that was interrupted goes on where it stopped, and a Redis that lost its data starts from nothing. Every
write may be repeated (newest wins, events count once), so runs may overlap.

Rows of the future (their event time is later than now) stay offline, as the point-in-time join does not show them
either; their files are remembered and looked at again by the next run.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs.errors import SpecError
from mlfuncs_featurestore import delta_tables as delta
from mlfuncs_featurestore.checkpoints import reached
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.offline import BUCKET, DataFile, Snapshot, stored_schema
from mlfuncs_featurestore.online_plan import EVENTS, form_of
from mlfuncs_featurestore.online_rows import whole_numbers
from mlfuncs_featurestore.online_write import FUTURE_US
from mlfuncs_featurestore.redis_keys import document_key
from mlfuncs_featurestore.rows import to_us

if TYPE_CHECKING:
    from mlfuncs_featurestore.store import FeatureStore


@dataclass(frozen=True)
class ViewMaterialized:
    """One view's run: rows stored, the table versions it started after and reached, files read, rows of the future."""

    view: str
    rows: int
    since: int
    version: int
    files: int
    future_rows: int

    def __str__(self) -> str:
        later = f", {self.future_rows} rows of the future wait" if self.future_rows else ""
        return f"{self.view}: {self.rows} rows of versions {self.since + 1} to {self.version} are online{later}"


@dataclass(frozen=True)
class MaterializeReport:
    """What one `materialize` did, view by view."""

    views: tuple[ViewMaterialized, ...]

    @property
    def rows(self) -> int:
        """Rows stored in all."""
        return sum(one.rows for one in self.views)

    def __str__(self) -> str:
        return "\n".join(map(str, self.views)) or "no view is online; apply one with online=True"


@dataclass(frozen=True)
class MaterializeOptions:
    """How to materialize.

    `backfill`: from the first commit on, whatever was done before. `start`, `end`: only rows with an event time in
    [start, end], from all commits; how far the view is online does not change. `now`: the clock, for tests and replays.
    `progress`: show a bar.
    """

    backfill: bool = False
    start: datetime.datetime | None = None
    end: datetime.datetime | None = None
    now: datetime.datetime | None = None
    progress: bool = False

    @property
    def now_us(self) -> int:
        """The clock in microseconds."""
        return time.time_ns() // 1000 if self.now is None else to_us(self.now)

    @property
    def window(self) -> tuple[int, int] | None:
        """The event times to take, in microseconds, both inclusive; None for all."""
        if self.start is None and self.end is None:
            return None
        low = -(2**63) if self.start is None else to_us(self.start)
        return low, 2**63 - 1 if self.end is None else to_us(self.end)


@dataclass
class Cursor:
    """How far a view is online: all commits up to `version` of table `table`, and the files in `done` after it."""

    table: str = ""
    form: str = ""
    version: int = -1
    done: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)  # files with rows of the future


def materialize(store: FeatureStore, view: str | None = None, **options: Any) -> MaterializeReport:
    """Bring the view, or every online view, up to its table's last commit; see MaterializeOptions.

    Pushed rows that wait are committed first. Raises SpecError for a view that is not online, Unavailable when Redis is
    away; what was reached stays, and the next run goes on from there.
    """
    unknown = set(options) - set(MaterializeOptions.__dataclass_fields__)
    if unknown:
        known = ", ".join(MaterializeOptions.__dataclass_fields__)
        raise SpecError(f"materialize has no option {sorted(unknown)[0]!r}; it has {known}")
    chosen = MaterializeOptions(**options)
    from mlfuncs_featurestore.push import flush

    if view is None:
        views = [one for one in store.catalog.all("view") if isinstance(one, FeatureView) and one.online]
    else:
        views = [store.catalog.view(view)]
    for one in views:
        flush(store, one.name)
    return MaterializeReport(tuple(_Run(store, one, chosen).run() for one in views))


def read_cursor(store: FeatureStore, view: str) -> Cursor:
    """How far the view is online; a fresh cursor when nothing is."""
    rows = store.online.rows
    stored = rows.read([document_key(store.settings.project, "materialized", view).encode()])[0]
    return Cursor() if stored is None else Cursor(**json.loads(stored))


class _Run:
    """One view's run."""

    def __init__(self, store: FeatureStore, view: FeatureView, options: MaterializeOptions) -> None:
        self.store, self.view, self.options = store, view, options
        store.online.read_of(view, ())  # raises SpecError when it is not online
        self.now_us = options.now_us
        self.rows = self.files = self.future_rows = 0

    def run(self) -> ViewMaterialized:
        """Send what is new and note what was reached."""
        name = self.view.name
        table = delta.open_delta(self.store.offline.uri(name))
        identity = "" if table is None else str(table.metadata().id)
        cursor = self._cursor(identity)
        version, files = self.store.offline.changes(name, cursor.version)
        old = [file for file in self._waiting(cursor) if file.path not in {one.path for one in files}]
        snapshot = Snapshot(name, self.store.offline.uri(name), version, tuple(files))
        waiting: list[str] = []
        for file in [*old, *files]:
            if file.path in cursor.done:
                continue
            if self._send(snapshot, file):
                waiting.append(file.path)
            reached("materialize:file")
            cursor.done.append(file.path)
            self._note(cursor)
        since = cursor.version
        self.store.online.rows.link.settle()
        reached("materialize:sent")
        self._note(Cursor(identity, form_of(self.view), version, [], waiting))
        return ViewMaterialized(name, self.rows, since, version, self.files, self.future_rows)

    def _cursor(self, identity: str) -> Cursor:
        """Where to start: from nothing when asked to, or when the table or the form online is another one."""
        fresh = Cursor(identity, form_of(self.view))
        if self.options.backfill or self.options.window is not None:
            return fresh
        cursor = read_cursor(self.store, self.view.name)
        return cursor if (cursor.table, cursor.form) == (fresh.table, fresh.form) else fresh

    def _note(self, cursor: Cursor) -> None:
        if self.options.window is None:
            key = document_key(self.store.settings.project, "materialized", self.view.name)
            text = json.dumps(cursor.__dict__)
            link = self.store.online.rows.link
            link.run(lambda: link.client.set(key, text))

    def _waiting(self, cursor: Cursor) -> list[DataFile]:
        """The files of earlier runs that had rows of the future; one that was merged away has its rows in another."""
        if not cursor.waiting:
            return []
        there = {file.path: file for file in self.store.offline.snapshot(self.view.name).files}
        gone = [path for path in cursor.waiting if path not in there]
        if gone:  # compacted meanwhile: look at everything
            return list(there.values())
        return [there[path] for path in cursor.waiting]

    def _send(self, snapshot: Snapshot, file: DataFile) -> bool:
        """Send one file, a row group at a time; whether it has rows of the future."""
        self.files += 1
        future = 0
        for rows in self._batches(snapshot, file):
            later = int((whole_numbers(rows[self.view.timestamp]) > self.now_us + FUTURE_US).sum())
            future += later if form_of(self.view) != EVENTS else 0
            self.rows += self.store.online.write(self.view, rows, self.now_us)
        self.future_rows += future
        return future > 0

    def _batches(self, snapshot: Snapshot, file: DataFile) -> Iterator[pa.Table]:
        schema = stored_schema(self.view)
        types = {one.name: one.type for one in schema if one.name != BUCKET}
        window = self.options.window
        for rows in snapshot.batches(file, list(types), types):
            if window is not None:
                event = whole_numbers(rows[self.view.timestamp])
                rows = rows.filter(pa.array((event >= window[0]) & (event <= window[1])))
            if form_of(self.view) == EVENTS and not self.view.event_id:
                rows = self._in_reach(rows)
            if rows.num_rows:
                yield rows

    def _in_reach(self, rows: pa.Table) -> pa.Table:
        """Events that a window reaches, and the last one of each entity, by which it is known."""
        from mlfuncs_featurestore.stream_windows import SLACK_US, longest_window

        event = whole_numbers(rows[self.view.timestamp])
        recent = event > self.now_us - longest_window(self.view) - SLACK_US
        changes = np.ones(rows.num_rows, bool)  # files are sorted by entity and event time
        changes[:-1] = False
        for name in self.view.keys:
            column = rows[name].combine_chunks()
            differs = pc.not_equal(column.slice(0, len(column) - 1), column.slice(1))
            changes[:-1] |= differs.to_numpy(zero_copy_only=False)
        return rows.filter(pa.array(recent | changes))
