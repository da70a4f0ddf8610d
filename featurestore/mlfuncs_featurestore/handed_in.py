"""Joining to tables that were never ingested: those handed in with the call, and sources of views without a table.

Owns: `read_handed_in`. Such a table goes through everything that `ingest` does (transform, checks, layout) into a
warehouse that lives as long as the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import NotFound
from mlfuncs_featurestore.ingest import ingest_into
from mlfuncs_featurestore.offline import OfflineStore, Snapshot
from mlfuncs_featurestore.references import Selection

if TYPE_CHECKING:
    from mlfuncs_featurestore.store import FeatureStore


@contextlib.contextmanager
def read_handed_in(
    store: FeatureStore, selection: Selection, tables: Mapping[str, Any]
) -> Iterator[dict[str, Snapshot]]:
    """Snapshots to read instead of the stored tables, by view, for the length of a `with` block.

    `tables` are what was handed in, by view. A view that nothing was ingested into, and whose source is Parquet or
    Delta, is read from that source. Raises NotFound for a view that is not asked for, InvalidInput for rows that do not
    fit.
    """
    unknown = set(tables) - set(selection.stored)
    if unknown:
        raise NotFound("view in tables", sorted(unknown)[0], selection.stored)
    sources = {name: tables[name] if name in tables else _source(store, selection, name) for name in selection.stored}
    sources = {name: source for name, source in sources.items() if source is not None}
    if not sources:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mlfuncs-join-") as folder:
        offline = OfflineStore(dataclasses.replace(store.settings, warehouse_url=folder))
        for name, source in sources.items():
            ingest_into(offline, store.catalog, selection.views[name], source)
        yield {name: offline.snapshot(name) for name in sources}


def _source(store: FeatureStore, selection: Selection, name: str) -> str | None:
    source = selection.views[name].source
    if source is None or source.kind == "redis-stream" or store.offline.snapshot(name).version >= 0:
        return None
    return str(source)
