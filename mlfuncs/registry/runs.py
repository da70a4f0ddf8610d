"""Runs: what was executed, with which parameters, what it logged and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from mlfuncs.errors import NotFound
from mlfuncs.registry.database import Database
from mlfuncs.registry.schema import run_artifacts, run_metrics, run_params
from mlfuncs.registry.schema import runs as table
from mlfuncs.registry.statements import insert_new, put

ACTIVE = ("pending", "running")


@dataclass(frozen=True)
class RunRow:
    """One run. `owner` is the process that executes it (machine, host, pid, pid_start); times are UNIX seconds."""

    id: str
    project: str
    function: str
    kind: str = "run"
    status: str = "pending"
    isolation: str = "inline"
    parent_id: str | None = None
    pipeline: str | None = None
    step: str | None = None
    attempt: int = 1
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    heartbeat_at: float | None = None
    owner: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    cpu_s: float | None = None
    peak_memory_mib: float | None = None


@dataclass(frozen=True)
class RunContents:
    """What belongs to a run: parameters, the last value of each metric, artifacts by role and name."""

    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # role -> name -> ref


@dataclass(frozen=True)
class MetricPoint:
    """One logged value; `seq` orders the values of a run, `at` is when it was logged."""

    seq: int
    name: str
    value: float
    step: int | None
    at: float


@dataclass(frozen=True)
class RunArtifact:
    """A named value of a run; `role` is "input", "output" or "logged"; `digest` None: a plain value inside `ref`."""

    role: str
    name: str
    ref: dict[str, Any]
    digest: str | None = None


@dataclass(frozen=True)
class RunState:
    """A run as it is now, with what belongs to it; for `Runs.record`."""

    row: RunRow
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[MetricPoint] = ()
    artifacts: Sequence[RunArtifact] = ()


class Runs:
    """The project's runs."""

    def __init__(self, database: Database, project: str) -> None:
        self._database, self._project = database, project

    def create(
        self, row: RunRow, params: Mapping[str, Any] | None = None, artifacts: Sequence[RunArtifact] = ()
    ) -> None:
        """Keep a new run with its parameters and input artifacts, all at once."""

        def work(connection: sa.Connection) -> None:
            now = self._database.clock(connection)
            values = {**vars(row), "project": self._project, "heartbeat_at": now}
            connection.execute(table.insert(), [values])
            _put_params(connection, row.id, params or {})
            _put_artifacts(connection, row.id, artifacts)

        self._database.write(work)

    def record(self, states: Sequence[RunState]) -> None:
        """Make or bring up to date any number of runs in one transaction; when a run was made stays as it is."""

        def work(connection: sa.Connection) -> None:
            kept = {"project": self._project, "heartbeat_at": self._database.clock(connection)}
            put(connection, table, [{**vars(state.row), **kept} for state in states], keep=("created_at",))
            params = [(state.row.id, item) for state in states for item in state.params.items()]
            put(connection, run_params, [{"run_id": run_id, "name": n, "value": v} for run_id, (n, v) in params])
            metrics = [row for state in states for row in _metric_rows(state.row.id, state.metrics)]
            insert_new(connection, run_metrics, metrics)
            artifacts = [row for state in states for row in _artifact_rows(state.row.id, state.artifacts)]
            put(connection, run_artifacts, artifacts)

        self._database.write(work)

    def update(self, run_id: str, **values: Any) -> bool:
        """Set columns of a run; False when there is no such run."""
        return bool(self._database.write(lambda c: c.execute(self._one(run_id).values(**values)).rowcount))

    def finish(
        self,
        run_id: str,
        values: Mapping[str, Any],
        metrics: Iterable[MetricPoint] = (),
        artifacts: Sequence[RunArtifact] = (),
        *,
        only_active: bool = False,
    ) -> bool:
        """Set the last columns (status, finished_at, ...), metrics and artifacts of a run, all at once.

        With `only_active`, a run that has finished keeps what it has and the answer is False: so whoever finds a run
        dead does not overwrite what the run itself said.
        """

        def work(connection: sa.Connection) -> bool:
            statement = self._one(run_id).values(**values)
            if only_active:
                statement = statement.where(table.c.status.in_(ACTIVE))
            if not connection.execute(statement).rowcount:
                return False
            _put_metrics(connection, run_id, metrics)
            _put_artifacts(connection, run_id, artifacts)
            return True

        return self._database.write(work)

    def heartbeat(self, run_ids: Sequence[str]) -> None:
        """Say that the runs are still being executed, by the database's clock."""

        def work(connection: sa.Connection) -> None:
            now = self._database.clock(connection)
            where = sa.and_(table.c.id.in_(list(run_ids)), table.c.status.in_(ACTIVE))
            connection.execute(table.update().where(where).values(heartbeat_at=now))

        self._database.write(work)

    def active(self) -> tuple[list[RunRow], float]:
        """The project's runs that have not finished, and the time now by the clock of their heartbeats."""
        query = sa.select(table).where(table.c.project == self._project, table.c.status.in_(ACTIVE))

        def work(connection: sa.Connection) -> tuple[list[RunRow], float]:
            rows = [RunRow(**row) for row in connection.execute(query).mappings()]
            return rows, self._database.clock(connection) if rows else 0.0

        return self._database.read(work)

    def get(self, run_id: str) -> RunRow:
        """The run whose id is or starts with `run_id`. Raises NotFound, also when several start with it."""
        mine = table.c.project == self._project
        exact = sa.select(table).where(mine, table.c.id == run_id)
        like = sa.select(table).where(mine, table.c.id.startswith(run_id, autoescape=True)).limit(2)

        def work(connection: sa.Connection) -> Sequence[Any]:
            return connection.execute(exact).mappings().all() or connection.execute(like).mappings().all()

        found = self._database.read(work)
        if len(found) == 1:
            return RunRow(**found[0])
        if found:
            ids = ", ".join(row["id"] for row in found)
            raise NotFound("run", run_id, hint=f"alone: several ids start so, like {ids}; write more of one")
        raise NotFound("run", run_id, [row.id for row in self.list(limit=20)])

    def contents(self, run_ids: Sequence[str]) -> dict[str, RunContents]:
        """Parameters, last metrics and artifacts of each run, in four queries however many runs there are."""

        def work(connection: sa.Connection) -> dict[str, RunContents]:
            found = {run_id: RunContents() for run_id in run_ids}
            for ids in _chunks(list(run_ids)):
                _read_contents(connection, ids, found)
            return found

        return self._database.read(work)

    def log(
        self,
        run_id: str,
        metrics: Iterable[MetricPoint] = (),
        params: Mapping[str, Any] | None = None,
        artifacts: Sequence[RunArtifact] = (),
    ) -> None:
        """Add metrics, parameters and artifacts to a run; a metric whose `seq` is there already stays as it is."""

        def work(connection: sa.Connection) -> None:
            _put_metrics(connection, run_id, metrics)
            _put_params(connection, run_id, params or {})
            _put_artifacts(connection, run_id, artifacts)

        metrics = list(metrics)
        self._database.write(work)

    def metric_history(self, run_id: str, name: str) -> list[MetricPoint]:
        """Every value of one metric in the order logged; empty when it was never logged."""
        query = sa.select(run_metrics).where(run_metrics.c.run_id == run_id, run_metrics.c.name == name)
        query = query.order_by(run_metrics.c.seq)
        return self._database.read(lambda c: [_point(row) for row in c.execute(query).mappings()])

    def touching(self, digest: str) -> list[tuple[str, str, str]]:
        """(run id, role, name) of every run of the project that read, made or logged the artifact, oldest first."""
        query = (
            sa.select(run_artifacts.c.run_id, run_artifacts.c.role, run_artifacts.c.name)
            .join(table, table.c.id == run_artifacts.c.run_id)
            .where(run_artifacts.c.digest == digest, table.c.project == self._project)
            .order_by(table.c.created_at, table.c.id)
        )
        return self._database.read(lambda c: [(row[0], row[1], row[2]) for row in c.execute(query)])

    def _one(self, run_id: str) -> sa.Update:
        return table.update().where(table.c.id == run_id, table.c.project == self._project)

    def list(self, *, limit: int = 100, **filters: str | None) -> list[RunRow]:
        """The newest `limit` runs, newest first; `filters` are columns (function, status, pipeline, parent_id, ...)."""
        query = sa.select(table).where(table.c.project == self._project)
        for column, value in filters.items():
            if value is not None:
                query = query.where(table.c[column] == value)
        query = query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)
        return self._database.read(lambda c: [RunRow(**row) for row in c.execute(query).mappings()])


