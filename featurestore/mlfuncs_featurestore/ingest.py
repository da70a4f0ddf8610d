"""The way into an offline table: checks, order, layout, one atomic commit.

Owns: `ingest`. Batches are checked and written one after another in bounded memory; they become visible together, in
one commit, or not at all.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs.errors import Conflict, SpecError
from mlfuncs_featurestore import delta_tables as delta
from mlfuncs_featurestore import quality
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.offline import ABOUT, BUCKET, DELETED, INGEST, bucket_of, sort_order, stored_schema
from mlfuncs_featurestore.profile import Profile
from mlfuncs_featurestore.rows import moment_us
from mlfuncs_featurestore.tables import BATCH_ROWS, read_tables, say_once

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from mlfuncs_featurestore.catalog import Catalog
    from mlfuncs_featurestore.offline import OfflineStore
    from mlfuncs_featurestore.store import FeatureStore

BATCH_BYTES = 256 * 2**20  # measured: a larger batch is no faster
FUTURE = ("warn", "reject", "quarantine", "accept")


@dataclass(frozen=True)
class IngestOptions:
    """How to ingest.

    `future`: what happens to events later than now ("warn", "reject", "quarantine", "accept"). `now`: the clock, for
    tests and replays. `deleted`: the rows are deletes of the events they identify (views with an `event_id`).
    `transaction` ("app", number): ingest once, however often it is asked for. `batch_rows`: rows checked and written
    at a time. `progress`: show a bar; `total_rows` gives it an end.
    """

    future: str = "warn"
    now: datetime.datetime | None = None
    deleted: bool = False
    transaction: tuple[str, int] | None = None
    batch_rows: int = BATCH_ROWS
    progress: bool = False
    total_rows: int | None = None

    def __post_init__(self) -> None:
        if self.future not in FUTURE:
            raise SpecError(f"future is one of {', '.join(FUTURE)}, not {self.future!r}")
        if self.batch_rows < 1:
            raise SpecError(f"batch_rows must be 1 or more, not {self.batch_rows!r}")

    @property
    def now_us(self) -> int:
        """The clock in microseconds."""
        return moment_us("now", self.now) if self.now is not None else time.time_ns() // 1000


@dataclass(frozen=True)
class IngestReport:
    """What one ingest did: the table `version` it made, counts of rows, warnings, statistics per feature."""

    view: str
    version: int
    rows: int
    quarantined: int
    warnings: tuple[str, ...]
    statistics: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        aside = f", {self.quarantined} quarantined" if self.quarantined else ""
        lines = [f"{self.view}: {self.rows} rows in version {self.version}{aside}", *self.warnings]
        return "\n  ".join(lines)


def ingest(store: FeatureStore, view: str, rows: Any = None, **options: Any) -> IngestReport:
    """Append `rows` to the table of `view`; see FeatureStore.ingest and IngestOptions."""
    unknown = set(options) - set(IngestOptions.__dataclass_fields__)
    if unknown:
        known = ", ".join(IngestOptions.__dataclass_fields__)
        raise SpecError(f"ingest has no option {sorted(unknown)[0]!r}; it has {known}")
    chosen = IngestOptions(**options)
    definition = store.catalog.view(view)
    if rows is None:
        if definition.source is None or definition.source.kind == "redis-stream":
            raise SpecError(
                f"view {view!r} has no source with a table to read; hand in the rows: ingest({view!r}, table), or "
                f"`mlfuncs features ingest {view} FILE`"
            )
        rows = str(definition.source)
    if chosen.deleted and definition.event_id is None:
        raise SpecError(f"view {view!r} has no event_id, so a delete cannot say which event it means")
    from mlfuncs_featurestore.push import flush

    flush(store, view)
    return _Ingest(store.offline, definition, chosen).run(_tables(store.catalog, definition, rows, chosen))


def ingest_into(offline: OfflineStore, catalog: Catalog, view: FeatureView, rows: Any) -> IngestReport:
    """`rows` into the view's table of another offline store than the project's, which nothing waits for."""
    chosen = IngestOptions(future="accept")
    return _Ingest(offline, view, chosen).run(_tables(catalog, view, rows, chosen))


def _tables(catalog: Catalog, view: FeatureView, rows: Any, options: IngestOptions) -> Iterator[pa.Table]:
    """The rows as tables, through the view's transform if it has one."""
    tables = read_tables(rows, options.batch_rows)
    if view.transform is None and not view.transform_bundle:
        return tables
    return _transformed(tables, catalog.code(view))


