"""One database, SQLite or PostgreSQL: short transactions that wait their turn instead of failing.

A write on SQLite takes the write lock at its start (BEGIN IMMEDIATE), so it never fails half way for a lock; when the
lock stays busy the whole transaction is tried again with jitter until `PATIENCE_S` is over. On PostgreSQL a
serialization failure, a deadlock or a lost connection before the commit is tried again likewise.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc

from mlfuncs.errors import MissingExtra, MlfuncsError, RegistryUnavailable, SpecError, StorageError

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0  # SQLite's own wait inside one attempt
PATIENCE_S = 60.0  # guess: longer than any burst of writers that was measured
_CONNECT_TIMEOUT_S = 30  # guess: a server that is away refuses at once; a loaded one took more than 5 s to let us in
_RETRIED_STATES = {"40001", "40P01"}  # PostgreSQL: serialization_failure, deadlock_detected


class Database:
    """A pool of connections and the two ways to use one: `read` and `write`."""

    def __init__(self, url: str, pool_size: int = 5) -> None:
        self.url = _parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _create_engine(self.url, pool_size)
        self._writer = self.engine.execution_options(mlfuncs_write=True)
        self._reader = self.engine
        if not self.is_sqlite:  # one snapshot per transaction, as SQLite has it anyway
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ")
        if self.is_sqlite:
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        _OPEN.add(self)

    @property
    def where(self) -> str:
        """The database for people: a path or host, port and name, never a password."""
        if self.is_sqlite:
            return str(self.url.database)
        port = f":{self.url.port}" if self.url.port else ""
        host = self.url.host or self.url.query.get("host") or "localhost"
        return f"PostgreSQL at {host}{port}/{self.url.database or ''}"

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns, on one consistent view of the database."""
        return self._attempt(self._reader, work)

    def write(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` returns, its changes committed whole. `work` may be called again after a conflict."""
        return self._attempt(self._writer, work)

    def clock(self, connection: sa.Connection) -> float:
        """Seconds since the epoch by the one clock that all users of this database share."""
        if self.is_sqlite:
            return time.time()
        return float(connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")) or 0.0)

    def close(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()

    def _attempt(self, engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
        deadline = time.monotonic() + PATIENCE_S
        delay_s = 0.005
        while True:
            committing = False
            try:
                with engine.connect() as connection, connection.begin() as transaction:
                    result = work(connection)
                    committing = True
                    transaction.commit()
                    return result
            except exc.DBAPIError as error:
                if not self._can_retry(error, committing) or time.monotonic() > deadline:
                    raise self._translate(error) from error
            except exc.TimeoutError as error:
                raise RegistryUnavailable(
                    "every database connection of this process is in use; raise MLFUNCS_REGISTRY_POOL"
                ) from error
            time.sleep(delay_s * random.uniform(0.5, 1.5))
            delay_s = min(delay_s * 2, 0.5)

    def _can_retry(self, error: exc.DBAPIError, committing: bool) -> bool:
        if self.is_sqlite:
            return _sqlite_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        if getattr(error.orig, "sqlstate", None) in _RETRIED_STATES:
            return True
        return error.connection_invalidated and not committing  # once committing, the outcome is unknown

    def _translate(self, error: exc.DBAPIError) -> MlfuncsError | exc.DBAPIError:
        if isinstance(error, exc.IntegrityError | exc.ProgrammingError | exc.DataError):
            return error
        if not self.is_sqlite:
            return RegistryUnavailable(
                f"the registry's database does not answer ({self.where}): {_first_line(error)}; start it, or set "
                "MLFUNCS_REGISTRY_URL (empty: SQLite in the home directory)",
                retry_after_s=5.0,
            )
        code = _sqlite_code(error)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return RegistryUnavailable(
                f"the registry {self.where} was busy for {PATIENCE_S:.0f} s: another process holds it; end that one"
            )
        return StorageError(f"the registry {self.where!r} cannot be used: {_first_line(error)}; {_advice(code)}")


def _advice(code: int) -> str:
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return "the file is not a whole SQLite database: restore it, or move it away and a new one is made"
    if code == sqlite3.SQLITE_FULL:
        return "free some disk space"
    return "make it writable, or set MLFUNCS_HOME to a folder that is"


def _sqlite_code(error: exc.DBAPIError) -> int:
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # the primary code, without SQLite's extension


def _first_line(error: exc.DBAPIError) -> str:
    return (str(error.orig).strip().splitlines() or ["no reason given"])[0]


def _parse_url(text: str) -> sa.URL:
    try:
        url = sa.make_url(text)
    except exc.ArgumentError:
        raise SpecError(
            "registry_url is not a database URL: write it like postgresql://user:password@host:5432/name"
        ) from None
    backend = url.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite" and url.database and url.database != ":memory:":
        return url
    raise SpecError(f"registry_url names {url.drivername!r}: use postgresql://... or sqlite:////path/to/file")


def _create_engine(url: sa.URL, pool_size: int) -> sa.Engine:
    options: dict[str, Any] = {"pool_size": max(1, pool_size), "max_overflow": 0, "pool_timeout": 30}
    if url.get_backend_name() == "sqlite":
        return sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, **options)
    try:
        return sa.create_engine(
            url, connect_args={"connect_timeout": _CONNECT_TIMEOUT_S}, pool_pre_ping=True, **options
        )
    except ModuleNotFoundError as error:
        raise MissingExtra("a PostgreSQL registry", "postgres") from error


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions begin in `_begin_sqlite`, not when the driver guesses
    # FULL: an acknowledged write survives a power cut. One fsync of the log, 0.3 ms measured on a cloud disk.
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("mlfuncs_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


_OPEN: weakref.WeakSet[Database] = weakref.WeakSet()
_PARENTS: list[Any] = []  # pools of the process we were forked from: used and closed only by it


def _forget_connections() -> None:
    for database in list(_OPEN):
        _PARENTS.append(database.engine.pool)
        database.engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)
