"""Which artifacts the project knows: digest, kind, size, and the reference that reads them back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from mlfuncs.errors import NotFound
from mlfuncs.registry.database import Database
from mlfuncs.registry.schema import artifacts as table
from mlfuncs.registry.statements import insert_new


class Artifacts:
    """The project's artifacts by digest; the bytes live in the artifact store."""

    def __init__(self, database: Database, project: str) -> None:
        self._database, self._project = database, project

    def record(self, ref: Mapping[str, Any]) -> None:
        """Keep an ArtifactRef's dict (digest, kind, type_name, size_bytes, metadata); the first one stays."""
        row = {"project": self._project, "digest": ref["digest"], "kind": ref["kind"], "ref": dict(ref)}
        row |= {"size_bytes": ref["size_bytes"], "created_at": time.time()}
        self._database.write(lambda c: insert_new(c, table, [row]))

    def get(self, digest: str) -> dict[str, Any]:
        """The ArtifactRef dict whose digest is or starts with `digest`. Raises NotFound."""
        starts_so = table.c.digest.startswith(digest, autoescape=True)
        query = sa.select(table.c.ref).where(table.c.project == self._project, starts_so).limit(2)
        found = self._database.read(lambda c: list(c.scalars(query)))
        if len(found) != 1:
            raise NotFound(
                "artifact", digest, hint="alone: several digests start so; write more of it" if found else ""
            )
        return dict(found[0])

    def list(self, *, kind: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """The newest `limit` ArtifactRef dicts, newest first."""
        query = sa.select(table.c.ref).where(table.c.project == self._project)
        if kind is not None:
            query = query.where(table.c.kind == kind)
        query = query.order_by(table.c.created_at.desc(), table.c.digest).limit(limit)
        return self._database.read(lambda c: [dict(ref) for ref in c.scalars(query)])