def _put_params(connection: sa.Connection, run_id: str, params: Mapping[str, Any]) -> None:
    put(connection, run_params, [{"run_id": run_id, "name": name, "value": value} for name, value in params.items()])


def _put_metrics(connection: sa.Connection, run_id: str, metrics: Iterable[MetricPoint]) -> None:
    insert_new(connection, run_metrics, _metric_rows(run_id, metrics))


def _put_artifacts(connection: sa.Connection, run_id: str, artifacts: Sequence[RunArtifact]) -> None:
    put(connection, run_artifacts, _artifact_rows(run_id, artifacts))


def _metric_rows(run_id: str, metrics: Iterable[MetricPoint]) -> list[dict[str, Any]]:
    return [
        {**vars(point), "run_id": run_id, "value": None if math.isnan(point.value) else point.value}
        for point in metrics
    ]


def _artifact_rows(run_id: str, artifacts: Sequence[RunArtifact]) -> list[dict[str, Any]]:
    return [{**vars(artifact), "run_id": run_id, "created_at": time.time()} for artifact in artifacts]


def _read_contents(connection: sa.Connection, ids: Sequence[str], found: dict[str, RunContents]) -> None:
    params = sa.select(run_params).where(run_params.c.run_id.in_(ids))
    for row in connection.execute(params).mappings():
        found[row["run_id"]].params[row["name"]] = row["value"]
    last = (
        sa.select(run_metrics.c.run_id, sa.func.max(run_metrics.c.seq).label("seq"))
        .where(run_metrics.c.run_id.in_(ids))
        .group_by(run_metrics.c.run_id, run_metrics.c.name)
        .subquery()
    )
    same = sa.and_(run_metrics.c.run_id == last.c.run_id, run_metrics.c.seq == last.c.seq)
    metrics = sa.select(run_metrics).join(last, same).order_by(run_metrics.c.name)
    for row in connection.execute(metrics).mappings():
        found[row["run_id"]].metrics[row["name"]] = _point(row).value
    artifacts = sa.select(run_artifacts).where(run_artifacts.c.run_id.in_(ids)).order_by(run_artifacts.c.created_at)
    for row in connection.execute(artifacts).mappings():
        found[row["run_id"]].artifacts.setdefault(row["role"], {})[row["name"]] = row["ref"]


def _point(row: Any) -> MetricPoint:
    value = math.nan if row["value"] is None else row["value"]
    return MetricPoint(row["seq"], row["name"], value, row["step"], row["at"])


def _chunks(ids: list[str], size: int = 500) -> Iterable[list[str]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
