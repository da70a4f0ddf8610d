"""The registry's tables.

Times are UNIX seconds UTC (floats), documents are JSON text with sorted keys (so NaN, infinities and NUL characters
survive on every database), digests are SHA-256 in hex. Every row belongs to a project. All names start with
`mlfuncs_`, so a database may be shared with other programs.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

HEAD = "0002"  # the schema this release writes; a test holds it equal to the newest migration
KNOWN = ("0001", "0002")  # every schema this release can upgrade from, oldest first
VERSION_TABLE = "mlfuncs_version"

metadata = sa.MetaData(
    naming_convention={"ix": "ix_%(table_name)s_%(column_0_N_name)s", "pk": "pk_%(table_name)s"},
)


def canonical(document: Any) -> str:
    """`document` as JSON text that is equal for equal documents."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


class Document(TypeDecorator[Any]):
    """A JSON document kept as canonical text. None is SQL NULL where the column may be NULL, else JSON's null."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, nullable: bool) -> None:
        super().__init__()
        self.nullable = nullable

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None and self.nullable else canonical(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


def _text(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, **{"nullable": False, **options})


def _time(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Double, **{"nullable": False, **options})


def _document(name: str, **options: Any) -> sa.Column[Any]:
    options = {"nullable": False, **options}
    return sa.Column(name, Document(options["nullable"]), **options)


version = sa.Table(VERSION_TABLE, sa.MetaData(), sa.Column("version_num", sa.String(32), primary_key=True))

# One row per ever-growing number; its row lock makes the numbers appear in commit order.
counters = sa.Table(
    "mlfuncs_counters",
    metadata,
    _text("name", primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

function_versions = sa.Table(
    "mlfuncs_function_versions",
    metadata,
    _text("project", primary_key=True),
    _text("name", primary_key=True),
    _text("digest", primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),  # 1, 2, ... in the order first recorded
    _document("manifest"),
    _time("created_at"),
    _time("recorded_at"),  # when this version was last recorded: the latest is what the code says now
)

endpoints = sa.Table(
    "mlfuncs_endpoints",
    metadata,
    _text("project", primary_key=True),
    _text("name", primary_key=True),
    _text("target"),
    _text("site"),  # whose supervisor reconciles it; empty: any (a cluster does)
    _document("desired"),
    _document("observed"),  # what the reconciler last saw; never bumps the generation
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("next_revision", sa.Integer, nullable=False),
    sa.Column("deleted", sa.Boolean, nullable=False),  # a tombstone until the reconciler has torn it down
    _time("created_at"),
    _time("updated_at"),
    sa.Index(None, "site", "generation"),
)

revisions = sa.Table(
    "mlfuncs_revisions",
    metadata,
    _text("project", primary_key=True),
    _text("endpoint", primary_key=True),
    _text("revision", primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    _text("digest"),  # of the bundle
    _document("config"),
    _time("created_at"),
)

runs = sa.Table(
    "mlfuncs_runs",
    metadata,
    _text("id", primary_key=True),
    _text("project"),
    _text("function"),
    _text("kind"),  # "run", "sweep" or "pipeline"
    _text("status"),
    _text("isolation"),
    _text("parent_id", nullable=True),
    _text("pipeline", nullable=True),
    _text("step", nullable=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    _time("created_at"),
    _time("started_at", nullable=True),
    _time("finished_at", nullable=True),
    _time("heartbeat_at", nullable=True),  # by the database's clock
    _document("owner", nullable=True),  # the process that executes it: machine, host, pid, start time
    _document("error", nullable=True),  # type, message, traceback
    _document("versions"),  # digests of code, environment and data, git commit
    _document("details"),  # log path and whatever else is only shown
    _time("cpu_s", nullable=True),
    _time("peak_memory_mib", nullable=True),
    sa.Index(None, "project", "created_at"),
    sa.Index(None, "project", "status"),
    sa.Index(None, "project", "function", "created_at"),
    sa.Index(None, "parent_id"),
)

run_params = sa.Table(
    "mlfuncs_run_params",
    metadata,
    _text("run_id", primary_key=True),
    _text("name", primary_key=True),
    _document("value"),
)

run_metrics = sa.Table(
    "mlfuncs_run_metrics",
    metadata,
    _text("run_id", primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),  # order logged; makes a replay harmless
    _text("name"),
    sa.Column("value", sa.Double, nullable=True),  # NULL is not-a-number: SQLite has no NaN
    sa.Column("step", sa.BigInteger, nullable=True),
    _time("at"),
    sa.Index(None, "run_id", "name", "seq"),
)

run_artifacts = sa.Table(
    "mlfuncs_run_artifacts",
    metadata,
    _text("run_id", primary_key=True),
    _text("role", primary_key=True),  # "input", "output" or "logged"
    _text("name", primary_key=True),
    _text("digest", nullable=True),  # None: a small plain value, kept in `ref`
    _document("ref"),
    _time("created_at"),
    sa.Index(None, "digest"),
)

artifacts = sa.Table(
    "mlfuncs_artifacts",
    metadata,
    _text("project", primary_key=True),
    _text("digest", primary_key=True),
    _text("kind"),
    _document("ref"),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    _time("created_at"),
)

definitions = sa.Table(
    "mlfuncs_definitions",
    metadata,
    _text("project", primary_key=True),
    _text("kind", primary_key=True),
    _text("name", primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    _document("body", nullable=True),  # None: deleted at this version
    _time("created_at"),
)

ENDPOINTS_COUNTER = "endpoints"


def seed(connection: sa.Connection) -> None:
    """The rows that a new database starts with."""
    connection.execute(counters.insert().values(name=ENDPOINTS_COUNTER, value=0))
