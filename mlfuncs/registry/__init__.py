"""The registry: functions, endpoints and their desired state, runs, artifacts and definitions of a project.

SQLite in the home directory by default, PostgreSQL by URL; see `open_registry`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from mlfuncs.errors import StorageError
from mlfuncs.registry.artifacts import Artifacts
from mlfuncs.registry.database import Database
from mlfuncs.registry.definitions import Definition, Definitions
from mlfuncs.registry.endpoints import EndpointRow, Endpoints, Revision
from mlfuncs.registry.functions import Functions, FunctionVersion
from mlfuncs.registry.migrate import ensure_schema
from mlfuncs.registry.runs import MetricPoint, RunArtifact, RunContents, RunRow, Runs, RunState
from mlfuncs.registry.site import site_id
from mlfuncs.settings import Settings, ensure_home

__all__ = [
    "Definition",
    "EndpointRow",
    "FunctionVersion",
    "MetricPoint",
    "Registry",
    "Revision",
    "RunArtifact",
    "RunContents",
    "RunRow",
    "RunState",
    "open_registry",
    "site_id",
]


class Registry:
    """One project's view of a registry."""

    def __init__(self, database: Database, project: str) -> None:
        self.project = project
        self.database = database
        self.functions = Functions(database, project)
        self.endpoints = Endpoints(database, project)
        self.runs = Runs(database, project)
        self.artifacts = Artifacts(database, project)
        self.definitions = Definitions(database, project)


def open_registry(settings: Settings) -> Registry:
    """The registry that `settings` names, its schema made or upgraded if need be; cheap to call again and again.

    Raises RegistryUnavailable when the database does not answer, SchemaTooNew when a newer mlfuncs wrote it,
    StorageError when its file cannot be written, MissingExtra when PostgreSQL's driver is not installed.
    """
    url = settings.resolved_registry_url
    with _LOCK:
        database, identity = _DATABASES.get(url, (None, None))
        if database is None or identity is None or _file_identity(database) != identity:
            if database is not None:
                database.close()  # its file was removed or replaced
            database = _connect(settings, url)
            _DATABASES[url] = database, _file_identity(database)
    return Registry(database, settings.project)


_DATABASES: dict[str, tuple[Database, object]] = {}
_LOCK = threading.Lock()


def _connect(settings: Settings, url: str) -> Database:
    database = Database(url, settings.registry_pool)
    if database.is_sqlite:
        ensure_home(settings)
        folder = Path(str(database.url.database)).parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"{str(folder)!r} cannot be made ({exc.strerror}); set MLFUNCS_REGISTRY_URL") from exc
    ensure_schema(database)
    return database


def _file_identity(database: Database) -> object:
    if not database.is_sqlite:
        return "server"
    try:
        status = os.stat(str(database.url.database))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _new_lock() -> None:
    global _LOCK
    _LOCK = threading.Lock()  # another thread of the parent may have held it at the fork


os.register_at_fork(after_in_child=_new_lock)
