"""`materialize`: the online store brought up to the offline tables' last commit.

Owns: how far each view is online, and the way from Delta files to Redis. Incremental by commit, never by event time: a
late row is in the next commit and so in the next run. What was reached is noted in Redis itself, beside the rows, file
by file: a run that was interrupted goes on where it stopped, and a Redis that lost its data starts from nothing. Every
write may be repeated (newest wins, events count once), so runs may overlap.

Rows of the future (more than `online_write.FUTURE_US` ahead) stay offline where only the newest row is kept;
their files are remembered and looked at again by the next run. Those a little ahead are sent and wait online (`ahead`).
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs.errors import SpecError
from mlfuncs.progress import Progress, progress
from mlfuncs_featurestore import delta_tables as delta
from mlfuncs_featurestore.checkpoints import reached
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.durations import parse_duration
from mlfuncs_featurestore.offline import BUCKET, DataFile, Snapshot, stored_schema
from mlfuncs_featurestore.online_plan import EVENTS, form_of
from mlfuncs_featurestore.online_rows import entity_keys, whole_numbers
from mlfuncs_featurestore.online_write import FUTURE_US
from mlfuncs_featurestore.redis_keys import document_key
from mlfuncs_featurestore.rows import moment_us
from mlfuncs_featurestore.stream_windows import SLACK_US, longest_window

if TYPE_CHECKING:
    from mlfuncs_featurestore.store import FeatureStore


LATEST_US = 2**63 - 1


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
    [start, end], from all commits; how far the view is online does not change. `window`, a length like "7d": only the
    rows that a window of that length reaches now, likewise. `now`: the clock, for tests and replays. `progress`: show
    a bar.
    """

    backfill: bool = False
    start: datetime.datetime | None = None
    end: datetime.datetime | None = None
    window: str | datetime.timedelta | None = None
    now: datetime.datetime | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.window is not None:
            parse_duration(self.window, "window")
            if self.start is not None or self.end is not None:
                raise SpecError("give either window or start and end, not both")
        if (
            self.start is not None
            and self.end is not None
            and moment_us("start", self.start) > moment_us("end", self.end)
        ):
            raise SpecError(f"start {self.start} is after end {self.end}; swap them")

    @cached_property
    def now_us(self) -> int:
        """The clock in microseconds."""
        return time.time_ns() // 1000 if self.now is None else moment_us("now", self.now)

    @property
    def span(self) -> tuple[int, int] | None:
        """The event times to take, in microseconds, both inclusive; None for all."""
        if self.window is not None:
            return self.now_us - parse_duration(self.window) + 1, LATEST_US
        if self.start is None and self.end is None:
            return None
        low = -LATEST_US if self.start is None else moment_us("start", self.start)
        return low, LATEST_US if self.end is None else moment_us("end", self.end)


