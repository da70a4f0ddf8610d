"""The offline store: one Delta table per view, laid out for the point-in-time join.

Owns: where tables are, their schema, snapshots and time travel, reading, compaction, vacuum, history.

Layout: partitioned by `__bucket` (hash of the entity modulo the view's buckets), sorted by entity and event time inside
a file, no dictionary on float columns. `__ingest` is the order of ingest (int64, ever growing; the last tie-break);
`__deleted` marks a delete in views with an `event_id`. Times are microseconds UTC.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlfuncs.errors import Conflict, NotFound, StorageError
from mlfuncs.settings import Settings
from mlfuncs_featurestore import delta_tables as delta
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.hashing import hash_entities
from mlfuncs_featurestore.quality import REASON, stored_type
from mlfuncs_featurestore.rows import to_us

if TYPE_CHECKING:
    from deltalake import DeltaTable

BUCKET, INGEST, DELETED = delta.BUCKET, "__ingest", "__deleted"
COMPACT_ROWS = 4_000_000  # rows of one compacted file
ABOUT = "mlfuncs.about"


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a table. `low` and `high` are extremes of integer and time (microseconds) columns."""

    path: str
    bucket: int
    rows: int
    size: int
    low: Mapping[str, int]
    high: Mapping[str, int]


@dataclass(frozen=True)
class Snapshot:
    """A view's table at one version: the files that hold its rows, in the order of their paths."""

    view: str
    uri: str
    version: int
    files: tuple[DataFile, ...]

    @property
    def rows(self) -> int:
        """Rows in the table."""
        return sum(file.rows for file in self.files)

    def read(self, file: DataFile, columns: Sequence[str], types: Mapping[str, pa.DataType]) -> pa.Table:
        """`columns` of one file as `types` say; a column that the file is too old to have is null."""
        return pa.concat_tables(self.batches(file, columns, types))

    def batches(self, file: DataFile, columns: Sequence[str], types: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        """Like `read`, one row group at a time."""
        with delta.filesystem(self.uri).open_input_file(file.path) as source:
            reader = pq.ParquetFile(source)
            for group in range(reader.num_row_groups):
                yield _typed(reader, [group], columns, types)

    def read_rows(
        self, file: DataFile, columns: Sequence[str], types: Mapping[str, pa.DataType], rows: np.ndarray
    ) -> pa.Table:
        """The `rows` (ascending row numbers) of one file; row groups with none of them are not decoded."""
        with delta.filesystem(self.uri).open_input_file(file.path) as source:
            reader = pq.ParquetFile(source)
            sizes = [reader.metadata.row_group(group).num_rows for group in range(reader.num_row_groups)]
            bounds = np.cumsum([0, *sizes])
            parts = []
            for group in range(reader.num_row_groups):
                low, high = np.searchsorted(rows, bounds[group : group + 2])
                if low < high:
                    chosen = pa.array(rows[low:high] - bounds[group])
                    parts.append(_typed(reader, [group], columns, types).take(chosen))
        return pa.concat_tables(parts)


def _typed(
    reader: pq.ParquetFile, groups: list[int], columns: Sequence[str], types: Mapping[str, pa.DataType]
) -> pa.Table:
    have = set(reader.schema_arrow.names)
    rows = reader.read_row_groups(groups, [name for name in columns if name in have], use_threads=False)
    count = sum(reader.metadata.row_group(group).num_rows for group in groups)
    arrays = [
        rows[name].cast(types[name]) if name in have else pa.chunked_array([pa.nulls(count, types[name])])
        for name in columns
    ]
    return pa.table(arrays, names=list(columns))


class OfflineStore:
    """The project's offline tables under the warehouse URL."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def _base(self) -> str:
        return delta.table_uri(self.settings.resolved_warehouse_url, self.settings.project)

    def uri(self, view: str) -> str:
        """The address of the view's Delta table, for any engine that reads Delta."""
        return delta.table_uri(self._base, view)

    def quarantine_uri(self, view: str) -> str:
        """The address of the table of rows kept aside."""
        return delta.table_uri(self._base, "_quarantine", view)

    def snapshot(self, view: str, version: int | None = None, at: str | None = None) -> Snapshot:
        """The table now, at `version`, or as it was at the ISO time `at`; no table yet is version -1 with no files.

        Raises NotFound for a version that is not there.
        """
        table = delta.open_delta(self.uri(view), version, at)
        if table is None:
            if (version is not None and version >= 0) or at is not None:
                raise NotFound("offline table", view, hint="(nothing was ingested yet)")
            return Snapshot(view, self.uri(view), -1, ())
        return Snapshot(view, self.uri(view), table.version(), data_files(table))

    def read(self, view: FeatureView | str, snapshot: Snapshot | None = None) -> Iterator[pa.Table]:
        """All rows, a file at a time, with the view's columns and `__ingest` (and `__deleted`)."""
        view = self._view(view)
        snapshot = self.snapshot(view.name) if snapshot is None else snapshot
        types = stored_schema(view)
        columns = [name for name in types.names if name != BUCKET]
        for file in snapshot.files:
            yield snapshot.read(file, columns, {name: types.field(name).type for name in columns})

    def changes(self, view: str, since: int) -> tuple[int, list[DataFile]]:
        """The newest version, and the files whose rows were committed after version `since` (-1: all of them).

        By commit, not by time: a late event is in it. Compaction commits no rows. When the log no longer reaches back
        to `since`, or vacuum took one of the files, all files of the newest version are returned.
        """
        snapshot = self.snapshot(view)
        if since < 0 or since >= snapshot.version:
            return snapshot.version, list(snapshot.files) if since < 0 else []
        added = delta.added_since(snapshot.uri, since, snapshot.version)
        return snapshot.version, list(snapshot.files) if added is None else [_added_file(one) for one in added]

    def history(self, view: str) -> list[dict[str, Any]]:
        """The commits, newest first: version, timestamp_ms, operation, rows, quarantined, statistics, digest."""
        table = delta.open_delta(self.uri(view))
        if table is None:
            return []
        newest, entries = table.version(), table.history()
        return [_commit_entry(newest - index, entry) for index, entry in enumerate(entries)]

    def statistics(self, view: str, version: int | None = None) -> dict[str, Any]:
        """Per feature, the statistics of the newest ingest at or before `version`. Raises NotFound."""
        for entry in self.history(view):
            if entry["statistics"] and (version is None or entry["version"] <= version):
                return entry["statistics"]
        raise NotFound("statistics of view", view, hint="(nothing was ingested yet)")

    def quarantined(self, view: str) -> pa.Table:
        """The rows kept aside, with `__reason`, the `__ingest_id` of their batch and when."""
        table = delta.open_delta(self.quarantine_uri(view))
        if table is None:
            return pa.table({REASON: pa.array([], pa.string())})
        committed = pa.array([entry["ingest_id"] for entry in self.history(view)], pa.string())
        rows = pa.table(table.to_pyarrow_table()).drop([BUCKET])
        return rows.filter(pc.is_in(rows["__ingest_id"], committed))

    def compact(self, view: FeatureView | str, bucket_files: int = 2) -> int:
        """Merge the files of every bucket that has `bucket_files` or more; returns how many files were merged.

        Readers and writers go on meanwhile; each merged file, of about COMPACT_ROWS rows at most, is one commit. Files
        that another process rewrote first are left as that process left them.
        """
        view = self._view(view)
        snapshot, merged = self.snapshot(view.name), 0
        for bucket in sorted({file.bucket for file in snapshot.files}):
            files = [one for one in snapshot.files if one.bucket == bucket and one.rows < COMPACT_ROWS]
            if len(files) >= max(bucket_files, 2):
                merged += sum(self._merge(view, snapshot, bucket, group) for group in _groups(files) if len(group) > 1)
        return merged

    def vacuum(self, view: str, retention_hours: int = 24 * 30, dry_run: bool = False) -> list[str]:
        """Delete files that no version newer than `retention_hours` needs; returns their paths.

        Training sets that read older versions can then no longer be rebuilt. Files of running ingests are safe while
        `retention_hours` is longer than an ingest takes.
        """
        table = delta.open_delta(self.uri(view))
        if table is None:
            return []
        return table.vacuum(retention_hours, dry_run=dry_run, enforce_retention_duration=False, full=True)

    def _view(self, view: FeatureView | str) -> FeatureView:
        from mlfuncs_featurestore.catalog import Catalog

        return Catalog(self.settings).view(view) if isinstance(view, str) else view

    def _merge(self, view: FeatureView, snapshot: Snapshot, bucket: int, files: list[DataFile]) -> int:
        from deltalake.transaction import AddAction

        schema = stored_schema(view)
        columns = [name for name in schema.names if name != BUCKET]
        types = {name: schema.field(name).type for name in columns}
        rows = pa.concat_tables([snapshot.read(file, columns, types) for file in files])
        rows = rows.take(sort_order(view, rows))
        adds = [delta.write_file(snapshot.uri, rows, bucket, data_change=False)]
        removes = [AddAction(file.path, file.size, {BUCKET: str(bucket)}, 0, False, "") for file in files]
        about = {ABOUT: json.dumps({"operation": "compact", "rows": rows.num_rows})}
        try:
            delta.commit(snapshot.uri, delta.Commit(adds, removes, about, written=schema))
        except (Conflict, StorageError):
            delta.delete_files(snapshot.uri, adds)
            return 0
        return len(files)


def _groups(files: Sequence[DataFile]) -> list[list[DataFile]]:
    """The files in groups that have COMPACT_ROWS together, or just reach it: what is merged in memory at a time."""
    groups: list[list[DataFile]] = [[]]
    for file in files:
        if sum(one.rows for one in groups[-1]) >= COMPACT_ROWS:
            groups.append([])
        groups[-1].append(file)
    return groups


def stored_schema(view: FeatureView) -> pa.Schema:
    """The Arrow schema of the view's table: its columns, the system columns, the bucket."""
    columns = [pa.field(name, stored_type(view, name).stored_arrow) for name in view.columns]
    deleted = [pa.field(DELETED, pa.bool_())] if view.event_id else []
    return pa.schema([*columns, *deleted, pa.field(INGEST, pa.int64()), pa.field(BUCKET, pa.int32())])


def bucket_of(view: FeatureView, rows: pa.Table) -> np.ndarray:
    """The bucket of each row, from its canonical key columns."""
    hashes = hash_entities(rows[name].combine_chunks() for name in view.keys)
    return (hashes % np.uint64(view.buckets)).astype(np.int32)


def sort_order(view: FeatureView, rows: pa.Table) -> pa.Array:
    """The order of rows inside a file: entity, event time, ingest."""
    keys = [(name, "ascending") for name in (*view.keys, view.timestamp, INGEST)]
    return pc.sort_indices(rows, sort_keys=keys)


def data_files(table: DeltaTable) -> tuple[DataFile, ...]:
    """The files of an open table, by path."""
    actions = pa.table(table.get_add_actions(flatten=True)).sort_by("path")
    return tuple(_data_file(row) for row in actions.to_pylist())


def _data_file(row: Mapping[str, Any]) -> DataFile:
    def extremes(end: str) -> dict[str, int]:
        found = {name.removeprefix(end): value for name, value in row.items() if name.startswith(end)}
        return {name: to_us(value) for name, value in found.items() if isinstance(value, (int, datetime.datetime))}

    bucket = row[f"partition.{BUCKET}"]
    return DataFile(row["path"], bucket, row["num_records"], row["size_bytes"], extremes("min."), extremes("max."))


def _added_file(action: Mapping[str, Any]) -> DataFile:
    """A file from its entry in the log's JSON."""
    about = json.loads(action["stats"])

    def numbers(extremes: Mapping[str, Any]) -> dict[str, int]:
        return {
            name: value if isinstance(value, int) else to_us(datetime.datetime.fromisoformat(value))
            for name, value in extremes.items()
        }

    low, high = numbers(about["minValues"]), numbers(about["maxValues"])
    bucket = int(action["partitionValues"][BUCKET])
    return DataFile(action["path"], bucket, about["numRecords"], action["size"], low, high)


def _commit_entry(version: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    about = json.loads(entry.get(ABOUT) or "{}")
    blank = {"operation": entry.get("operation", ""), "rows": 0, "quarantined": 0, "statistics": {}, "digest": ""}
    stamped = {"version": version, "timestamp_ms": entry["timestamp"], "ingest_id": entry.get(delta.COMMIT_KEY, "")}
    return {**blank, **about, **stamped}
