"""Verification: what is online compared with what the point-in-time join says, entity by entity, cell by cell.

Owns: `verify` and the comparison of two sets of feature columns, which the skew check shares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.offline import Snapshot
from mlfuncs_featurestore.quality import oldest_scalar
from mlfuncs_featurestore.rows import moment_us

if TYPE_CHECKING:
    import datetime

    from mlfuncs_featurestore.store import FeatureStore

CHUNK = 20_000  # entities compared at a time
LISTED = 1000  # differences kept in a report; all are counted


@dataclass(frozen=True)
class Difference:
    """One cell that differs: of which entity, when, and what each side says."""

    entity: Mapping[str, Any]
    at_us: int
    feature: str
    online: Any
    offline: Any
    online_status: str
    offline_status: str

    def __str__(self) -> str:
        keys = ", ".join(f"{name}={value!r}" for name, value in self.entity.items())
        return (
            f"{self.feature} of {keys}: online {self.online!r} ({self.online_status}), "
            f"offline {self.offline!r} ({self.offline_status})"
        )


@dataclass(frozen=True)
class Comparison:
    """How many entities and cells were compared, how many cells differ, and the first LISTED of those.

    `late` cells differ only by rows that arrived after they were served; they are no fault, and not in `different`.
    """

    entities: int
    cells: int
    different: int
    differences: tuple[Difference, ...]
    late: int = 0
    late_differences: tuple[Difference, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether both sides say the same everywhere."""
        return self.different == 0

    def __str__(self) -> str:
        head = f"{self.different} of {self.cells} cells of {self.entities} entities differ"
        head += f", {self.late} more by rows that arrived later" if self.late else ""
        late = [f"late: {one}" for one in self.late_differences[:20]]
        return "\n  ".join([head, *map(str, self.differences[:20]), *late])


def verify(
    store: FeatureStore, view: str, *, features: Sequence[str] = (), now: datetime.datetime | None = None
) -> Comparison:
    """Compare what is online for every entity of `view` with the offline join at the same moment.

    `features` are names of the view's features (default: all but deprecated ones). Pushed rows that wait are committed
    first. Equal means the same bits and the same status.
    """
    from mlfuncs_featurestore.push import flush

    flush(store, view)
    definition = store.catalog.view(view)
    names = list(features) or [name for name in definition.features if name not in definition.deprecated]
    references = [f"{view}:{name}" for name in names]
    at_us = time.time_ns() // 1000 if now is None else moment_us("now", now)
    total = Comparison(0, 0, 0, ())
    for keys in distinct_entities(definition, store.offline.snapshot(view)):
        spine = keys.append_column("__at", pa.repeat(oldest_scalar(at_us), keys.num_rows))
        total = add(total, compare(store, references, spine, list(keys.column_names), now_us=at_us))
    return total


def distinct_entities(view: FeatureView, snapshot: Snapshot) -> Iterator[pa.Table]:
    """Every entity in the view's table once, in tables of CHUNK rows; a bucket at a time in memory."""
    schema = {name: kind.stored_arrow for name, kind in _key_types(view).items()}
    for bucket in sorted({file.bucket for file in snapshot.files}):
        parts = [
            rows.group_by(list(schema)).aggregate([])
            for file in snapshot.files
            if file.bucket == bucket
            for rows in snapshot.batches(file, list(schema), schema)
        ]
        found = pa.concat_tables(parts).group_by(list(schema)).aggregate([]).select(list(schema))
        for start in range(0, found.num_rows, CHUNK):
            yield found.slice(start, CHUNK)


def _key_types(view: FeatureView) -> dict[str, Any]:
    from mlfuncs_featurestore.quality import stored_type

    return {name: stored_type(view, name) for name in view.keys}


