"""Versioned JSON documents: feature views, services, pipelines and whatever else has a name and a body."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlfuncs.errors import Conflict, NotFound, SpecError
from mlfuncs.registry.database import Database
from mlfuncs.registry.schema import canonical
from mlfuncs.registry.schema import definitions as table
from mlfuncs.registry.statements import next_number


@dataclass(frozen=True)
class Definition:
    """One version of a document; `version` counts from 1 per kind and name, gaps never."""

    project: str
    kind: str
    name: str
    version: int
    body: Any
    created_at: float


@dataclass(frozen=True)
class Seen:
    """The number of the newest version, deletions included, of every (kind, name) of some kinds at one moment."""

    kinds: tuple[str, ...]
    versions: dict[tuple[str, str], int]


class Definitions:
    """The project's documents; the newest version is what holds, older ones stay readable."""

    def __init__(self, database: Database, project: str) -> None:
        self._database, self._project = database, project

    def put(self, kind: str, name: str, body: Any) -> Definition:
        """The document with `body` as its newest version; a body equal to the newest one makes no new version."""
        return self.put_all([(kind, name, body)])[0]

    def put_all(self, documents: list[tuple[str, str, Any]], seen: Seen | None = None) -> list[Definition]:
        """Like `put` for several (kind, name, body), all of them or none; a body None deletes.

        `seen` is what `look` said when the caller decided on the documents. Raises Conflict, with nothing written,
        when it says something else by now; SpecError for a body that is not JSON.
        """
        for kind, name, body in documents:
            try:
                canonical(body)
            except (TypeError, ValueError) as exc:
                raise SpecError(f"the definition of {kind} {name!r} is not a JSON document: {exc}") from exc

        def work(connection: sa.Connection) -> list[Definition]:
            if seen is not None:
                self._check_unchanged(connection, seen)
            return [self._put(connection, *document) for document in documents]

        return self._database.write(work)

    def look(self, kinds: tuple[str, ...]) -> Seen:
        """What there is now of these kinds, for `put_all` to check that nobody changed it meanwhile."""
        return self._database.read(lambda c: self._look(c, kinds))

    def get(self, kind: str, name: str, version: int | None = None) -> Definition:
        """The document's newest version, or that `version` even if deleted since. Raises NotFound."""
        found = self.versions(kind, name)
        if version is None and found and found[0].body is not None:
            return found[0]
        for definition in found:
            if definition.version == version and definition.body is not None:
                return definition
        if version is not None and found:
            raise NotFound(f"version of {kind} {name!r}", str(version), [str(d.version) for d in found])
        raise NotFound(kind, name, [d.name for d in self.list(kind)])

    def versions(self, kind: str, name: str) -> list[Definition]:
        """Every version, newest first; a deletion is a version with body None."""
        query = sa.select(table).where(*self._named(kind, name)).order_by(table.c.version.desc())
        return self._database.read(lambda c: [Definition(**row) for row in c.execute(query).mappings()])

    def list(self, kind: str) -> list[Definition]:
        """The newest version of every document of that kind that is not deleted, by name."""
        newest = (
            sa.select(table.c.name, sa.func.max(table.c.version).label("version"))
            .where(table.c.project == self._project, table.c.kind == kind)
            .group_by(table.c.name)
            .subquery()
        )
        query = (
            sa.select(table)
            .join(newest, sa.and_(table.c.name == newest.c.name, table.c.version == newest.c.version))
            .where(table.c.project == self._project, table.c.kind == kind, table.c.body.is_not(None))
            .order_by(table.c.name)
        )
        return self._database.read(lambda c: [Definition(**row) for row in c.execute(query).mappings()])

    def delete(self, kind: str, name: str) -> None:
        """Mark the document deleted; its versions stay. Raises NotFound when there is none."""
        self.get(kind, name)
        self._database.write(lambda c: self._put(c, kind, name, None))

    def _put(self, connection: sa.Connection, kind: str, name: str, body: Any) -> Definition:
        # The counter's row lock makes concurrent writers of one name take turns, so "newest" cannot change below.
        number = next_number(connection, f"definition/{self._project}/{kind}/{name}")
        newest = sa.select(table).where(*self._named(kind, name)).order_by(table.c.version.desc()).limit(1)
        row = connection.execute(newest).mappings().one_or_none()
        if row is not None and canonical(row["body"]) == canonical(body):
            return Definition(**row)
        number = 1 if row is None else int(row["version"]) + 1
        values = {"kind": kind, "name": name, "version": number, "body": body, "created_at": time.time()}
        connection.execute(table.insert(), [{"project": self._project, **values}])
        return Definition(project=self._project, **values)

    def _look(self, connection: sa.Connection, kinds: tuple[str, ...]) -> Seen:
        query = (
            sa.select(table.c.kind, table.c.name, sa.func.max(table.c.version))
            .where(table.c.project == self._project, table.c.kind.in_(kinds))
            .group_by(table.c.kind, table.c.name)
        )
        return Seen(kinds, {(kind, name): version for kind, name, version in connection.execute(query)})

    def _check_unchanged(self, connection: sa.Connection, seen: Seen) -> None:
        # The counter's row lock makes writers that check take turns until they commit.
        next_number(connection, f"definitions/{self._project}")
        before, now = seen.versions, self._look(connection, seen.kinds).versions
        changed = sorted(key for key in {*now, *before} if now.get(key, 0) != before.get(key, 0))
        if changed:
            named = ", ".join(f"{kind} {name!r}" for kind, name in changed)
            raise Conflict(f"{named} changed meanwhile, so nothing was written; look again and repeat")

    def _named(self, kind: str, name: str) -> tuple[sa.ColumnElement[bool], ...]:
        return (table.c.project == self._project, table.c.kind == kind, table.c.name == name)
