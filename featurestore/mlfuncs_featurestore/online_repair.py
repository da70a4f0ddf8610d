"""Online values of events made whole again from the offline table.

Owns: `made_whole`, for the values of one read that have lost what they would need (see `stream_windows`), and
`lower_horizons`, after a materialize that went through all history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from mlfuncs.errors import StorageError, Unavailable
from mlfuncs_featurestore.asof import Entities
from mlfuncs_featurestore.keys import decode_key
from mlfuncs_featurestore.offline import BUCKET, Snapshot, bucket_of, stored_schema
from mlfuncs_featurestore.online_plan import ViewRead
from mlfuncs_featurestore.online_rows import entity_keys, pack_table, read_stamps
from mlfuncs_featurestore.online_write import TRIES
from mlfuncs_featurestore.quality import stored_type
from mlfuncs_featurestore.stream_windows import (
    MAX_EVENTS,
    NEVER,
    STATE,
    EntityEvents,
    new_header,
    read_value,
    to_record,
)

if TYPE_CHECKING:
    from mlfuncs_featurestore.definitions import FeatureView
    from mlfuncs_featurestore.store import FeatureStore


def made_whole(
    store: FeatureStore, read: ViewRead, keys: Sequence[bytes], values: Sequence[bytes | None], at_us: int
) -> list[bytes | None]:
    """`values` with those that are doubtful at `at_us` built anew from the offline table, here and in Redis.

    Raises Unavailable when the table cannot be read.
    """
    if all(value is None or STATE.unpack_from(value)[1] == NEVER for value in values):
        return list(values)
    doubtful = np.flatnonzero(EntityEvents(read.view, read.codec, values).doubtful(at_us)).tolist()
    if not doubtful:
        return list(values)
    entities = list(dict.fromkeys(read.keys.entity(keys[place]) for place in doubtful))
    try:
        history = _records(store, read, entities)
    except (StorageError, OSError) as exc:
        raise Unavailable(
            f"{len(entities)} entities of view {read.view.name!r} had more deletes or corrections than events are kept "
            f"online, and the offline table cannot be read to make them whole: {exc}; run `mlfuncs features "
            f"materialize {read.view.name} --backfill` where it can"
        ) from exc
    whole = list(values)
    for place in doubtful:
        whole[place] = _rebuild(store, read, keys[place], history.get(read.keys.entity(keys[place]), []), at_us)
    return whole


def _rebuild(store: FeatureStore, read: ViewRead, key: bytes, records: list[bytes], at_us: int) -> bytes | None:
    """The value at `key` from all its history and what Redis has beside it; stored unless others keep writing."""
    built: bytes | None = None
    for _ in range(TRIES):
        seen = store.online.rows.read([key])[0]
        if seen is None:
            return None
        rows = [to_record(row) for row in read_value(seen)[1]]
        built = new_header() + b"".join([*records, *rows])
        built = EntityEvents(read.view, read.codec, [built]).compacted(0, at_us)
        if store.online.rows.swap(key, seen, built):
            break
    return built


def _records(store: FeatureStore, read: ViewRead, entities: Sequence[bytes]) -> dict[bytes, list[bytes]]:
    """All offline rows of the entities as records, by entity key; pushed rows that wait are committed first."""
    from mlfuncs_featurestore.push import flush

    flush(store, read.view.name)
    snapshot = store.offline.snapshot(read.view.name)
    keys = _key_table(read.view, entities)
    found: dict[bytes, list[bytes]] = {}
    for rows in _rows_of(read.view, snapshot, keys):
        packed = pack_table(read.codec, rows, read_stamps(read.view, rows))
        for entity, row in zip(entity_keys(read.view, rows), packed, strict=True):
            found.setdefault(entity, []).append(to_record(row))
    return found


def _key_table(view: FeatureView, entities: Sequence[bytes]) -> pa.Table:
    decoded = [decode_key(entity, view.keys) for entity in entities]
    schema = pa.schema([(name, stored_type(view, name).stored_arrow) for name in view.keys])
    return pa.Table.from_pylist(decoded, schema)


def _rows_of(view: FeatureView, snapshot: Snapshot, keys: pa.Table) -> list[pa.Table]:
    schema = stored_schema(view)
    types = {one.name: one.type for one in schema if one.name != BUCKET}
    buckets, wanted = set(bucket_of(view, keys).tolist()), Entities(keys)
    parts = []
    for file in snapshot.files:
        if file.bucket in buckets:
            for rows in snapshot.batches(file, list(types), types):
                chosen = np.flatnonzero(wanted.find(rows, list(view.keys)) >= 0)
                parts.append(rows.take(pa.array(chosen)))
    return parts


def lower_horizons(store: FeatureStore, read: ViewRead, keys: Sequence[bytes], complete_us: int) -> None:
    """Note in the values at `keys` that they have all events after `complete_us`, as a run through all history wrote.

    A value that is at its bound keeps its horizon: events were dropped from it since.
    """
    for key, value in zip(keys, store.online.rows.read(keys), strict=True):
        for _ in range(TRIES):
            if value is None or STATE.unpack_from(value)[1] <= complete_us or len(read_value(value)[1]) >= MAX_EVENTS:
                break
            _, _, size = STATE.unpack_from(value)
            if store.online.rows.swap(key, value, new_header(complete_us, size) + value[STATE.size :]):
                break
            value = store.online.rows.read([key])[0]
