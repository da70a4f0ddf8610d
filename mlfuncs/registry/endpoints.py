"""Endpoints: what should be served, and the immutable revisions that can serve it.

Every change of an endpoint takes the next number of one registry-wide counter as the row's `generation`. Numbers
appear in the order of commits, so a reconciler that asks for changes since the last number it saw misses none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlfuncs.errors import Conflict, NotFound, SpecError
from mlfuncs.registry.database import Database
from mlfuncs.registry.schema import ENDPOINTS_COUNTER, canonical, counters, endpoints, revisions
from mlfuncs.registry.statements import next_number

NOTHING_DESIRED: dict[str, Any] = {"traffic": {}, "tags": {}, "mirror": {}, "previous": {}}


@dataclass(frozen=True)
class Revision:
    """What one deploy made: a bundle's digest and the configuration it runs under. Never changes."""

    revision: str  # "rev-N"
    number: int
    digest: str
    config: dict[str, Any]
    created_at: float


@dataclass(frozen=True)
class EndpointRow:
    """An endpoint with its revisions, oldest first. `desired` holds traffic, tags, mirror and the previous traffic."""

    project: str
    name: str
    target: str
    site: str
    desired: dict[str, Any]
    observed: dict[str, Any]
    generation: int
    deleted: bool
    created_at: float
    updated_at: float
    revisions: tuple[Revision, ...]

    def revision(self, name: str) -> Revision:
        """The revision of that name. Raises NotFound."""
        for revision in self.revisions:
            if revision.revision == name:
                return revision
        raise NotFound(f"revision of endpoint {self.name!r}", name, [r.revision for r in self.revisions])

    @property
    def latest(self) -> Revision:
        """The revision of the last deploy."""
        return self.revisions[-1]


class Endpoints:
    """The project's endpoints; `changes`, `observe` and `purge` are for reconcilers."""

    def __init__(self, database: Database, project: str) -> None:
        self._database, self._project = database, project

    def add_revision(
        self, name: str, digest: str, config: Mapping[str, Any], *, target: str = "process", site: str = ""
    ) -> Revision:
        """The revision that serves bundle `digest` under `config`; the endpoint is made when there is none.

        Deploying what the latest revision already is makes no new one and changes nothing; any difference makes the
        next. A deleted endpoint comes back with its numbers going on. Raises Conflict while another site or target
        serves an endpoint of that name.
        """

        def work(connection: sa.Connection) -> Revision:
            _take_turn(connection)
            row = _find(connection, self._project, name)
            if row is None:
                row = self._create(connection, name, target, site)
            elif row.deleted:
                self._revive(connection, name, target, site)
            else:
                _check_same_place(row, target, site)
                if row.revisions and _is_same(row.latest, digest, config):
                    return row.latest
            return self._append(connection, row, digest, dict(config))

        return self._database.write(work)

    def get(self, name: str) -> EndpointRow:
        """The endpoint. Raises NotFound, naming those that are close."""
        row = self._database.read(lambda c: _find(c, self._project, name))
        if row is None or row.deleted:
            raise NotFound("endpoint", name, [endpoint.name for endpoint in self.list()])
        return row

    def update(
        self, name: str, change: Callable[[dict[str, Any], EndpointRow], dict[str, Any]], expected: int | None = None
    ) -> EndpointRow:
        """The endpoint with `desired` replaced by `change(desired, row)`, read and written as one step.

        `change` may be called again after a conflict and must not modify what it is given. With `expected`, raises
        Conflict unless the generation is still that. Raises NotFound. An unchanged result keeps the generation.
        """

        def work(connection: sa.Connection) -> EndpointRow | None:
            _take_turn(connection)
            row = _find(connection, self._project, name)
            if row is None or row.deleted:
                return None
            if expected is not None and row.generation != expected:
                raise Conflict(f"endpoint {name!r} was changed meanwhile; look at it again and retry")
            desired = change(row.desired, row)
            if canonical(desired) != canonical(row.desired):
                self._touch(connection, name, desired=desired)
            return _find(connection, self._project, name)

        updated = self._database.write(work)
        return updated if updated is not None else self.get(name)

    def set_desired(self, name: str, desired: Mapping[str, Any], expected: int | None = None) -> EndpointRow:
        """The endpoint with the whole of `desired` replaced; see `update`."""
        return self.update(name, lambda _desired, _row: dict(desired), expected)

    def set_traffic(self, name: str, traffic: Mapping[str, int]) -> EndpointRow:
        """The endpoint with its traffic shares replaced; the old ones become `desired["previous"]`.

        Shares are relative weights, whole numbers above 0. Raises SpecError for others, NotFound for a revision.
        """
        for revision, share in traffic.items():
            if not isinstance(share, int) or isinstance(share, bool) or share <= 0:
                raise SpecError(f"traffic of {revision!r} must be a whole number above 0, not {share!r}; leave it out")

        def change(desired: dict[str, Any], row: EndpointRow) -> dict[str, Any]:
            for revision in traffic:
                row.revision(revision)
            if desired.get("traffic") == dict(traffic):
                return desired
            return {**desired, "traffic": dict(traffic), "previous": desired.get("traffic") or {}}

        return self.update(name, change)

    def delete(self, name: str) -> EndpointRow:
        """The endpoint, now a tombstone that serves nothing until its reconciler purges it. Raises NotFound."""
        self.get(name)

        def work(connection: sa.Connection) -> EndpointRow | None:
            _take_turn(connection)
            self._touch(connection, name, deleted=True, desired=NOTHING_DESIRED)
            return _find(connection, self._project, name)

        row = self._database.write(work)
        return row if row is not None else self.get(name)

    def changes(self, since: int, site: str | None = None) -> list[EndpointRow]:
        """Endpoints of every project changed after generation `since`, oldest change first, tombstones included.

        With `site`, only those that site reconciles.
        """
        where = endpoints.c.generation > since
        if site is not None:
            where = sa.and_(where, endpoints.c.site == site)
        return self._database.read(lambda c: sorted(_select(c, where), key=lambda row: row.generation))

    def generation(self) -> int:
        """The generation of the last change to any endpoint; 0 before the first."""
        query = sa.select(counters.c.value).where(counters.c.name == ENDPOINTS_COUNTER)
        return int(self._database.read(lambda c: c.scalar(query)) or 0)

    def observe(self, row: EndpointRow, observed: Mapping[str, Any]) -> None:
        """Keep what the reconciler sees (status, url, replicas) beside the endpoint; the generation stays."""
        statement = endpoints.update().where(*_key(row.project, row.name)).values(observed=dict(observed))
        self._database.write(lambda c: c.execute(statement))

    def purge(self, row: EndpointRow) -> bool:
        """Remove a tombstone and its revisions; False when it was deployed again since `row` was read."""

        def work(connection: sa.Connection) -> bool:
            _take_turn(connection)
            same = endpoints.c.generation == row.generation
            gone = connection.execute(
                endpoints.delete().where(*_key(row.project, row.name), same, endpoints.c.deleted.is_(True))
            ).rowcount
            if gone:
                connection.execute(
                    revisions.delete().where(revisions.c.project == row.project, revisions.c.endpoint == row.name)
                )
            return bool(gone)

        return self._database.write(work)

    def _create(self, connection: sa.Connection, name: str, target: str, site: str) -> EndpointRow:
        now = time.time()
        row: dict[str, Any] = {"project": self._project, "name": name, "target": target, "site": site}
        row |= {
            "desired": NOTHING_DESIRED,
            "observed": {},
            "generation": 0,
            "next_revision": 1,
            "deleted": False,
            "created_at": now,
        }
        connection.execute(endpoints.insert(), [{**row, "updated_at": now}])
        created = _find(connection, self._project, name)
        assert created is not None
        return created

    def _revive(self, connection: sa.Connection, name: str, target: str, site: str) -> None:
        values = {"deleted": False, "target": target, "site": site, "desired": NOTHING_DESIRED, "observed": {}}
        connection.execute(endpoints.update().where(*_key(self._project, name)).values(**values))

    def _append(self, connection: sa.Connection, row: EndpointRow, digest: str, config: dict[str, Any]) -> Revision:
        where = _key(self._project, row.name)
        number = int(connection.scalar(sa.select(endpoints.c.next_revision).where(*where)) or 1)
        revision = Revision(f"rev-{number}", number, digest, config, time.time())
        key = {"project": self._project, "endpoint": row.name}
        connection.execute(revisions.insert(), [{**key, **vars(revision)}])
        self._touch(connection, row.name, next_revision=number + 1)
        return revision

    def _touch(self, connection: sa.Connection, name: str, **values: Any) -> None:
        values |= {"generation": next_number(connection, ENDPOINTS_COUNTER), "updated_at": time.time()}
        connection.execute(endpoints.update().where(*_key(self._project, name)).values(**values))

    def list(self) -> list[EndpointRow]:
        """The project's endpoints by name, without deleted ones."""
        where = sa.and_(endpoints.c.project == self._project, endpoints.c.deleted.is_(False))
        return self._database.read(lambda c: _select(c, where))


