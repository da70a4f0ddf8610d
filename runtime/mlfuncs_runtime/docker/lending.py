"""What the process beside a container lends it of the home: a way to the router, to the online features, definitions.

Nothing of it is in the container's description: it goes with the order, on standard input, because a URL may hold a
password. A function that declares no features gets no way to Redis.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.errors import Unavailable
from mlfuncs.serving.endpoints import CALL_URL
from mlfuncs.serving.unix_http import unix_url
from mlfuncs.settings import Settings
from mlfuncs_runtime.docker.entry import SOCKET
from mlfuncs_runtime.docker.relay import Door
from mlfuncs_runtime.supervisor.places import find_places, read_json

INSIDE = SOCKET.rpartition("/")[0]  # the replica's directory, as its container sees it
ROUTER, REDIS, BUNDLES = "router.sock", "redis.sock", "bundles"


@dataclass
class Lent:
    """`environ` and `documents` go with the order; `doors` are opened in the replica's directory."""

    environ: dict[str, str]
    doors: dict[str, Door]
    documents: list[Any] = field(default_factory=list)


def lend_router(settings: Settings) -> Lent:
    """What calls to other endpoints need: the home's router, and the token that it asks for."""
    environ = {CALL_URL: f"{unix_url(f'{INSIDE}/{ROUTER}')}/{{name}}"}
    if settings.token:
        environ["MLFUNCS_TOKEN"] = settings.token
    return Lent(environ, {ROUTER: lambda: connect_to_router(settings)})


def lend(config: Mapping[str, Any], settings: Settings, folder: Path) -> Lent:
    """What the replica of this WorkerConfig needs; code that its features use is copied to `folder`.

    Raises SpecError when its features are on a Redis that a container cannot reach.
    """
    lent = lend_router(settings)
    if config.get("features"):
        _lend_features(lent, settings, folder)
    return lent


def connect_to_router(settings: Settings) -> socket.socket:
    """A connection to the home's router, wherever it listens now. Raises OSError and Unavailable."""
    known = read_json(find_places(settings).router_json)
    if not known:
        raise Unavailable("the router does not run")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(known["host"], known["host"])
    connection = socket.create_connection((host, int(known["port"])), timeout=10.0)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _lend_features(lent: Lent, settings: Settings, folder: Path) -> None:
    from mlfuncs import adapters

    features = adapters.load("features:lend")(settings, f"{INSIDE}/{REDIS}")
    lent.documents = features.documents
    lent.environ["MLFUNCS_REDIS_URL"] = features.redis_url
    if features.connect is not None:
        lent.doors[REDIS] = features.connect
    for digest in features.bundles:
        shutil.copytree(settings.home / "bundles" / digest, folder / BUNDLES / digest, dirs_exist_ok=True)
    for path in (folder, *folder.rglob("*")):  # the container's user, who owns the directory, reads them
        os.chown(path, folder.stat().st_uid, folder.stat().st_gid)
