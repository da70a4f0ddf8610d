"""The entry of a function's container: a first process that minds the worker, and the worker itself.

    python -m mlfuncs_runtime.docker.entry              serve the function of this image on port 8080
    python -m mlfuncs_runtime.docker.entry --replica    serve on a Unix socket, as the first line of standard input says
    python -m mlfuncs_runtime.docker.entry --job        execute runs that come in on standard input
    python -m mlfuncs_runtime.docker.entry --run DIR    execute the one run that DIR orders, as a cluster's Job does
    python -m mlfuncs_runtime.docker.entry --check      0 when the function answers health checks (HEALTHCHECK)

The first process of a container inherits every orphan and gets the signals of `docker stop`: ours passes signals on,
reaps, and ends with the worker's status. It imports next to nothing, so it costs a few megabytes. A replica also ends
when its standard input does: whoever started it is gone then, and nobody would ever stop it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

PORT = 8080
SOCKET = "/run/mlfuncs/worker.sock"  # where a replica serves; the directory is shared with the host
SECRETS_DIR = "/run/secrets/mlfuncs"
_MEMORY_EVENTS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: Sequence[str] | None = None) -> int:
    """Be the container's first process; its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--check"]:
        return check()
    order = read_order() if arguments == ["--replica"] else None
    reader, writer = os.pipe()  # wakes the first process; made before the fork so that no signal is missed
    os.set_blocking(writer, False)
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.close(writer)
        if arguments == ["--job"]:
            return run_job()
        _close_input()
        if arguments[:1] == ["--run"]:
            from mlfuncs_runtime.kubernetes.job_pod import run_order

            return run_order(arguments[1])
        from mlfuncs_runtime.docker.inside import run_worker

        return run_worker(order)
    return mind(child, reader, writer, lifeline=order is not None)


def run_job() -> int:
    """Execute tasks as an isolated run's interpreter does; what runs print, on either descriptor, is output.

    The first line of standard input has the secrets' values and the settings.
    """
    from pathlib import Path

    from mlfuncs_runtime.docker.inside import keep_secrets

    order = read_order()
    os.environ.update(order["environ"])
    keep_secrets(order["secrets"], Path(SECRETS_DIR))
    answers = os.dup(2)
    os.dup2(1, 2)
    sys.argv[1:] = [str(answers)]
    from mlfuncs.runs.child import main as run_child

    run_child()
    return 0


def mind(child: int, reader: int, writer: int, lifeline: bool) -> int:
    """Pass signals to `child`, reap whatever ends, and return the child's status as a shell would say it."""
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    watched = [reader, 0] if lifeline else [reader]
    while True:
        status = _reap(child)
        if status is not None:
            explain_kill(status)
            return status
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready and not os.read(0, 4096):
            os.kill(child, signal.SIGKILL)
            watched.remove(0)
        if reader in ready:
            for received in os.read(reader, 4096):
                if received in FORWARDED:
                    os.kill(child, received)


def _reap(child: int) -> int | None:
    """Collect every process that ended; the status of `child` when it was among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code


def explain_kill(status: int) -> None:
    """Say when the kernel ended the worker for want of memory, which otherwise looks like any other kill."""
    if status != 128 + signal.SIGKILL or not any(_kills(path) for path in _MEMORY_EVENTS):
        return
    reason = "it needed more memory than the container may have; raise resources.memory"
    print(f"the worker was killed: {reason}", file=sys.stderr, flush=True)
    problem = {"type": "about:blank", "title": "OutOfMemory", "status": 500, "detail": reason}
    folder = os.path.dirname(SOCKET)
    if os.access(folder, os.W_OK):
        with open(f"{SOCKET}.error", "w", encoding="utf-8") as file:
            json.dump(problem, file)


def _kills(path: str) -> int:
    """How often the kernel killed for memory in this container, as cgroup v2 or v1 counts it; 0 when unknown."""
    try:
        with open(path, encoding="ascii") as file:
            counts = dict(line.split(" ", 1) for line in file.read().splitlines())
        return int(counts.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def read_order() -> Mapping[str, Any]:
    """The first line of standard input: {"config": WorkerConfig, "secrets": {name: value}}. It is written nowhere."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(0, 1)  # not one byte further: what follows is the lifeline
        if not part:
            raise SystemExit("the order for this replica did not come on standard input")
        line += part
    order: dict[str, Any] = json.loads(line)
    return order


def check() -> int:
    """0 when the function in this container answers, else 1."""
    import socket

    try:
        if os.path.exists(SOCKET):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(4.0)
            connection.connect(SOCKET)
        else:
            connection = socket.create_connection(("127.0.0.1", port()), 4.0)
        with connection:
            connection.sendall(b"GET /-/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return 0 if b" 200 " in connection.recv(64) else 1
    except OSError:
        return 1


def port() -> int:
    """Where the container listens: PORT, which Knative sets, else 8080."""
    return int(os.environ.get("PORT") or PORT)


def _close_input() -> None:
    """The worker's standard input is empty: the order and the lifeline are the first process's."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