def _take_turn(connection: sa.Connection) -> None:
    """Wait for other writers of endpoints; SQLite's write lock does so already and ignores FOR UPDATE."""
    connection.execute(sa.select(counters).where(counters.c.name == ENDPOINTS_COUNTER).with_for_update())


def _key(project: str, name: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (endpoints.c.project == project, endpoints.c.name == name)


def _find(connection: sa.Connection, project: str, name: str) -> EndpointRow | None:
    rows = _select(connection, sa.and_(*_key(project, name)))
    return rows[0] if rows else None


def _select(connection: sa.Connection, where: sa.ColumnElement[bool]) -> list[EndpointRow]:
    found = connection.execute(sa.select(endpoints).where(where).order_by(endpoints.c.name)).mappings().all()
    joined = sa.and_(revisions.c.project == endpoints.c.project, revisions.c.endpoint == endpoints.c.name)
    query = sa.select(revisions).join(endpoints, joined).where(where).order_by(revisions.c.number)
    by_endpoint: dict[tuple[str, str], list[Revision]] = {}
    for row in connection.execute(query).mappings():
        values = {key: row[key] for key in ("revision", "number", "digest", "config", "created_at")}
        by_endpoint.setdefault((row["project"], row["endpoint"]), []).append(Revision(**values))
    return [
        EndpointRow(
            **{key: value for key, value in row.items() if key != "next_revision"},
            revisions=tuple(by_endpoint.get((row["project"], row["name"]), ())),
        )
        for row in found
    ]


def _is_same(revision: Revision, digest: str, config: Mapping[str, Any]) -> bool:
    return revision.digest == digest and canonical(revision.config) == canonical(dict(config))


def _check_same_place(row: EndpointRow, target: str, site: str) -> None:
    if row.site != site:
        raise Conflict(
            f"endpoint {row.name!r} of project {row.project!r} is served from another home (site {row.site or 'any'}): "
            "delete it there first, or deploy under another name"
        )
    if row.target != target:
        raise Conflict(
            f"endpoint {row.name!r} is served by target {row.target!r}, not {target!r}: delete it first, or deploy "
            "under another name"
        )
