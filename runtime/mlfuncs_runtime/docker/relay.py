"""Unix sockets that lead on to servers of the host: how a container without a way to the host reaches just those.

A replica's own directory is mounted into its container. The process beside the container listens there, and each
connection is passed on, byte by byte, to a server that only the host sees: the router, the home's Redis. Where a
connection leads is decided here, so that a container reaches these servers and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from mlfuncs.errors import MlfuncsError

_CHUNK = 65536
_BACKLOG = 128
_MOST = 256  # connections of one container at once; a guess, far above what a worker's pools keep

Door = Callable[[], socket.socket]  # opens a connection to the server; raises OSError or MlfuncsError


def open_doors(folder: Path, doors: Mapping[str, Door], user: str) -> None:
    """Listen on `folder`/<name> for each door until this process ends; only `user` ("uid:gid") may connect."""
    uid, _, gid = user.partition(":")
    for name, door in doors.items():
        listener = socket.socket(socket.AF_UNIX)
        path = folder / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o600)
        if int(uid) != os.getuid():
            os.chown(path, int(uid), int(gid))
        listener.listen(_BACKLOG)
        threading.Thread(target=_serve, args=(listener, door), daemon=True, name=name).start()


def _serve(listener: socket.socket, door: Door) -> None:
    free = threading.Semaphore(_MOST)  # further ones wait in the backlog
    while free.acquire():
        near, _ = listener.accept()
        threading.Thread(target=_connect, args=(near, door, free), daemon=True).start()


def _connect(near: socket.socket, door: Door, free: threading.Semaphore) -> None:
    """Pass on in both directions until both have ended; a server that cannot be reached is a closed connection."""
    with contextlib.ExitStack() as stack, near:
        stack.callback(free.release)
        try:
            far = door()
        except (OSError, MlfuncsError) as exc:
            print(f"a connection of the container was not passed on: {exc}", flush=True)
            return
        with far:
            back = threading.Thread(target=_pass_on, args=(far, near), daemon=True)
            back.start()
            _pass_on(near, far)
            back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    try:
        while part := source.recv(_CHUNK):
            target.sendall(part)
    except OSError:
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