def _transformed(tables: Iterator[pa.Table], transform: Any) -> Iterator[pa.Table]:
    from mlfuncs_featurestore.derived import apply_transform

    for table in tables:
        yield from read_tables(apply_transform(transform, table))


class _Ingest:
    """One ingest under way: what was written, what is set aside, what was said."""

    def __init__(self, offline: OfflineStore, view: FeatureView, options: IngestOptions) -> None:
        self.offline, self.view, self.options = offline, view, options
        self.uri = offline.uri(view.name)
        self.id = uuid.uuid4().hex
        self.adds: list[Any] = []
        self.aside: list[pa.Table] = []
        self.warnings: dict[str, None] = {}
        self.rows = 0
        self.profile = Profile(list(view.fields))

    def run(self, tables: Iterator[pa.Table]) -> IngestReport:
        """Write every batch and commit once. On failure before the commit nothing stays."""
        from mlfuncs.progress import progress

        now_us, begun = self.options.now_us, False
        try:
            with progress(f"Ingesting {self.view.name}", self.options.total_rows, enabled=self.options.progress) as bar:
                table = None
                for batch in self._batches(tables, now_us):
                    if table is None:
                        table = prepare_table(self.uri, self.view)
                        next_number = first_number(table)
                    next_number = self._write(batch, next_number)
                    bar.advance(batch.num_rows)
            if table is None:
                prepare_table(self.uri, self.view)
            self._keep_aside(now_us)
            begun = True
            version = self._commit() if self._has_something else self.offline.snapshot(self.view.name).version
        except BaseException:
            if not begun:
                delta.delete_files(self.uri, self.adds)
            raise
        for warning in self.warnings:
            say_once(warning)
        aside = sum(one.num_rows for one in self.aside)
        return IngestReport(self.view.name, version, self.rows, aside, tuple(self.warnings), self.profile.to_dict())

    @property
    def _has_something(self) -> bool:
        """Whether there is anything to commit; statistics of no rows would hide those of the last ones."""
        return bool(self.adds or self.aside or self.options.transaction)

    def _batches(self, tables: Iterator[pa.Table], now_us: int) -> Iterator[pa.Table]:
        """Checked rows in batches of about `batch_rows`, so that many small tables do not become many small files."""
        waiting: list[pa.Table] = []
        for table in tables:
            checked = quality.check(self.view, self._conform(table, now_us), now_us, self.options.future)
            self.warnings.update(dict.fromkeys(checked.warnings))
            self.aside += [checked.aside] if checked.aside.num_rows else []
            waiting += [checked.kept] if checked.kept.num_rows else []
            rows, size = sum(one.num_rows for one in waiting), sum(one.nbytes for one in waiting)
            if rows >= self.options.batch_rows or size >= BATCH_BYTES:
                yield pa.concat_tables(waiting)
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting)

    def _conform(self, table: pa.Table, now_us: int) -> pa.Table:
        view = self.view
        if self.options.deleted:  # a delete says which event and when; its values do not count
            absent = [name for name in view.fields if name != view.event_id and name not in table.column_names]
            for name in absent:
                table = table.append_column(name, pa.nulls(table.num_rows, view.fields[name].stored_arrow))
        return quality.conform(view, table, now_us)

    def _write(self, rows: pa.Table, number: int) -> int:
        """Write one batch as a sorted file per bucket; returns the next ingest number."""
        self.rows += rows.num_rows
        self.profile.add(rows)
        numbers = np.arange(number, number + rows.num_rows, dtype=np.int64)
        if self.view.event_id:
            rows = rows.append_column(DELETED, pa.repeat(pa.scalar(self.options.deleted), rows.num_rows))
        rows = rows.append_column(INGEST, pa.array(numbers))
        buckets = bucket_of(self.view, rows)
        order = np.argsort(buckets, kind="stable")
        bounds = np.searchsorted(buckets[order], np.arange(self.view.buckets + 1))
        for bucket in range(self.view.buckets):
            chosen = order[bounds[bucket] : bounds[bucket + 1]]
            if len(chosen):
                part = rows.take(pa.array(chosen))
                self.adds.append(delta.write_file(self.uri, part.take(sort_order(self.view, part)), bucket))
        return number + rows.num_rows

    def _keep_aside(self, now_us: int) -> None:
        """Store the quarantined rows, marked with this ingest's id: they count once its commit is in the log."""
        if not self.aside:
            return
        rows = pa.concat_tables(self.aside)
        stamped = rows.append_column("__ingest_id", pa.repeat(pa.scalar(self.id), rows.num_rows))
        when = pa.repeat(quality.oldest_scalar(now_us), rows.num_rows)
        stamped = stamped.append_column("__quarantined_at", when)
        uri = self.offline.quarantine_uri(self.view.name)
        delta.ensure_table(uri, pa.schema([*stamped.schema, pa.field(BUCKET, pa.int32())]))
        delta.commit(uri, delta.Commit([delta.write_file(uri, stamped, 0)]))

    def _commit(self) -> int:
        about = {
            "operation": "ingest",
            "rows": self.rows,
            "quarantined": sum(one.num_rows for one in self.aside),
            "statistics": self.profile.to_dict(),
            "digest": self.view.digest,
        }
        change = delta.Commit(
            self.adds,
            about={ABOUT: json.dumps(about)},
            transaction=self.options.transaction,
            written=stored_schema(self.view),
            id=self.id,
        )
        return delta.commit(self.uri, change)