@dataclass
class Cursor:
    """How far a view is online: all commits up to `version` of table `table`, and the files in `done` after it.

    `reach_us` is how far back its longest window went.
    """

    table: str = ""
    form: str = ""
    version: int = -1
    reach_us: int = 0
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
        self.read = store.online.read_of(view, ())  # raises SpecError when it is not online
        self.now_us, self.span = options.now_us, options.span
        self.reach_us = longest_window(view)
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
        since, waiting = cursor.version, list[str]()
        todo = [file for file in [*old, *files] if file.path not in cursor.done and self._is_in_span(file)]
        label, total = f"Materializing {name}", sum(file.rows for file in todo)
        with progress(label, total, enabled=self.options.progress) as bar:
            for file in todo:
                if self._send(snapshot, file, bar):
                    waiting.append(file.path)
                reached("materialize:file")
                cursor.done.append(file.path)
                self._note(cursor)
        if since < 0:
            self._note_complete(snapshot)
        self.store.online.rows.link.settle()
        reached("materialize:sent")
        self._note(Cursor(identity, form_of(self.view), version, self.reach_us, [], waiting))
        return ViewMaterialized(name, self.rows, since, version, self.files, self.future_rows)

    def _cursor(self, identity: str) -> Cursor:
        """Where to start: from nothing when asked to, when the table or the form online is another one, or when a
        window reaches further back than those before did."""
        fresh = Cursor(identity, form_of(self.view), reach_us=self.reach_us)
        if self.options.backfill or self.span is not None:
            return fresh
        cursor = read_cursor(self.store, self.view.name)
        same = (cursor.table, cursor.form) == (fresh.table, fresh.form) and cursor.reach_us >= self.reach_us
        return cursor if same else fresh

    def _note(self, cursor: Cursor) -> None:
        if self.span is None:
            key = document_key(self.store.settings.project, "materialized", self.view.name)
            text = json.dumps(cursor.__dict__)
            link = self.store.online.rows.link
            link.run(lambda: link.client.set(key, text))

    def _is_in_span(self, file: DataFile) -> bool:
        time_column = self.view.timestamp
        low, high = file.low.get(time_column, -LATEST_US), file.high.get(time_column, LATEST_US)
        return self.span is None or (high >= self.span[0] and low <= self.span[1])

    def _note_complete(self, snapshot: Snapshot) -> None:
        """Every commit was gone through: values of events have all from some moment on, whatever they lacked before."""
        if form_of(self.view) != EVENTS or (self.span is not None and self.span[1] < self.now_us):
            return
        from mlfuncs_featurestore.online_repair import lower_horizons
        from mlfuncs_featurestore.verify import distinct_entities

        complete_us = self._oldest_us if self.span is None else max(self._oldest_us, self.span[0] - 1)
        for keys in distinct_entities(self.view, snapshot):
            for start in range(0, keys.num_rows, 1000):
                entities = entity_keys(self.view, keys.slice(start, 1000))
                lower_horizons(self.store, self.read, self.read.keys.of(entities), complete_us)

    @property
    def _oldest_us(self) -> int:
        """No window reaches events up to this time."""
        return self.now_us - self.reach_us - SLACK_US

    def _waiting(self, cursor: Cursor) -> list[DataFile]:
        """The files of earlier runs that had rows of the future; one that was merged away has its rows in another."""
        if not cursor.waiting:
            return []
        there = {file.path: file for file in self.store.offline.snapshot(self.view.name).files}
        gone = [path for path in cursor.waiting if path not in there]
        if gone:  # compacted meanwhile: look at everything
            return list(there.values())
        return [there[path] for path in cursor.waiting]

    def _send(self, snapshot: Snapshot, file: DataFile, bar: Progress) -> bool:
        """Send one file, a row group at a time; whether it has rows of the future."""
        self.files += 1
        future = 0
        left_out_us = self._oldest_us if self._leaves_out else None
        for rows, count in self._batches(snapshot, file):
            if rows.num_rows:
                later = int((whole_numbers(rows[self.view.timestamp]) > self.now_us + FUTURE_US).sum())
                future += later if form_of(self.view) != EVENTS else 0
                self.rows += self.store.online.write(self.view, rows, self.now_us, left_out_us)
            bar.advance(count)
        self.future_rows += future
        return future > 0

    @property
    def _leaves_out(self) -> bool:
        """Whether events that no window reaches stay offline; a correction may need any of them."""
        return form_of(self.view) == EVENTS and not self.view.event_id

    def _batches(self, snapshot: Snapshot, file: DataFile) -> Iterator[tuple[pa.Table, int]]:
        """The rows to send of each row group, and how many it has."""
        schema = stored_schema(self.view)
        types = {one.name: one.type for one in schema if one.name != BUCKET}
        for whole in snapshot.batches(file, list(types), types):
            rows = whole
            if self.span is not None:
                event = whole_numbers(rows[self.view.timestamp])
                rows = rows.filter(pa.array((event >= self.span[0]) & (event <= self.span[1])))
            yield self._in_reach(rows) if self._leaves_out else rows, whole.num_rows

    def _in_reach(self, rows: pa.Table) -> pa.Table:
        """Events that a window reaches or will reach, and the last one of each entity by now, by which it is known."""
        if not rows.num_rows:
            return rows
        event = whole_numbers(rows[self.view.timestamp])
        recent = event > self._oldest_us
        changes = np.ones(rows.num_rows, bool)  # files are sorted by entity and event time
        changes[:-1] = False
        for name in self.view.keys:
            column = rows[name].combine_chunks()
            differs = pc.not_equal(column.slice(0, len(column) - 1), column.slice(1))
            changes[:-1] |= differs.to_numpy(zero_copy_only=False)
        changes[:-1] |= (event[:-1] <= self.now_us) & (event[1:] > self.now_us)  # what follows is of the future
        return rows.filter(pa.array(recent | changes))
