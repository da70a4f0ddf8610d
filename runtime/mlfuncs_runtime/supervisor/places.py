"""Where a home keeps what runs: sockets, state, configs and logs.

A Unix socket's path may have 107 bytes (`sun_path` in unix(7)), so a home with a long path has its sockets in a
short directory of its own under the system's temporary one, readable by its owner only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs.errors import StorageError
from mlfuncs.settings import Settings, ensure_home

_LONGEST_HOME_RUN = 80  # leaves room for "/w-0123456789.sock" below the limit


@dataclass(frozen=True)
class Places:
    """Paths below one home; `sockets` is the directory of the Unix sockets."""

    home: Path
    sockets: Path

    @property
    def run(self) -> Path:
        """State of what runs now."""
        return self.home / "run"

    @property
    def lock(self) -> Path:
        """Held by the one supervisor of this home."""
        return self.run / "supervisor.lock"

    @property
    def state(self) -> Path:
        """What runs, for the next supervisor."""
        return self.run / "state.json"

    @property
    def router_json(self) -> Path:
        """Address and URL of the router."""
        return self.run / "router.json"

    @property
    def routes_json(self) -> Path:
        """The router's table, for the next router."""
        return self.run / "routes.json"

    @property
    def triggers_status(self) -> Path:
        """How the triggers go, by the trigger process."""
        return self.run / "triggers-status.json"

    @property
    def configs(self) -> Path:
        """Documents that workers and zygotes read at start."""
        return self.run / "configs"

    @property
    def logs(self) -> Path:
        """Logs of the supervisor and the router, and below it of the endpoints."""
        return self.home / "logs"

    @property
    def supervisor_socket(self) -> Path:
        """Where the supervisor takes orders."""
        return self.sockets / "supervisor.sock"

    @property
    def router_socket(self) -> Path:
        """Where the router takes orders."""
        return self.sockets / "router.sock"

    def endpoint_log(self, endpoint: str, revision: str) -> Path:
        """The log that all processes of a revision append to."""
        return self.logs / "endpoints" / endpoint / f"{revision}.log"


def find_places(settings: Settings) -> Places:
    """The places of `settings.home`; nothing is created."""
    home = settings.home
    if len(os.fsencode(home / "run")) <= _LONGEST_HOME_RUN:
        return Places(home, home / "run")
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    return Places(home, Path(tempfile.gettempdir()) / f"mlfuncs-{os.getuid()}-{digest}")


def make_places(settings: Settings) -> Places:
    """The places of `settings.home`, its directories made. Raises StorageError when they cannot be."""
    ensure_home(settings)
    places = find_places(settings)
    try:
        for folder in (places.run, places.configs, places.logs, places.sockets):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(places.sockets)
    except OSError as exc:
        raise StorageError(f"{exc.filename!r} cannot be written ({exc.strerror}); set MLFUNCS_HOME") from exc
    return places


def remove_sockets(places: Places) -> None:
    """Remove what a stopped home needs no more; its state, logs and registry stay."""
    for path in places.sockets.glob("*.sock"):
        path.unlink(missing_ok=True)
    shutil.rmtree(places.configs, ignore_errors=True)
    for path in (places.router_json, places.routes_json, places.state):
        path.unlink(missing_ok=True)
    if places.sockets != places.run:
        with contextlib.suppress(OSError):
            places.sockets.rmdir()


def write_json(path: Path, values: Any) -> None:
    """`values` as JSON at `path`, whole or not at all, readable by the owner only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(values, file)
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote, or None when there is nothing whole at `path`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_private(folder: Path) -> None:
    """A directory in a shared place must be ours alone: another user could listen on our sockets."""
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid():
        raise StorageError(f"{str(folder)!r} belongs to someone else; remove it, or set MLFUNCS_HOME to a shorter path")
    if seen.st_mode & 0o077:
        folder.chmod(0o700)
