"""Delta Lake tables and their commits: open, create, evolve, commit once; `delta_files` writes the files.

Owns: everything that touches the `deltalake` library's log. A commit either names its files in the log or does not;
data files are written first and become visible all at once. After a commit whose outcome is unknown the log itself is
asked, by the commit's id, and the data files are never deleted.
"""

from __future__ import annotations

import json
import os
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pa_fs

from mlfuncs.errors import Conflict, NotFound, StorageError
from mlfuncs_featurestore.delta_files import BUCKET, filesystem, is_local, sync_file
from mlfuncs_featurestore.delta_files import delete_files as delete_files
from mlfuncs_featurestore.delta_files import table_uri as table_uri
from mlfuncs_featurestore.delta_files import write_bytes as write_bytes
from mlfuncs_featurestore.delta_files import write_file as write_file

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake.transaction import AddAction

COMMIT_KEY = "mlfuncs.commit"
# Delta's own retries (15) fail 2.7 % of the appends of 8 busy writers, measured; these come on top, with jitter.
ATTEMPTS = 40
CONFIGURATION = {
    "delta.checkpointInterval": "100",
    "delta.logRetentionDuration": "interval 3650 days",  # training sets are rebuilt from old versions
    "delta.deletedFileRetentionDuration": "interval 3650 days",
}


def open_delta(uri: str, version: int | None = None, at: str | None = None) -> DeltaTable | None:
    """The table at its newest version, at `version`, or as it was at the ISO time `at`; None when there is no table.

    Raises NotFound for a version it does not have, StorageError when the log cannot be read.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    try:
        table = DeltaTable(uri)
        newest = table.version()
        if version is not None and version != newest:
            if not 0 <= version <= newest:
                raise NotFound("table version", str(version), hint=f"({uri} has versions 0 to {newest})")
            table.load_as_version(version)
        elif at is not None:
            _load_as_of(table, at, uri)
        return table
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as exc:
        raise StorageError(f"the table {uri} cannot be opened: {exc}") from exc


def _load_as_of(table: DeltaTable, at: str, uri: str) -> None:
    import datetime

    try:
        moment = datetime.datetime.fromisoformat(at)
    except ValueError:
        raise NotFound("table version", at, hint="(write the time like '2024-05-01T12:00:00+00:00')") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    commits = sorted((entry["timestamp"], index) for index, entry in enumerate(reversed(table.history())))
    before = [index for stamp, index in commits if stamp <= moment.timestamp() * 1000]
    if not before:
        raise NotFound("table version", at, hint=f"({uri} did not exist then)")
    offset = table.version() - (len(commits) - 1)
    table.load_as_version(max(before) + offset)


def ensure_table(uri: str, schema: pa.Schema) -> DeltaTable:
    """The table, made with `schema` and partitioned by bucket when it is not there, else given the columns it lacks."""
    from deltalake import Schema
    from deltalake.exceptions import DeltaError
    from deltalake.transaction import create_table_with_add_actions

    table = open_delta(uri)
    if table is None:
        if is_local(uri):
            os.makedirs(uri, exist_ok=True)
        try:
            create_table_with_add_actions(
                uri, Schema.from_arrow(schema), [], "error", [BUCKET], configuration=CONFIGURATION
            )
        except DeltaError as exc:
            if open_delta(uri) is None:  # else another process made it first
                raise StorageError(f"the table {uri} cannot be made: {exc}") from exc
        table = open_delta(uri)
        assert table is not None
        sync_log(uri, 0)
    _add_columns(uri, table, schema)
    return table


def arrow_schema(table: DeltaTable) -> pa.Schema:
    """The table's schema as Arrow."""
    return pa.schema(table.schema().to_arrow())


def _add_columns(uri: str, table: DeltaTable, schema: pa.Schema) -> None:
    from deltalake import Schema
    from deltalake.exceptions import DeltaError

    for _ in range(ATTEMPTS):
        have = set(arrow_schema(table).names)
        missing = [one for one in schema if one.name not in have]
        if not missing:
            return
        try:
            table.alter.add_columns(list(Schema.from_arrow(pa.schema(missing)).fields))
            sync_log(uri, table.version())
        except DeltaError:
            time.sleep(random.uniform(0, 0.05))
        table.update_incremental()
    raise StorageError(f"columns {', '.join(one.name for one in missing)} cannot be added to {table.table_uri}")


@dataclass(frozen=True)
class Commit:
    """What one commit adds and removes, and what it says about itself.

    `transaction` ("app", number) makes the commit happen once: a number already reached is not committed again.
    """

    adds: Sequence[AddAction]
    removes: Sequence[AddAction] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    transaction: tuple[str, int] | None = None
    written: pa.Schema | None = None  # what the added files were written as; it must still be the table's
    schema: pa.Schema | None = None  # set: replace every row and the schema
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


