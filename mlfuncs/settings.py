"""What mlfuncs reads from its surroundings, in one frozen value.

Each key comes from the environment (`MLFUNCS_<KEY>`), else from `[tool.mlfuncs]` in the nearest
`pyproject.toml`, else from its default. docs/settings.md describes every key; a test checks that it does.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs.errors import SpecError, StorageError, did_you_mean

PREFIX = "MLFUNCS_"
_CHOICES = {"log_level": ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), "log_format": ("text", "json")}
_PROJECT = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Settings:
    """Where state lives and how the parts are reached. Paths are absolute; URLs are as given."""

    home: Path  # state: registry, bundles, artifacts, sockets, logs
    project: str  # rows, Redis keys and tables carry this name
    registry_url: str = ""  # SQLAlchemy URL; empty: SQLite in `home`
    artifacts_url: str = ""  # fsspec URL; empty: `home`/artifacts
    warehouse_url: str = ""  # fsspec URL of the offline feature tables; empty: `home`/warehouse
    redis_url: str = ""  # redis://, rediss:// or redis+cluster://; empty: an embedded server in `home`
    host: str = "127.0.0.1"  # address of the local router
    port: int = 8080  # port of the local router; 0 takes any free one
    token: str = ""  # bearer token that callers of the router must send; needed when `host` is not loopback
    secrets_dir: str = ""  # a directory with one file per secret
    trusted_keys: str = ""  # comma-separated public keys ("ed25519:<base64>") trusted beside the project's own
    registry_pool: int = 5  # database connections a process may hold
    log_level: str = "INFO"
    log_format: str = "text"  # "text" or "json"
    otel_endpoint: str = ""  # OTLP/HTTP collector URL; empty: no export
    kubeflow_host: str = ""  # URL of the Kubeflow Pipelines API
    kubeflow_token: str = ""
    kubernetes_namespace: str = "default"
    kubernetes_keda: str = ""  # namespace of KEDA and its HTTP add-on; empty: no scaling from zero
    kubernetes_gateway: str = ""  # [namespace/]name[@domain] of a Gateway; empty: none
    image_registry: str = ""  # prefix of image names pushed for clusters, e.g. registry.example/team
    base_image: str = ""  # function base image; empty: the one built from this release's Dockerfile
    nuclio_dashboard: str = ""  # URL of a Nuclio dashboard
    nuclio_gateway: str = ""  # domain of Nuclio's API gateways; empty: none
    uv_index_url: str = ""  # package index for locking and building; empty: uv's own default

    @property
    def resolved_registry_url(self) -> str:
        """The registry's SQLAlchemy URL with the default filled in."""
        return self.registry_url or f"sqlite:///{self.home / 'registry.db'}"

    @property
    def resolved_base_image(self) -> str:
        """The image that functions start from: the one set, else the name of the one built from this release."""
        from mlfuncs import __version__

        return self.base_image or f"mlfuncs/base:{__version__}"

    @property
    def resolved_artifacts_url(self) -> str:
        """The artifact store's fsspec URL with the default filled in."""
        return self.artifacts_url or str(self.home / "artifacts")

    @property
    def resolved_warehouse_url(self) -> str:
        """The offline store's fsspec URL with the default filled in."""
        return self.warehouse_url or str(self.home / "warehouse")

    def to_environ(self) -> dict[str, str]:
        """The settings as `MLFUNCS_*` variables, for a child process that must see the same ones."""
        return {
            PREFIX + field.name.upper(): str(getattr(self, field.name))
            for field in dataclasses.fields(self)  # empty ones too: a project file must not fill them in again
        }


