"""Training sets that can be made again: what was read, by which definitions, for which spine.

Owns: TrainingRecord, saved spines, `rebuild`.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mlfuncs.errors import Conflict, NotFound, SpecError, StorageError
from mlfuncs_featurestore import delta_tables as delta
from mlfuncs_featurestore.definitions import FeatureView, OnDemandView
from mlfuncs_featurestore.offline import Snapshot
from mlfuncs_featurestore.references import Selection
from mlfuncs_featurestore.spine import table_digest

if TYPE_CHECKING:
    from mlfuncs_featurestore.history import HistoricalFeatures
    from mlfuncs_featurestore.store import FeatureStore


@dataclass(frozen=True)
class TrainingRecord:
    """A training set as what it was made of. `result_digest` is that of the feature columns."""

    features: tuple[tuple[str, str], ...]
    versions: Mapping[str, int]  # table version read, by view
    views: Mapping[str, Any]  # definitions as they were
    on_demand: Mapping[str, Any]
    options: Mapping[str, Any]
    spine_digest: str
    result_digest: str
    created_at: str  # ISO time, UTC

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal record back."""
        return dataclasses.asdict(self) | {"features": [list(pair) for pair in self.features]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecord:
        """The record that `to_dict` wrote."""
        unknown = set(values) ^ {one.name for one in dataclasses.fields(cls)}
        if unknown:
            raise SpecError(f"this is not a training record: {', '.join(sorted(unknown))} do not match")
        return cls(**{**values, "features": tuple((view, feature) for view, feature in values["features"])})

    @property
    def definition_digests(self) -> dict[str, str]:
        """The digest of each definition, by name."""
        views = {name: FeatureView.from_dict(body).digest for name, body in self.views.items()}
        return views | {name: OnDemandView.from_dict(body).digest for name, body in self.on_demand.items()}


def make_record(result: HistoricalFeatures) -> TrainingRecord:
    """The record of a training set; its spine is stored in the warehouse under its digest."""
    selection, options = result.selection, result.options
    for name, snapshot in result.snapshots.items():
        if snapshot.uri != result.store.offline.uri(name):
            raise SpecError(
                f"this training set read a table of {name!r} that was never ingested; ingest it to record it"
            )
    used = {view for view, _ in selection.wanted if view in selection.on_demand}
    digest = result.spine.digest
    _save_spine(result.store, digest, result.spine.table)
    return TrainingRecord(
        features=selection.wanted,
        versions={name: snapshot.version for name, snapshot in result.snapshots.items()},
        views={name: selection.views[name].to_dict() for name in result.snapshots},
        on_demand={name: selection.on_demand[name].to_dict() for name in used},
        options={name: getattr(options, name) for name in ("full_feature_names", "status", "use_created")}
        | {"timestamp": result.spine.timestamp},
        spine_digest=digest,
        result_digest=table_digest(result.features),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(),
    )


def rebuild(store: FeatureStore, record: TrainingRecord | Mapping[str, Any], spine: Any = None) -> HistoricalFeatures:
    """The training set of `record` again, from the table versions it read and the definitions of its day.

    Raises NotFound when a version or the spine is gone (vacuumed, or never here), Conflict when the spine given is
    another one or the result is not bit for bit the one recorded.
    """
    from mlfuncs_featurestore.history import HistoryOptions, join

    made = record if isinstance(record, TrainingRecord) else TrainingRecord.from_dict(record)
    table = _load_spine(store, made.spine_digest) if spine is None else spine
    views = {name: FeatureView.from_dict(body) for name, body in made.views.items()}
    on_demand = {name: OnDemandView.from_dict(body) for name, body in made.on_demand.items()}
    versions = {name: version for name, version in made.versions.items() if version >= 0}
    options = HistoryOptions(**made.options, versions=versions)
    empty = {
        name: Snapshot(name, store.offline.uri(name), -1, ()) for name, version in made.versions.items() if version < 0
    }
    try:
        result = join(store, table, Selection(made.features, views, on_demand), options, empty)
    except OSError as exc:
        raise NotFound("data file of the recorded version", str(exc), hint="(it was vacuumed)") from exc
    if result.spine.digest != made.spine_digest:
        raise Conflict(f"this spine is not the recorded one (digest {made.spine_digest[:12]}...)")
    if table_digest(result.features) != made.result_digest:
        raise Conflict("the rebuilt training set differs from the recorded one; its tables were changed from outside")
    return result


def _spine_uri(store: FeatureStore) -> str:
    return delta.table_uri(store.settings.resolved_warehouse_url, store.settings.project, "_spines")


def _save_spine(store: FeatureStore, digest: str, table: pa.Table) -> None:
    uri, path = _spine_uri(store), f"{digest}.arrow"
    if delta.is_local(uri):
        os.makedirs(uri, exist_ok=True)
    files = delta.filesystem(uri)
    if files.get_file_info(path).size:
        return
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, table.schema) as writer:
        writer.write_table(table)
    # an object store shows an object whole or not at all; a file system shows one under way
    temporary = f"{digest}.{uuid.uuid4().hex}.part" if delta.is_local(uri) else path
    try:
        delta.write_bytes(uri, temporary, content.getvalue())
        if temporary != path:
            files.move(temporary, path)
    except OSError as exc:
        raise StorageError(f"the spine cannot be stored in {uri}: {exc}") from exc


def _load_spine(store: FeatureStore, digest: str) -> pa.Table:
    files = delta.filesystem(_spine_uri(store))
    if not files.get_file_info(f"{digest}.arrow").size:
        raise NotFound("stored spine", digest[:12], hint="(hand it in: rebuild(record, spine))")
    with files.open_input_file(f"{digest}.arrow") as source:
        return pa.ipc.open_file(source).read_all()
