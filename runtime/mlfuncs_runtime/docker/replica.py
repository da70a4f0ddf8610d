"""The process beside one replica's container: for the supervisor it is the worker.

    python -m mlfuncs_runtime.docker.replica --config FILE.json

It makes and starts the container, gives it its order and its secrets on standard input, copies what it prints, passes
signals on, and ends with its status. The container ends when this process does, however that happens: its standard
input ends then. So the supervisor handles containers exactly as processes, also after it was killed itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError, NotFound, Unavailable
from mlfuncs.secrets import resolve_secrets
from mlfuncs.settings import read_settings
from mlfuncs.spec import Resources
from mlfuncs_runtime.docker.container import HOME_LABEL, OWNER_LABEL, ContainerPlan, container_body
from mlfuncs_runtime.docker.engine import DockerEngine, read_answer
from mlfuncs_runtime.docker.entry import FORWARDED, SOCKET
from mlfuncs_runtime.docker.lending import lend
from mlfuncs_runtime.docker.relay import open_doors

USER = 10001  # the image's; a supervisor of another user has its containers run as that user
_LOOK_S = 0.01  # how often a starting container's socket is looked for
EXIT_CANNOT_START = 78  # EX_CONFIG of sysexits.h: trying again would not help


def main(argv: Sequence[str] | None = None) -> int:
    """Be a replica until its container has ended; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlfuncs_runtime.docker.replica", description=__doc__)
    parser.add_argument("--config", required=True, help="path of a WorkerConfig as JSON, with a 'container' part")
    values = json.loads(Path(parser.parse_args(argv).config).read_text(encoding="utf-8"))
    container, path = values.pop("container"), str(values["socket"])
    folder = Path(f"{path}.d")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in FORWARDED:
        signal.signal(number, lambda *_: None)
    try:
        return Replica(DockerEngine(), values, container, folder).run(path, reader)
    except MlfuncsError as exc:
        _tell(path, exc.to_problem())
        print(f"{values.get('replica')}: {exc}", flush=True)
        return EXIT_CANNOT_START
    finally:
        if problem := read_plain_file(folder / f"{Path(SOCKET).name}.error"):
            Path(f"{path}.error").write_bytes(problem)
        remove_shared_folder(folder)


class Replica:
    """One container and the connections to it."""

    def __init__(
        self, engine: DockerEngine, config: Mapping[str, Any], container: Mapping[str, Any], folder: Path
    ) -> None:
        self._engine, self._config, self._container, self._folder = engine, config, container, folder

    def run(self, path: str, signals: int) -> int:
        """Start the container, serve as its streams and signals, and return its exit status."""
        settings = read_settings()
        secrets = resolve_secrets(self._config.get("secrets") or (), settings)
        user = self._prepare(path)
        lent = lend(self._config, settings, self._folder)
        open_doors(self._folder, lent.doors, user)
        order = {"config": self._config, "secrets": secrets, "environ": lent.environ, "definitions": lent.documents}
        remove_orphans(self._engine, str(self._container["home"]))
        name = self._create(user)
        try:
            with self._engine.attach(name) as streams, self._engine.open("POST", _wait_path(name)) as ended:
                ended.settimeout(None)
                self._engine.call("POST", f"/containers/{name}/start")
                streams.sendall(json.dumps(order).encode() + b"\n")
                self._copy(name, streams, signals, path)
                return int(read_answer(ended, "wait")["StatusCode"])
        except BaseException:
            self._engine.remove(name)
            raise

    def _prepare(self, path: str) -> str:
        """The directory that is shared with the container; the user to run as."""
        with suppress(FileNotFoundError):
            os.unlink(path)
        return make_shared_folder(self._folder)

    def _create(self, user: str) -> str:
        plan = ContainerPlan(
            image=self._container["image"],
            replica=str(self._config["replica"]),
            folder=str(self._folder),
            user=user,
            resources=Resources(**self._config.get("resources") or {}),
            environ=self._container["environ"],
            labels={HOME_LABEL: self._container["home"], OWNER_LABEL: own_mark()},
        )
        body = dataclasses.replace(plan, environ=dict(plan.environ))
        name = urllib.parse.quote(f"mlfuncs-{self._config['replica']}")
        try:
            made = self._engine.call("POST", f"/containers/create?name={name}", container_body(body))
        except NotFound as exc:
            raise NotFound("image", plan.image, hint="in the Docker Engine; deploy again to build it") from exc
        return str(made["Id"])

    def _copy(self, name: str, streams: socket.socket, signals: int, path: str) -> None:
        """Copy output until it ends, pass signals on, and show the worker's socket at `path` once it is there."""
        buffer, shown = b"", False
        while True:
            ready, _, _ = select.select([streams.fileno(), signals], [], [], None if shown else _LOOK_S)
            shown = shown or show_socket(self._folder / Path(SOCKET).name, path)
            if signals in ready:
                for number in os.read(signals, 256):
                    if number in FORWARDED:
                        with suppress(MlfuncsError):  # it has ended meanwhile
                            self._engine.call("POST", f"/containers/{name}/kill?signal={signal.Signals(number).name}")
            if streams.fileno() in ready:
                part = streams.recv(65536)
                if not part:
                    return
                text, buffer = frames(buffer + part)
                os.write(1, text)


