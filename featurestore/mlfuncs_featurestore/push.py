"""`push`: rows readable online at once and durable offline; both or neither.

Owns: push, and flush, which commits logged pushes to the Delta table in batches.

The steps of a push: check the rows; see that Redis answers; log the rows durably; write them online; note that in the
log; return. A crash or fault before the log leaves nothing. One after it leaves a pending push, which was not
acknowledged, and which the next flush completes: it writes the rows online again (a repeated write changes nothing) and
then commits them. While Redis is away a pending push stays out of the table too, so that it is nowhere or in both.

A flush is one commit. What it is about to commit is noted first, under the commit's id; the next flush after a crash
looks for that id in the table's log, so that nothing is committed twice. It runs

- in a push, when the log is over FLUSH_BYTES, at every FLUSH_PUSHES-th push, or when a row waits FLUSH_AGE_S seconds;
- before an ingest into the view, and before every read of history in this home (`get_historical_features`,
  `materialize`, `verify`, `check_skew`): those see every acknowledged push;
- when the store is closed, and when asked for (`store.flush()`, `mlfuncs features flush`);
- every FLUSH_AGE_S seconds in `mlfuncs features serve` and `mlfuncs features consume --follow` (`flusher`).

Between these, rows wait in the log of the home that took the push: durable, online, and not yet in the table.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mlfuncs.errors import InvalidInput, NotFound, SpecError, Unavailable
from mlfuncs_featurestore import delta_tables as delta
from mlfuncs_featurestore import quality
from mlfuncs_featurestore.checkpoints import reached
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.ingest import prepare_table
from mlfuncs_featurestore.offline import ABOUT, BUCKET, DELETED, bucket_of, sort_order, stored_schema
from mlfuncs_featurestore.profile import Profile
from mlfuncs_featurestore.pushlog import Push, PushLog
from mlfuncs_featurestore.rows import moment_us
from mlfuncs_featurestore.tables import as_table, say_once

if TYPE_CHECKING:
    import datetime

    from mlfuncs_featurestore.store import FeatureStore

FLUSH_BYTES = 8 * 2**20  # a log of this size is committed by the push that made it so
FLUSH_PUSHES = 512
FLUSH_AGE_S = 60.0


@dataclass(frozen=True)
class PushReport:
    """What one push did. `repeated`: its id was known, so nothing was done again."""

    view: str
    push_id: str
    rows: int
    quarantined: int = 0
    warnings: tuple[str, ...] = ()
    repeated: bool = False


def push(
    store: FeatureStore,
    view: str,
    rows: Any,
    *,
    push_id: str | None = None,
    deleted: bool = False,
    future: str = "warn",
    now: datetime.datetime | None = None,
    aliases: Sequence[str] = (),
) -> PushReport:
    """Make `rows` readable online at once and durable offline, both or neither.

    `rows` are any table, or one row as a dict of values; a view's transform is applied to them, as by `ingest`.
    `push_id`: a push with an id that was pushed already does nothing, so a push that failed half-way may be repeated.
    `deleted`: the rows delete the events they identify (views with an `event_id`). `future`, `now`: as for ingest.
    `aliases`: other ids by which the rows are known, as `stream` gives its entries' ids.
    Raises InvalidInput for rows that do not fit, Unavailable when Redis is away.
    """
    definition = store.catalog.view(view)
    if not definition.online:
        raise SpecError(f"view {view!r} is not online; apply it with online=True, or ingest the rows")
    if deleted and definition.event_id is None:
        raise SpecError(f"view {view!r} has no event_id, so a delete cannot say which event it means")
    if push_id is not None and (not push_id or len(push_id) > 200 or not push_id.isprintable()):
        raise InvalidInput(f"push_id must be 1 to 200 printable characters, not {push_id!r}")
    at_us = time.time_ns() // 1000 if now is None else moment_us("now", now)
    checked = check_rows(store, definition, rows, deleted=deleted, at_us=at_us, future=future)
    online = store.online
    online.rows.read([b"mlfuncs"])  # better now than between the two writes
    reached("push:checked")
    log = log_of(store, view)
    logged = log.append([push_id or uuid.uuid4().hex, *aliases], at_us, checked.kept, checked.aside)
    if logged is None:
        assert push_id is not None
        _complete(store, definition, push_id)
        return PushReport(view, push_id, 0, repeated=True)
    try:
        online.write(definition, logged.rows, at_us)
        online.rows.link.settle()
    except Unavailable as exc:
        raise Unavailable(
            f"push {logged.push_id!r} to {view!r} is logged but not acknowledged: {exc}. It is completed when Redis "
            "answers; pushing again with this push_id is safe",
            exc.retry_after_s,
        ) from exc
    reached("push:online")
    log.mark_online(logged)
    for warning in checked.warnings:
        say_once(warning)
    is_old = time.time_ns() - log.waits_since_ns > FLUSH_AGE_S * 1e9
    if is_old or log.size > FLUSH_BYTES or logged.number % FLUSH_PUSHES == 0:
        flush(store, view)
    return PushReport(view, logged.push_id, logged.rows.num_rows, checked.aside.num_rows, checked.warnings)


def check_rows(
    store: FeatureStore, view: FeatureView, rows: Any, *, deleted: bool, at_us: int, future: str
) -> quality.Checked:
    """The rows, transformed, conformed and held to the view's expectations, `__deleted` beside where views have it."""
    if isinstance(rows, dict) and any(
        isinstance(one, (str, bytes)) or not hasattr(one, "__len__") for one in rows.values()
    ):
        rows = [rows]  # one row: a column of values has a length
    table = as_table(rows)
    if (view.transform is not None or view.transform_bundle) and not deleted:
        from mlfuncs_featurestore.derived import apply_transform

        table = as_table(apply_transform(store.catalog.code(view), table))
    if deleted:
        for name in view.fields:
            if name != view.event_id and name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows, view.fields[name].stored_arrow))
    checked = quality.check(view, quality.conform(view, table, at_us), at_us, future)
    if not view.event_id:
        return checked
    flags = pa.repeat(pa.scalar(deleted), checked.kept.num_rows)
    return quality.Checked(checked.kept.append_column(DELETED, flags), checked.aside, checked.warnings)