def commit(uri: str, change: Commit) -> int:
    """Commit `change` and return the table version it made.

    Raises Conflict when files to remove are gone or the schema is another one by now, StorageError when it cannot be
    committed; the table is then as it was.
    """
    from deltalake.exceptions import CommitFailedError, DeltaError

    for attempt in range(ATTEMPTS):
        table = open_delta(uri)
        if table is None:
            raise Conflict(f"the table {uri} vanished while it was written")
        before = table.version()
        done = _already_done(table, change)
        if done is not None:
            return done
        try:
            _try_commit(table, change)
        except CommitFailedError:
            time.sleep(random.uniform(0, 0.02 * min(attempt + 1, 20)))
            continue
        except (DeltaError, OSError) as exc:
            version = find_commit(uri, change.id, before)
            if version is None:
                raise StorageError(f"the commit to {uri} failed: {exc}") from exc
        else:
            version = find_commit(uri, change.id, before)
        if version is None:
            raise StorageError(f"a commit to {uri} is done, but its log cannot be read; do not write the rows again")
        sync_log(uri, version)
        return version
    raise StorageError(f"{uri} has too many writers at once: {ATTEMPTS} commits lost the race; nothing was written")


def replace_all(uri: str, version: int, change: Commit) -> bool:
    """Replace every row and the schema, if the table is still at `version`; whether it was."""
    from deltalake.exceptions import CommitFailedError, DeltaError

    table = open_delta(uri)
    if table is None or table.version() != version:
        return False
    try:
        _try_commit(table, change)
    except CommitFailedError:
        return False
    except (DeltaError, OSError) as exc:
        if find_commit(uri, change.id, version) is None:
            raise StorageError(f"the commit to {uri} failed: {exc}") from exc
    sync_log(uri, version + 1)
    return True


def sync_log(uri: str, version: int) -> None:
    """Make a commit survive a loss of power. Each must: behind one that is lost, later ones cannot be read."""
    entry = f"{uri}/_delta_log/{version:020}.json"
    if is_local(uri) and os.path.exists(entry):
        sync_file(entry)
        sync_file(f"{uri}/_delta_log")


def _already_done(table: DeltaTable, change: Commit) -> int | None:
    if change.transaction is None:
        return None
    reached = table.transaction_version(change.transaction[0])
    return table.version() if reached is not None and reached >= change.transaction[1] else None


def _try_commit(table: DeltaTable, change: Commit) -> None:
    from deltalake import Schema
    from deltalake.transaction import CommitProperties, RemoveAction, Transaction

    # Delta does not notice two commits that remove the same file, so those race for exactly the next version
    alone = bool(change.removes) or change.schema is not None or change.transaction is not None
    have = arrow_schema(table)
    if change.written is not None and not all(have.field(one.name).type.equals(one.type) for one in change.written):
        raise Conflict(f"the columns of {table.table_uri} were widened meanwhile; write the rows again")
    if change.removes:
        active = set(pa.table(table.get_add_actions(flatten=True))["path"].to_pylist())
        gone = [action.path for action in change.removes if action.path not in active]
        if gone:
            raise Conflict(f"{table.table_uri}: {len(gone)} files were rewritten by another process meanwhile")
    now_ms = int(time.time() * 1000)
    removes = [RemoveAction(a.path, a.data_change, now_ms, a.size, dict(a.partition_values)) for a in change.removes]
    properties = CommitProperties(
        custom_metadata={COMMIT_KEY: change.id, **change.about},
        max_commit_retries=0 if alone else None,
        app_transactions=[Transaction(*change.transaction)] if change.transaction else None,
    )
    mode = "append" if change.schema is None else "overwrite"
    schema = table.schema() if change.schema is None else Schema.from_arrow(change.schema)
    table.create_write_transaction([*change.adds, *removes], mode, schema, [BUCKET], commit_properties=properties)


def find_commit(uri: str, commit_id: str, after: int) -> int | None:
    """The version that the commit made, looked for in the log after version `after`; None when it is not there."""
    version = after + 1
    while (log := _read_log(uri, version)) is not None:
        if commit_id.encode() in log.split(b"\n", 1)[0]:
            return version
        version += 1
    return None


def added_since(uri: str, since: int, until: int) -> list[dict[str, Any]] | None:
    """The log's "add" entries with new rows in versions since+1..until; None when log or files are not all there."""
    found: list[dict[str, Any]] = []
    for version in range(since + 1, until + 1):
        log = _read_log(uri, version)
        if log is None:
            return None
        actions = [json.loads(line) for line in log.splitlines() if line]
        found += [action["add"] for action in actions if action.get("add", {}).get("dataChange")]
    files = filesystem(uri)
    there = all(files.get_file_info(action["path"]).type == pa_fs.FileType.File for action in found)
    return found if there else None


def _read_log(uri: str, version: int) -> bytes | None:
    try:
        with filesystem(uri).open_input_file(f"_delta_log/{version:020}.json") as log:
            return log.read()
    except OSError:  # no such version, or it was cleaned away
        return None