def read_settings(environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """The settings that hold for `cwd` (default: the working directory) under `environ` (default: os.environ).

    >>> read_settings({"MLFUNCS_HOME": "/tmp/h", "MLFUNCS_PORT": "9000"}, Path("/tmp/Churn Model")).project
    'churn-model'

    Raises SpecError for an unknown key or a value of the wrong kind.
    """
    environ = os.environ if environ is None else environ
    cwd = _working_directory() if cwd is None else cwd
    names = {field.name: field for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = dict(_project_table(cwd))
    for key, value in environ.items():
        if key.startswith(PREFIX):
            name = key[len(PREFIX) :].lower()
            if name in names:
                values[name] = value
            else:
                _warn_of_misspelt(key)
    for name, value in values.items():
        if name not in names:
            near = did_you_mean(name, names)
            raise SpecError(f"[tool.mlfuncs] has an unknown key {name!r}{near}; known keys: {', '.join(names)}")
        values[name] = _check(name, _coerce(name, value, str(names[name].type)))
    home = Path(values.pop("home", "") or find_home(cwd, environ)).expanduser()
    project = values.pop("project", "") or default_project(home, cwd)
    if not _PROJECT.fullmatch(project):
        raise SpecError(
            f"project {project!r} is not a name: use 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter "
            "or digit; set MLFUNCS_PROJECT"
        )
    return Settings(home=(cwd / home).absolute(), project=project, **values)


@functools.cache
def _warn_of_misspelt(key: str) -> None:
    """Once a process; other variables may carry our prefix, so only one that looks like a setting is worth a word."""
    known = [PREFIX + field.name.upper() for field in dataclasses.fields(Settings)]
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.88):
        warnings.warn(f"{key} is not a setting and is ignored; did you mean {near[0]}?", stacklevel=3)


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as exc:
        raise StorageError("the working directory was deleted; change into one that exists") from exc


def find_home(cwd: Path, environ: Mapping[str, str]) -> Path:
    """The nearest `.mlfuncs` directory at or above `cwd`, else `~/.mlfuncs`."""
    for folder in (cwd, *cwd.parents):
        if (folder / ".mlfuncs").is_dir():
            return folder / ".mlfuncs"
    return Path(environ.get("HOME") or "~").expanduser() / ".mlfuncs"


def default_project(home: Path, cwd: Path) -> str:
    """The name of the folder that holds `.mlfuncs`, else of `cwd`, made into a valid name."""
    folder = home.parent if home.name == ".mlfuncs" and home.parent in (cwd, *cwd.parents) else cwd
    if folder == Path.home() and folder != cwd:
        folder = cwd
    slug = re.sub(r"[^a-z0-9]+", "-", folder.name.lower())[:63].strip("-")
    return slug or "default"


def ensure_home(settings: Settings) -> Path:
    """`settings.home`, created with owner-only access. Raises StorageError when it cannot be written."""
    try:
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(settings.home, os.W_OK | os.X_OK)
    except OSError as exc:
        raise StorageError(_home_message(settings.home, exc.strerror or str(exc))) from exc
    if not writable:
        raise StorageError(_home_message(settings.home, "permission denied"))
    return settings.home


def _home_message(home: Path, reason: str) -> str:
    return f"the home directory {str(home)!r} cannot be written ({reason}); set MLFUNCS_HOME to a folder that can"


def _project_table(cwd: Path) -> dict[str, Any]:
    for folder in (cwd, *cwd.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            try:
                status = path.stat()
                return _read_table(path, status.st_mtime_ns, status.st_size)
            except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as exc:
                raise SpecError(f"{path} cannot be read for [tool.mlfuncs]: {exc}") from exc
    return {}


@functools.lru_cache(maxsize=8)
def _read_table(path: Path, changed_ns: int, size: int) -> dict[str, Any]:
    """Parsing takes a millisecond, and settings are read for every run: parsed once per state of the file."""
    table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    for key in ("tool", "mlfuncs"):
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise SpecError(f"{path} has {key} = {table!r}; write a table: [tool.mlfuncs]")
    return table


def _check(name: str, value: Any) -> Any:
    """The value, when it is one that the key can have. Raises SpecError."""
    mend = f"not {value!r}; set {PREFIX}{name.upper()}"
    if name == "port" and not 0 <= value <= 65535:
        raise SpecError(f"setting port must be between 0 and 65535, {mend}")
    if name == "registry_pool" and value < 1:
        raise SpecError(f"setting registry_pool must be 1 connection or more, {mend}")
    if name in _CHOICES:
        wanted = next((choice for choice in _CHOICES[name] if choice.lower() == value.lower()), None)
        if wanted is None:
            raise SpecError(f"setting {name} must be {' or '.join(_CHOICES[name])}, {mend}")
        return wanted
    return value


def _coerce(name: str, value: Any, kind: str) -> Any:
    if kind == "int":
        try:
            return int(str(value))  # through text: True and 8080.5 are not ports
        except (TypeError, ValueError):
            raise SpecError(
                f"setting {name} must be a whole number, not {value!r}; set {PREFIX}{name.upper()}"
            ) from None
    return str(value)
