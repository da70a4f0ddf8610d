"""`get_historical_features`: the point-in-time join over any number of views, on threads or on Dask.

Owns: splitting the work by view and bucket, running it on an engine, and putting the result together.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mlfuncs.errors import MissingExtra, NotFound, SpecError
from mlfuncs_featurestore import asof_kernels
from mlfuncs_featurestore.asof import (
    NOT_FOUND,
    NULL,
    PRESENT,
    STATUSES,
    BucketJoin,
    BucketResult,
    bucket_files,
    join_bucket,
)
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.handed_in import read_handed_in
from mlfuncs_featurestore.kernels import compiling
from mlfuncs_featurestore.lineage import note_versions
from mlfuncs_featurestore.offline import Snapshot
from mlfuncs_featurestore.pandas_columns import pandas_column, pandas_frame
from mlfuncs_featurestore.references import Selection, select, split_reference
from mlfuncs_featurestore.spine import Spine
from mlfuncs_featurestore.tables import cast_column, say_once

if TYPE_CHECKING:
    import pandas
    import polars

    from mlfuncs_featurestore.store import FeatureStore
    from mlfuncs_featurestore.training import TrainingRecord

ENGINES = ("local", "dask")


@dataclass(frozen=True)
class HistoryOptions:
    """How to join.

    `full_feature_names`: name every column view__feature. `status`: add a column <name>__status beside each feature
    (PRESENT, NULL, NOT_FOUND, EXPIRED). `use_created`: a value counts from its created time on. `timestamp`: the
    spine's time column. `versions`: the table version to read, by view (default: the newest). `tables`: a table to
    read instead of what was ingested, by view (`handed_in`). `engine`: "local" threads or "dask" (the active cluster,
    else its own threads). `workers`: local threads (default: one a core).
    """

    full_feature_names: bool = False
    status: bool = False
    use_created: bool = True
    timestamp: str | None = None
    versions: Mapping[str, int] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "local"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise SpecError(f"engine is one of {', '.join(ENGINES)}, not {self.engine!r}")


@dataclass(frozen=True)
class HistoricalFeatures:
    """The spine with its features, row for row. `to_pandas`, `to_arrow`, `to_polars`; `record` rebuilds it."""

    spine: Spine
    features: pa.Table
    selection: Selection = field(repr=False)
    snapshots: Mapping[str, Snapshot] = field(repr=False)
    options: HistoryOptions = field(repr=False)
    store: FeatureStore = field(repr=False)

    def to_arrow(self) -> pa.Table:
        """The spine's columns as they came, then the features."""
        table = self.spine.table
        for name in self.features.column_names:
            table = table.append_column(name, self.features[name])
        return table

    def to_polars(self) -> polars.DataFrame:
        """As a polars frame."""
        import polars as pl

        return pl.DataFrame(self.to_arrow())

    def to_pandas(self) -> pandas.DataFrame:
        """As a pandas frame; a spine that was one keeps its columns and index.

        Integers and booleans with nulls are Int64 and boolean (no digit is lost); a float column has NaN for null,
        unless it has both, and then is double[pyarrow]; lists are lists and structs dicts of Python values, vectors
        numpy arrays.
        """
        base = pandas_frame(self.spine.table) if self.spine.frame is None else self.spine.frame.copy(deep=False)
        for name in self.features.column_names:
            base[name] = pandas_column(self.features[name].combine_chunks(), base.index)
        return base

    @cached_property
    def record(self) -> TrainingRecord:
        """What `store.rebuild` needs to make this training set again; asking for it stores the spine."""
        from mlfuncs_featurestore.training import make_record

        return make_record(self)

    def __repr__(self) -> str:
        return f"<features {', '.join(self.features.column_names)} of {self.features.num_rows} rows>"


def get_historical_features(
    store: FeatureStore, spine: Any, features: str | Sequence[Any], **options: Any
) -> HistoricalFeatures:
    """The spine's rows, in their order, each with the features as they were known at its time.

    `spine` is a pandas, polars or Arrow table, a Parquet path, SQL on DuckDB or a DuckDB relation, with the views' key
    columns and a time column; `features` are references, views or services (`references.select`); options are those
    of HistoryOptions. `asof` says what "known at its time" means. Raises NotFound for an unknown feature or a missing
    key column, InvalidInput for a spine that does not fit.
    """
    known = set(HistoryOptions.__dataclass_fields__)
    if set(options) - known:
        odd = sorted(set(options) - known)[0]
        raise SpecError(f"get_historical_features has no option {odd!r}; it has {', '.join(sorted(known))}")
    selection = select(store.catalog, features)
    for view, feature in selection.wanted:
        if view in selection.views and feature in selection.views[view].deprecated:
            say_once(f"feature '{view}:{feature}' is deprecated")
    chosen = HistoryOptions(**options)
    with read_handed_in(store, selection, chosen.tables) as given:
        result = join(store, spine, selection, chosen, given)
    stored = {name: snapshot for name, snapshot in result.snapshots.items() if name not in given}
    note_versions({name: snapshot.version for name, snapshot in stored.items()})
    return result