def compare(
    store: FeatureStore, references: Sequence[str], spine: pa.Table, keys: Sequence[str], *, now_us: int
) -> Comparison:
    """Online values of the spine's entities at `now_us` against the join of the spine, whose time column is `__at`."""
    import datetime

    moment = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(microseconds=now_us)
    entities = spine.drop(["__at"]).to_pydict()
    online = store.get_online_features(list(references), entities, full_feature_names=True, now=moment)
    offline = store.get_historical_features(
        spine, list(references), timestamp="__at", full_feature_names=True, status=True
    ).features
    served = {name: (column, online.statuses[name]) for name, column in _feature_columns(online).items()}
    return differences(spine, keys, served, offline)


def _feature_columns(online: Any) -> dict[str, pa.Array]:
    table = online.to_arrow()
    return {name: table[name].combine_chunks() for name in online.names}


def differences(
    spine: pa.Table,
    keys: Sequence[str],
    served: Mapping[str, tuple[pa.Array, Sequence[str]]],
    offline: pa.Table,
    arrived: Callable[[], pa.Table] | None = None,
) -> Comparison:
    """Compare served columns with offline ones (which have a `<name>__status` beside), row by row of the spine.

    `arrived` gives the offline columns without the rows that arrived after serving: who is equal to those is late.
    """
    unequal = {name: _unequal_cells(served[name], offline, name) for name in served}
    late = {name: np.zeros(spine.num_rows, bool) for name in served}
    if arrived is not None and any(mask.any() for mask in unequal.values()):
        known = arrived()
        late = {name: mask & ~_unequal_cells(served[name], known, name) for name, mask in unequal.items()}
    found: list[Difference] = []
    later: list[Difference] = []
    for name, (column, statuses) in served.items():
        theirs, their_statuses = offline[name].combine_chunks(), offline[f"{name}__status"].combine_chunks()
        for places, listed in ((unequal[name] & ~late[name], found), (late[name], later)):
            for place in np.flatnonzero(places).tolist()[: max(0, LISTED - len(listed))]:
                entity = {key: spine[key][place].as_py() for key in keys}
                at_us = spine["__at"][place].cast(pa.int64()).as_py()
                mine, other = column[place].as_py(), theirs[place].as_py()
                status = their_statuses[place].as_py()
                listed.append(Difference(entity, at_us, name, mine, other, statuses[place], status))
    counts = [sum(int(mask.sum()) for mask in masks.values()) for masks in (unequal, late)]
    cells = spine.num_rows * len(served)
    return Comparison(spine.num_rows, cells, counts[0] - counts[1], tuple(found), counts[1], tuple(later))


def _unequal_cells(served: tuple[pa.Array, Sequence[str]], offline: pa.Table, name: str) -> np.ndarray:
    """Which rows differ, in value or in status."""
    unequal = _unequal(served[0], offline[name].combine_chunks())
    return unequal | (np.array(served[1], object) != np.array(offline[f"{name}__status"].to_pylist(), object))


def _unequal(left: pa.Array, right: pa.Array) -> np.ndarray:
    """Where two columns differ: nulls equal nulls, NaN equals NaN, and 0.0 is not -0.0."""
    if left.equals(right) and not pa.types.is_floating(left.type):
        return np.zeros(len(left), bool)
    if pa.types.is_floating(left.type) and left.type == right.type:
        width = np.int64 if left.type.bit_width == 64 else np.int32
        gone = [array.is_null().to_numpy(zero_copy_only=False) for array in (left, right)]
        plain = [array.fill_null(0.0).to_numpy(zero_copy_only=False) for array in (left, right)]
        bits = [np.ascontiguousarray(values).view(width) for values in plain]
        both_nan = np.isnan(plain[0]) & np.isnan(plain[1])
        return (gone[0] != gone[1]) | ((bits[0] != bits[1]) & ~both_nan)
    pairs = zip(left.to_pylist(), right.to_pylist(), strict=True)
    return np.array([not _same(mine, theirs) for mine, theirs in pairs], bool)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (left != left and right != right)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)


def add(one: Comparison, other: Comparison) -> Comparison:
    """Two comparisons as one."""
    return Comparison(
        one.entities + other.entities,
        one.cells + other.cells,
        one.different + other.different,
        (*one.differences, *other.differences)[:LISTED],
        one.late + other.late,
        (*one.late_differences, *other.late_differences)[:LISTED],
    )
