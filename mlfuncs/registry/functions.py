"""Which versions of which functions a project has seen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlfuncs.errors import NotFound
from mlfuncs.registry.database import Database
from mlfuncs.registry.schema import function_versions as table
from mlfuncs.registry.statements import next_number


@dataclass(frozen=True)
class FunctionVersion:
    """One version of a function: `digest` of its bundle, `number` counting from 1, the bundle's manifest."""

    project: str
    name: str
    digest: str
    number: int
    manifest: dict[str, Any]
    created_at: float
    recorded_at: float


class Functions:
    """The project's functions and their versions."""

    def __init__(self, database: Database, project: str) -> None:
        self._database, self._project = database, project

    def record(self, name: str, digest: str, manifest: dict[str, Any]) -> FunctionVersion:
        """The version with `digest`, recorded now; the same digest again keeps its number and is latest once more."""

        def work(connection: sa.Connection) -> FunctionVersion:
            now = time.time()
            key = {"project": self._project, "name": name, "digest": digest}
            touched = table.update().where(*_where(key)).values(recorded_at=now)
            if not connection.execute(touched).rowcount:
                number = next_number(connection, f"function/{self._project}/{name}")
                row = {**key, "number": number, "manifest": manifest, "created_at": now, "recorded_at": now}
                connection.execute(table.insert(), [row])
            found = connection.execute(sa.select(table).where(*_where(key))).mappings().one()
            return FunctionVersion(**found)

        return self._database.write(work)

    def versions(self, name: str) -> list[FunctionVersion]:
        """All versions of a function, the latest recorded first; empty for an unknown name."""
        query = sa.select(table).where(*self._named(name)).order_by(table.c.recorded_at.desc(), table.c.number.desc())
        return self._database.read(lambda c: [FunctionVersion(**row) for row in c.execute(query).mappings()])

    def get(self, name: str, digest: str | None = None) -> FunctionVersion:
        """The version with `digest` (default: the latest). Raises NotFound."""
        versions = self.versions(name)
        if not versions:
            raise NotFound("function", name, self.names())
        if digest is None:
            return versions[0]
        for version in versions:
            if version.digest == digest:
                return version
        raise NotFound(f"version of function {name!r}", digest, [v.digest for v in versions])

    def names(self) -> list[str]:
        """The names of the project's functions, sorted."""
        query = sa.select(table.c.name).where(table.c.project == self._project).distinct().order_by(table.c.name)
        return self._database.read(lambda c: list(c.scalars(query)))

    def _named(self, name: str) -> list[sa.ColumnElement[bool]]:
        return [table.c.project == self._project, table.c.name == name]


def _where(key: dict[str, str]) -> list[sa.ColumnElement[bool]]:
    return [table.c[column] == value for column, value in key.items()]