def log_of(store: FeatureStore, view: str) -> PushLog:
    """The view's push log, one object per store: it remembers what it has read."""
    logs = store.__dict__.setdefault("_push_logs", {})
    if view not in logs:
        logs[view] = PushLog(store.settings, view)
    log: PushLog = logs[view]
    return log


def flush(store: FeatureStore, view: str | None = None) -> dict[str, int]:
    """Commit what waits in the push logs of this home; rows committed per view. See the module's text."""
    folder = store.settings.home / "features" / store.settings.project
    names = [view] if view is not None else sorted(one.name for one in folder.glob("[!.]*") if one.is_dir())
    return {name: _flush_view(store, name) for name in names}


def flush_waiting(store: FeatureStore) -> None:
    """Flush before history is read; costs a look at one folder when nothing waits."""
    folder = store.settings.home / "features" / store.settings.project
    for one in folder.glob("[!.]*") if folder.is_dir() else ():
        with contextlib.suppress(NotFound):  # the view was deleted: its rows wait in case it comes back
            flush(store, one.name)


def _flush_view(store: FeatureStore, name: str) -> int:
    log = log_of(store, name)
    if not log.size:
        return 0
    view = store.catalog.view(name)
    with log.locked():
        if (intent := log.intent) is not None:
            uri = store.offline.uri(name)
            log.settle(delta.find_commit(uri, intent["commit"], intent["after"]) is not None)
        waiting = log.pushes()
        if not waiting:
            return 0
        done = [push for push in waiting if push.is_online or _put_online(store, view, push)]
        kept = [push for push in waiting if push not in done]
        if done:
            commit_pushes(store, view, log, done)
            reached("flush:committed")
            log.clear(kept)
    return sum(push.rows.num_rows for push in done)


def _complete(store: FeatureStore, view: FeatureView, push_id: str) -> None:
    """Finish a push that is repeated because its first attempt failed half-way."""
    log = log_of(store, view.name)
    for one in log.pushes():
        if one.push_id == push_id and not one.is_online:
            store.online.write(view, _as_defined(view, one.rows), one.at_us)
            log.mark_online(one)


def _put_online(store: FeatureStore, view: FeatureView, push: Push) -> bool:
    if not view.online:
        return True
    try:
        store.online.write(view, _as_defined(view, push.rows), push.at_us)
    except Unavailable:
        return False
    return True


def _as_defined(view: FeatureView, rows: pa.Table) -> pa.Table:
    """Logged rows as the view is defined now: a field that came since is null, a widened one is cast."""
    wanted = pa.schema([one for one in stored_schema(view) if one.name != BUCKET])
    arrays = [
        rows[one.name].cast(one.type) if one.name in rows.column_names else pa.nulls(rows.num_rows, one.type)
        for one in wanted
    ]
    return pa.table(arrays, schema=wanted)


def commit_pushes(store: FeatureStore, view: FeatureView, log: PushLog, pushes: Sequence[Push]) -> None:
    """One commit of the pushes' rows. The caller holds the log's lock."""
    uri = store.offline.uri(view.name)
    before = prepare_table(uri, view).version()
    rows = pa.concat_tables([_as_defined(view, push.rows) for push in pushes])
    profile = Profile(list(view.fields))
    profile.add(rows)
    commit_id = uuid.uuid4().hex
    aside = [push.aside for push in pushes if push.aside is not None]
    about = {"operation": "push", "rows": rows.num_rows, "quarantined": sum(one.num_rows for one in aside)}
    about |= {"statistics": profile.to_dict(), "digest": view.digest}
    if aside:
        _keep_aside(store, view, commit_id, aside)
    buckets = bucket_of(view, rows)
    adds = []
    for bucket in np.unique(buckets).tolist():
        part = rows.take(pa.array(np.flatnonzero(buckets == bucket)))
        adds.append(delta.write_file(uri, part.take(sort_order(view, part)), bucket))
    reached("flush:written")
    log.intend(commit_id, before, pushes)
    reached("flush:intended")
    delta.commit(uri, delta.Commit(adds, about={ABOUT: json.dumps(about)}, written=stored_schema(view), id=commit_id))


def _keep_aside(store: FeatureStore, view: FeatureView, commit_id: str, tables: Sequence[pa.Table]) -> None:
    rows = pa.concat_tables(tables)
    rows = rows.append_column("__ingest_id", pa.repeat(pa.scalar(commit_id), rows.num_rows))
    when = pa.repeat(quality.oldest_scalar(time.time_ns() // 1000), rows.num_rows)
    rows = rows.append_column("__quarantined_at", when)
    uri = store.offline.quarantine_uri(view.name)
    delta.ensure_table(uri, pa.schema([*rows.schema, pa.field(BUCKET, pa.int32())]))
    delta.commit(uri, delta.Commit([delta.write_file(uri, rows, 0)]))