def join(
    store: FeatureStore,
    spine: Any,
    selection: Selection,
    options: HistoryOptions,
    given: Mapping[str, Snapshot] | None = None,
    arrived_us: int | None = None,
) -> HistoricalFeatures:
    """The join of a resolved selection.

    `given`: snapshots to read, by view; else those of the options' versions. `arrived_us`: rows that were ingested or
    pushed after that moment do not count.
    """
    rows = Spine.read(spine, options.timestamp)
    unknown = set(options.versions) - set(selection.views)
    if unknown:
        raise NotFound("view in versions", sorted(unknown)[0], selection.views)
    names = selection.names(options.full_feature_names, rows.table.column_names)
    snapshots = {
        name: given[name] if given and name in given else store.offline.snapshot(name, options.versions.get(name))
        for name in selection.stored
    }
    views = {name: dataclasses.replace(view, transform=None) for name, view in selection.views.items()}
    columns: dict[tuple[str, str], pa.Array] = {}
    statuses: dict[tuple[str, str], np.ndarray] = {}
    for name, wanted in selection.stored.items():
        found, status = _join_view(rows, views[name], snapshots[name], wanted, options, arrived_us)
        columns.update({(name, feature): array for feature, array in found.items()})
        statuses.update({(name, feature): status for feature in wanted})
    _add_on_demand(store, rows, selection, columns, statuses)
    result: dict[str, Any] = {}
    for pair in selection.wanted:
        result[names[pair]] = columns[pair]
        if options.status:
            result[f"{names[pair]}__status"] = _status_column(columns[pair], statuses[pair])
    table = pa.table(result) if result else pa.table({})
    return HistoricalFeatures(rows, table, selection, snapshots, options, store)


def _join_view(
    spine: Spine,
    view: FeatureView,
    snapshot: Snapshot,
    wanted: tuple[str, ...],
    options: HistoryOptions,
    arrived_us: int | None,
) -> tuple[dict[str, pa.Array], np.ndarray]:
    """The view's columns for all spine rows, in spine order, and the status of each row."""
    keys, buckets, rows = spine.entities(view)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(view.buckets + 1))
    files = bucket_files(snapshot)
    works = []
    for bucket in range(view.buckets):
        chosen = order[bounds[bucket] : bounds[bucket + 1]]
        if len(chosen) and bucket in files:
            part = dataclasses.replace(snapshot, files=files[bucket])
            mine = rows[chosen]
            taken = keys.take(pa.array(chosen))
            aware = options.use_created
            works.append(BucketJoin(view, part, wanted, aware, taken, spine.at_us[mine], mine, arrived_us))
    with compiling(asof_kernels.group_events):
        results = _run(works, options)
    status = np.full(spine.table.num_rows, NOT_FOUND, np.uint8)
    for result in results:
        status[result.rows] = result.status
    types = {feature: view.features[feature].arrow for feature in wanted}
    size = spine.table.num_rows
    return {name: gather(results, name, types[name], size) for name in wanted}, status


def gather(results: Sequence[BucketResult], name: str, kind: pa.DataType, size: int) -> pa.Array:
    """One column of all buckets in spine order; rows of no bucket are null."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_timestamp(kind):
        is_time = pa.types.is_timestamp(kind)
        values = np.zeros(size, np.int64 if is_time else kind.to_pandas_dtype())
        missing = np.ones(size, bool)
        for result in results:
            part = result.columns[name]
            part = part.cast(pa.int64()) if is_time else part
            values[result.rows] = part.fill_null(0).to_numpy(zero_copy_only=False) if part.null_count else _plain(part)
            missing[result.rows] = part.is_null().to_numpy(zero_copy_only=False) if part.null_count else False
        return pa.array(values, mask=missing if missing.any() else None, from_pandas=False).cast(kind)
    place = np.full(size, -1, np.int64)
    start = 0
    for result in results:
        place[result.rows] = np.arange(start, start + len(result.rows))
        start += len(result.rows)
    parts = [result.columns[name] for result in results]
    whole = pa.chunked_array(parts, parts[0].type if parts else kind).combine_chunks()
    array = whole.take(pa.array(place, mask=place < 0))
    return array.combine_chunks().cast(kind) if isinstance(array, pa.ChunkedArray) else array.cast(kind)


def _plain(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)


def _run(works: Sequence[BucketJoin], options: HistoryOptions) -> list[BucketResult]:
    if options.engine == "dask":
        return _run_dask(works)
    workers = options.workers or os.cpu_count() or 1
    if workers == 1 or len(works) < 2:
        return [join_bucket(work) for work in works]
    with ThreadPoolExecutor(workers) as pool:  # kernels and Parquet decoding release the interpreter's lock
        return list(pool.map(join_bucket, works))


def _run_dask(works: Sequence[BucketJoin]) -> list[BucketResult]:
    try:
        import dask
    except ImportError as exc:
        raise MissingExtra("engine='dask'", "dask") from exc
    run: Callable[..., Any] = dask.delayed(join_bucket, pure=False)
    return list(dask.compute(*(run(work) for work in works)))


def _add_on_demand(
    store: FeatureStore,
    spine: Spine,
    selection: Selection,
    columns: dict[tuple[str, str], pa.Array],
    statuses: dict[tuple[str, str], np.ndarray],
) -> None:
    from mlfuncs_featurestore.derived import evaluate

    for name in dict.fromkeys(view for view, _ in selection.wanted if view in selection.on_demand):
        view = selection.on_demand[name]
        inputs = {feature: columns[source, feature] for source, feature in map(split_reference, view.sources)}
        for column, kind in view.request.items():
            if column not in spine.table.column_names:
                hint = f"(on-demand view {name!r} takes it from the request)"
                raise NotFound("spine column", column, spine.table.column_names, hint=hint)
            inputs[column] = cast_column(column, spine.table[column], kind)
        for feature, array in evaluate(view, store.catalog.code(view), inputs).items():
            columns[name, feature] = array
            statuses[name, feature] = np.full(len(array), PRESENT, np.uint8)


def _status_column(column: pa.Array, status: np.ndarray) -> pa.Array:
    missing = column.is_null().to_numpy(zero_copy_only=False)
    codes = np.where((status == PRESENT) & missing, NULL, status).astype(np.int8)
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(STATUSES)).dictionary_decode()