def first_number(table: DeltaTable) -> int:
    """Where this ingest's order starts: the clock in nanoseconds, but after everything that is stored."""
    actions = pa.table(table.get_add_actions(flatten=True))
    stored = pc.max(actions[f"max.{INGEST}"]).as_py() if f"max.{INGEST}" in actions.column_names else None
    return max(time.time_ns(), (stored or 0) + 1)


def prepare_table(uri: str, view: FeatureView) -> DeltaTable:
    """The view's table, made, given new columns, and rewritten when a field was widened.

    Raises Conflict when what is stored is wider than the definition says.
    """
    wanted = stored_schema(view)
    table = delta.ensure_table(uri, wanted)
    have = delta.arrow_schema(table)
    if all(have.field(one.name).type.equals(one.type) for one in wanted):
        return table
    widen(uri, view, have)
    reopened = delta.open_delta(uri)
    assert reopened is not None
    return reopened


def widen(uri: str, view: FeatureView, have: pa.Schema) -> None:
    """Rewrite the table's files with the view's wider types, in one commit; older versions stay readable."""
    from deltalake.transaction import AddAction

    from mlfuncs_featurestore.offline import Snapshot, data_files

    wanted = stored_schema(view)
    extra = [one for one in have if one.name not in wanted.names]
    schema = pa.schema([*(one for one in wanted if one.name != BUCKET), *extra, wanted.field(BUCKET)])
    types = {one.name: one.type for one in schema if one.name != BUCKET}
    for _ in range(delta.ATTEMPTS):
        table = delta.open_delta(uri)
        assert table is not None
        if all(delta.arrow_schema(table).field(one.name).type.equals(one.type) for one in wanted):
            return
        snapshot = Snapshot(view.name, uri, table.version(), data_files(table))
        adds: list[AddAction] = []
        for file in snapshot.files:
            try:
                rows = snapshot.read(file, list(types), types)
            except pa.ArrowInvalid as exc:
                delta.delete_files(uri, adds)
                raise Conflict(f"view {view.name!r} is narrower than what is stored: {exc}; widen its fields") from exc
            adds.append(delta.write_file(uri, rows, file.bucket, data_change=False))
        about = {ABOUT: json.dumps({"operation": "widen", "rows": snapshot.rows})}
        if delta.replace_all(uri, snapshot.version, delta.Commit(adds, about=about, schema=schema)):
            return
        delta.delete_files(uri, adds)
    raise Conflict(f"view {view.name!r} cannot be widened while others write to it; stop them and ingest again")
