"""Skew: whether served vectors are those that training would have seen.

Owns: the log of sampled served vectors, and the check that replays it through the point-in-time join at the moments of
serving. The log is a folder (home/features/<project>/.served) where Redis is the home's own, and a stream in Redis
where the settings name one: containers and other machines, into whose homes nobody looks, have that in common.

A difference is a fault; a row that arrived after it was asked for, with an event time before, is not: training sees
such a row, serving could not. Those are told apart by the place of rows in the order of ingest, which is a clock, and
counted as late.
"""

from __future__ import annotations

import logging
import os
import random
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from mlfuncs.errors import MlfuncsError
from mlfuncs.settings import ensure_home
from mlfuncs_featurestore.history import HistoryOptions, join
from mlfuncs_featurestore.online_result import OnlineFeatures
from mlfuncs_featurestore.push import flush_waiting
from mlfuncs_featurestore.pushlog_records import framed, read_records, unframed
from mlfuncs_featurestore.quality import oldest_scalar
from mlfuncs_featurestore.redis_keys import document_key
from mlfuncs_featurestore.references import select
from mlfuncs_featurestore.rows import to_us
from mlfuncs_featurestore.verify import Comparison, add, differences

if TYPE_CHECKING:
    import datetime

    from mlfuncs_featurestore.store import FeatureStore

log = logging.getLogger("mlfuncs.features")
SEGMENT_BYTES = 64 * 2**20
SEGMENTS = 16  # the oldest are dropped: a log that nobody checks stays at 1 GiB
ENTRIES = 20_000  # of the stream in Redis, about; one of 20 features takes 2 KiB
PAGE = 500


@dataclass(frozen=True)
class Served:
    """One logged answer: the references asked for, when, and its rows: entities, values, `<name>__status`."""

    references: dict[str, str]
    at_us: int
    rows: pa.Table


def sample(store: FeatureStore, found: OnlineFeatures, rate: float, draw: float | None = None) -> bool:
    """Log `found` with probability `rate` (`draw` in [0, 1) instead of chance); whether it was logged.

    What cannot be kept is said in the process's own log: it is no reason to refuse an answer.
    """
    if found.fell_back or not len(found) or (random.random() if draw is None else draw) >= rate:
        return False
    try:
        table = found.to_arrow()  # may refuse what callers sent beside keys
        for name, statuses in found.statuses.items():
            table = table.append_column(f"{name}__status", pa.array(statuses, pa.string()))
        _keep(store, framed({"at_us": found.at_us, "references": found.references}, [table]))
    except (OSError, MlfuncsError) as exc:
        log.warning("a served vector could not be kept for the skew check: %s", exc)
        return False
    return True


def _keep(store: FeatureStore, record: bytes) -> None:
    if not store.settings.redis_url:
        with open(_segment(store), "ab", buffering=0) as file:
            file.write(record)  # one write to a file of this process's own
        return
    link, packed = store.online.rows.link, zlib.compress(record, 1)
    link.run(lambda: link.client.xadd(_stream(store), {b"record": packed}, maxlen=ENTRIES, approximate=True))


def check_skew(
    store: FeatureStore, *, since: datetime.datetime | None = None, until: datetime.datetime | None = None
) -> Comparison:
    """Replay the vectors served in [since, until] through the join and compare every cell, value and status.

    Differences that only rows explain which arrived after serving are counted apart, as late.
    """
    low = -(2**63) if since is None else to_us(since)
    high = 2**63 - 1 if until is None else to_us(until)
    total = Comparison(0, 0, 0, ())
    flush_waiting(store)
    for served in read_served(store):
        if low <= served.at_us <= high:
            total = add(total, _replay(store, served))
    return total


def read_served(store: FeatureStore) -> Iterator[Served]:
    """Every logged answer, a file at a time, then those in Redis a page at a time."""
    for path in sorted(_folder(store).glob("*.log")):
        for head, tables, _ in read_records(path):
            yield Served(head["references"], head["at_us"], tables[0])
    link, after = store.online.rows.link, "-"
    while True:
        entries = link.run(lambda after=after: link.client.xrange(_stream(store), after, count=PAGE))  # type: ignore[misc]
        if not entries:
            return
        for _, fields in entries:
            head, tables = unframed(zlib.decompress(fields[b"record"]))
            yield Served(head["references"], head["at_us"], tables[0])
        after = f"({entries[-1][0].decode()}"


def forget_served(store: FeatureStore) -> None:
    """Empty the log."""
    for path in _folder(store).glob("*.log"):
        path.unlink(missing_ok=True)
    link = store.online.rows.link
    link.run(lambda: link.client.delete(_stream(store)))


def _replay(store: FeatureStore, served: Served) -> Comparison:
    names = list(served.references)
    statuses = [f"{name}__status" for name in names]
    given = [name for name in served.rows.column_names if name not in (*names, *statuses)]
    spine = served.rows.select(given)
    spine = spine.append_column("__at", pa.repeat(oldest_scalar(served.at_us), spine.num_rows))
    selection = select(store.catalog, list(served.references.values()))
    options = HistoryOptions(timestamp="__at", full_feature_names=True, status=True)

    def joined(arrived_us: int | None) -> pa.Table:
        found = join(store, spine, selection, options, arrived_us=arrived_us).features
        theirs: dict[str, Any] = {}
        for name, reference in served.references.items():
            full = reference.replace(":", "__")
            theirs[name], theirs[f"{name}__status"] = found[full], found[f"{full}__status"]
        return pa.table(theirs)

    columns = {name: (served.rows[name].combine_chunks(), served.rows[f"{name}__status"].to_pylist()) for name in names}
    return differences(spine, given, columns, joined(None), lambda: joined(served.at_us))


def _stream(store: FeatureStore) -> str:
    return document_key(store.settings.project, "served", "vectors")


def _folder(store: FeatureStore) -> Path:
    return store.settings.home / "features" / store.settings.project / ".served"


def _segment(store: FeatureStore) -> Path:
    """This process's own file; a full one is left and the oldest files are dropped."""
    kept: tuple[int, Path] | None = store.__dict__.get("_served_segment")
    if kept is not None and kept[0] == os.getpid() and kept[1].exists() and kept[1].stat().st_size < SEGMENT_BYTES:
        return kept[1]
    ensure_home(store.settings)
    folder = _folder(store)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for path in files[: max(0, len(files) + 1 - SEGMENTS)]:
        path.unlink(missing_ok=True)
    path = folder / f"{uuid.uuid4().hex}.log"
    store.__dict__["_served_segment"] = (os.getpid(), path)
    return path
