"""Bringing a database to this release's schema: made fresh, upgraded in place, or refused when it is newer.

Opening a current database costs one query and imports no alembic. Creation and upgrade run in one transaction under
a lock (a file beside the SQLite database, an advisory lock in PostgreSQL), so a crash leaves the old schema or the new.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from mlfuncs.errors import SchemaTooNew, StorageError
from mlfuncs.registry.database import Database
from mlfuncs.registry.schema import HEAD, KNOWN, VERSION_TABLE, metadata, seed, version

_ADVISORY_LOCK = 0x6D6C66756E6373  # "mlfuncs" in ASCII


def ensure_schema(database: Database) -> None:
    """Return once the database has the schema `HEAD`. Raises SchemaTooNew for one that this release does not know."""
    if database.read(lambda connection: _current(database, connection)) == HEAD:
        return
    with _file_lock(database):
        if database.is_sqlite:
            _use_write_ahead_log(database)
        database.write(lambda connection: _bring_to_head(database, connection))


def upgrade(connection: sa.Connection, target: str = HEAD) -> None:
    """Run the packaged alembic migrations up to `target` inside the connection's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, target)


def _current(database: Database, connection: sa.Connection) -> str | None:
    """The schema's version; None for a database without our tables."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    found = connection.scalar(sa.select(version.c.version_num))
    if found is not None and found not in KNOWN:
        raise SchemaTooNew(
            f"the registry {database.where} has schema {found!r}, written by a newer mlfuncs than this one, which "
            f"knows up to {HEAD!r}: upgrade with pip install -U mlfuncs, or use another MLFUNCS_HOME"
        )
    return found


def _bring_to_head(database: Database, connection: sa.Connection) -> None:
    if not database.is_sqlite:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
    found = _current(database, connection)  # again, now that nobody else can change it
    if found is None:
        metadata.create_all(connection)
        version.create(connection)
        seed(connection)
        connection.execute(version.insert().values(version_num=HEAD))
    elif found != HEAD:
        upgrade(connection)


def _use_write_ahead_log(database: Database) -> None:
    raw = database.engine.raw_connection()
    try:
        raw.cursor().execute("PRAGMA journal_mode=WAL")
    finally:
        raw.close()


@contextlib.contextmanager
def _file_lock(database: Database) -> Iterator[None]:
    if not database.is_sqlite:
        yield
        return
    import fcntl

    path = f"{database.url.database}.lock"
    try:
        file = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise StorageError(
            f"{path!r} cannot be written ({error.strerror}); set MLFUNCS_HOME to a folder that can"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