def make_shared_folder(folder: Path) -> str:
    """Make a directory that a container shares, after those that a crash left; "uid:gid" of the user to run as."""
    remove_stale_folders(folder.parent)
    owner_file(folder).write_text(own_mark(), encoding="ascii")  # before the folder, which is stale without it
    folder.mkdir(mode=0o700, exist_ok=True)
    uid, gid = container_user()
    if os.getuid() != uid:
        os.chown(folder, uid, gid)
    return f"{uid}:{gid}"


def remove_shared_folder(folder: Path) -> None:
    """Remove what `make_shared_folder` made."""
    shutil.rmtree(folder, ignore_errors=True)
    owner_file(folder).unlink(missing_ok=True)


def container_user() -> tuple[int, int]:
    """The user and group that containers of this process run as: its own, but never root."""
    return (USER, USER) if os.getuid() == 0 else (os.getuid(), os.getgid())


def frames(data: bytes) -> tuple[bytes, bytes]:
    """The output in whole frames of an attached stream, and the rest: 4 bytes of kind, 4 of length, the content.

    >>> frames(b"\\x01\\0\\0\\0" + b"\\0\\0\\0\\x02hi" + b"\\x02")
    (b'hi', b'\\x02')
    """
    text = b""
    while len(data) >= 8:
        length = struct.unpack(">I", data[4:8])[0]
        if len(data) < 8 + length:
            break
        text, data = text + data[8 : 8 + length], data[8 + length :]
    return text, data


def remove_orphans(engine: DockerEngine, home: str) -> int:
    """Remove this home's containers whose process here is gone; how many there were."""
    found = 0
    for container in engine.containers({HOME_LABEL: home}):
        if not _lives(str(container["Labels"].get(OWNER_LABEL, ""))):
            engine.remove(container["Id"])
            found += 1
    return found


def remove_stale_folders(sockets: Path) -> None:
    """Remove the directories of replicas whose process was killed."""
    for folder in sockets.glob("*.sock.d"):
        owner = owner_file(folder)
        if not _lives(owner.read_text(encoding="ascii") if owner.exists() else ""):
            shutil.rmtree(folder, ignore_errors=True)
            owner.unlink(missing_ok=True)


def owner_file(folder: Path) -> Path:
    """Where the process that a replica's directory belongs to is noted: beside it, out of the container's reach."""
    return folder.with_suffix(".owner")


def show_socket(made: Path, path: str) -> bool:
    """Give the socket that the container made the name the router knows; whether it is there already.

    By a hard link, and only of a socket: a symbolic link could lead the router to any socket of this machine.
    """
    try:
        os.link(made, path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        os.unlink(path)
        raise Unavailable(f"the container put something else than a socket at {SOCKET}")
    return True


def read_plain_file(path: Path, most: int = 65536) -> bytes:
    """What a container wrote there; nothing when it is a link, a pipe or not there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(handle, "rb") as file:
        return file.read(most) if stat.S_ISREG(os.fstat(handle).st_mode) else b""


def own_mark() -> str:
    """This process, so that no later one is taken for it: "pid:start"."""
    from mlfuncs_runtime.supervisor.processes import start_ticks

    return f"{os.getpid()}:{start_ticks(os.getpid())}"


def _lives(mark: str) -> bool:
    from mlfuncs_runtime.supervisor.processes import start_ticks

    pid, _, started = mark.partition(":")
    return pid.isdigit() and str(start_ticks(int(pid))) == started


def _wait_path(name: str) -> str:
    return f"/containers/{name}/wait?condition=next-exit"


def _tell(path: str, problem: Mapping[str, Any]) -> None:
    with suppress(OSError):
        Path(f"{path}.error").write_text(json.dumps(problem), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
