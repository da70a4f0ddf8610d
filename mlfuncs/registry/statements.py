"""Statements that SQLite and PostgreSQL share but SQLAlchemy spells per dialect; built once, since that is slow."""

from __future__ import annotations

import functools
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mlfuncs.registry.schema import counters


def insert_new(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    """Insert the rows whose primary key is not there yet; those that are there stay as they are."""
    if rows:
        connection.execute(_insert_new(connection.dialect.name, table), rows)


def put(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]], keep: tuple[str, ...] = ()) -> None:
    """Insert the rows, whole, replacing those of the same primary key but for the columns `keep`."""
    if rows:
        connection.execute(_put(connection.dialect.name, table, keep), rows)


def next_number(connection: sa.Connection, name: str) -> int:
    """1 more than the last number given under `name`; concurrent callers wait for each other's commit."""
    return int(connection.scalar(_next_number(connection.dialect.name), {"name": name, "value": 1}) or 0)


def _insert(dialect: str, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(table) if dialect == "sqlite" else postgresql.insert(table)


@functools.cache
def _insert_new(dialect: str, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    return _insert(dialect, table).on_conflict_do_nothing()


@functools.cache
def _put(dialect: str, table: sa.Table, keep: tuple[str, ...]) -> sqlite.Insert | postgresql.Insert:
    statement = _insert(dialect, table)
    keys = [column.name for column in table.primary_key]
    changed = [column.name for column in table.columns if column.name not in (*keys, *keep)]
    changes = {name: statement.excluded[name] for name in changed}
    return statement.on_conflict_do_update(index_elements=keys, set_=changes)


@functools.cache
def _next_number(dialect: str) -> Any:
    statement = _insert(dialect, counters)
    changed = statement.on_conflict_do_update(index_elements=["name"], set_={"value": counters.c.value + 1})
    return changed.returning(counters.c.value)
