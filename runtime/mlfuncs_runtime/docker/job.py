"""A run in a container: the process that stands where an isolated run's interpreter would, and passes everything on.

    python -m mlfuncs_runtime.docker.job PLAN ANSWER_FD

PLAN is JSON: {"image": name, "resources": {...}, "secrets": [names]}. Tasks come on standard input and go to the
container's, after one line with the settings and the secrets, which are files in memory there; its output is ours, its
answers go to ANSWER_FD. The home is shared with the container under the same path: journal, artifacts and bundles are
one; and, as a replica's, a directory with a way to the router. The container runs as the user that owns the home,
without any capability, on a read-only file system.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.secrets import available_secrets
from mlfuncs.settings import Settings, read_settings
from mlfuncs.spec import FunctionSpec, Resources
from mlfuncs_runtime.docker.container import HOME_LABEL, OWNER_LABEL, ContainerPlan, container_body
from mlfuncs_runtime.docker.engine import DockerEngine, read_answer
from mlfuncs_runtime.docker.entry import FORWARDED
from mlfuncs_runtime.docker.lending import lend_router
from mlfuncs_runtime.docker.relay import open_doors

_UNSHARED = ("MLFUNCS_TRUSTED_KEYS", "MLFUNCS_SECRETS_DIR")
_OWN_PLACES = frozenset({"environments", "images", "logs", "redis", "run", "warehouse"})
_ANSWER_STREAM = 2  # a job's standard error carries its answers: see container.py


def job_command(bundle: str, spec: FunctionSpec, settings: Settings) -> list[str]:
    """The command of the process for runs of this function; its image is built when the engine lacks it."""
    from mlfuncs.serving.revision_config import RevisionConfig
    from mlfuncs_runtime.images.docker_builder import DockerBuilder
    from mlfuncs_runtime.images.function_image import ImageFunction, assemble, wished_base

    builder = DockerBuilder(settings)
    made = [ImageFunction(spec.name, bundle, RevisionConfig(spec))]
    image = assemble(made, builder.base(_say, wished_base(made, settings)), settings)
    reference = f"mlfuncs/{settings.project}-{spec.name}:run-{image.id.removeprefix('sha256:')[:12]}"
    if not builder.has(reference):
        builder.store(image, [reference])
    wanted = {"image": reference, "resources": asdict(spec.resources), "secrets": list(spec.secrets)}
    return [sys.executable, "-P", "-m", "mlfuncs_runtime.docker.job", json.dumps(wanted)]


def main(argv: Sequence[str] | None = None) -> int:
    """Be one container's stand-in until it ends; its exit status."""
    wanted, answer_to = sys.argv[1:] if argv is None else argv
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in FORWARDED:
        signal.signal(number, lambda *_: None)
    try:
        return run(DockerEngine(), json.loads(wanted), int(answer_to), reader)
    except MlfuncsError as exc:
        print(f"the run's container cannot be started: {exc}", flush=True)
        return 78


def run(engine: DockerEngine, wanted: Mapping[str, Any], answer_to: int, signals: int) -> int:
    """Start the container, pass tasks, output, answers and signals on, and return its status."""
    from mlfuncs_runtime.docker.launch import home_mark
    from mlfuncs_runtime.docker.replica import make_shared_folder, own_mark, remove_orphans, remove_shared_folder
    from mlfuncs_runtime.supervisor.places import find_places

    settings = read_settings()
    remove_orphans(engine, home_mark(settings))
    replica = f"run-{os.getpid()}"
    folder = find_places(settings).sockets / f"{replica}.sock.d"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    user = make_shared_folder(folder)
    lent = lend_router(settings)
    open_doors(folder, lent.doors, user)
    plan = ContainerPlan(
        image=wanted["image"],
        replica=replica,
        folder=str(folder),
        user=user,
        resources=Resources(**wanted["resources"]),
        labels={HOME_LABEL: home_mark(settings), OWNER_LABEL: own_mark()},
    )
    try:
        secrets = available_secrets(wanted["secrets"], settings)
        order = {"secrets": secrets, "environ": _environ(settings) | lent.environ}
        name = str(engine.call("POST", "/containers/create", job_body(plan, settings.home))["Id"])
        return _see_through(engine, name, order, settings.home, (answer_to, signals))
    finally:
        remove_shared_folder(folder)


def _see_through(engine: DockerEngine, name: str, order: Mapping[str, Any], home: Path, ends: tuple[int, int]) -> int:
    """Start the container and pass on until it ends; its status. `ends`: where answers go, where signals come from."""
    try:
        with (
            engine.attach(name) as streams,
            engine.open("POST", f"/containers/{name}/wait?condition=next-exit") as ended,
        ):
            ended.settimeout(None)
            engine.call("POST", f"/containers/{name}/start")
            streams.sendall(json.dumps(order).encode() + b"\n")
            _pass_on(engine, name, home, streams, *ends)
            return int(read_answer(ended, "wait")["StatusCode"])
    except BaseException:
        engine.remove(name)
        raise


def job_body(plan: ContainerPlan, home: Path) -> dict[str, Any]:
    """The body that creates the container: as a replica's, with the home beside the directory of the sockets."""
    body = container_body(plan)
    body["Cmd"] = ["--job"]
    body["HostConfig"]["Mounts"].append({"Type": "bind", "Source": str(home), "Target": str(home)})
    return body


def _environ(settings: Settings) -> dict[str, str]:
    own = settings.to_environ()
    own["MLFUNCS_ARTIFACTS_URL"] = settings.artifacts_url
    return {name: value for name, value in own.items() if name not in _UNSHARED}


def give_home(home: Path, uid: int, gid: int) -> None:
    """Let a user who is not this process's read and write what a run shares: as root only, and it keeps its access.

    What a run has no business with, the other processes' sockets and logs above all, stays as it is.
    """
    if os.getuid() == uid:
        return
    os.chown(home, uid, gid)
    for place in sorted(os.listdir(home)):
        if place not in _OWN_PLACES:
            os.chown(home / place, uid, gid, follow_symlinks=False)
            for folder, folders, files in os.walk(home / place):
                for name in (*folders, *files):
                    os.chown(os.path.join(folder, name), uid, gid, follow_symlinks=False)


def _pass_on(engine: DockerEngine, name: str, home: Path, streams: socket.socket, answer_to: int, signals: int) -> None:
    from mlfuncs_runtime.docker.replica import container_user

    buffer, sources = b"", [streams.fileno(), signals, 0]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if 0 in ready:
            task = os.read(0, 65536)
            if task:
                give_home(home, *container_user())  # what came since the last task, its journal among it
                streams.sendall(task)
            else:
                sources.remove(0)
                streams.shutdown(socket.SHUT_WR)
        if signals in ready:
            for number in os.read(signals, 256):
                if number in FORWARDED:
                    with suppress(MlfuncsError):  # it has ended meanwhile
                        engine.call("POST", f"/containers/{name}/kill?signal={signal.Signals(number).name}")
        if streams.fileno() in ready:
            part = streams.recv(65536)
            if not part:
                return
            buffer = _write_frames(buffer + part, answer_to)


def _write_frames(data: bytes, answer_to: int) -> bytes:
    """Write whole frames where their stream belongs; the rest."""
    while len(data) >= 8:
        length = struct.unpack(">I", data[4:8])[0]
        if len(data) < 8 + length:
            break
        os.write(answer_to if data[0] == _ANSWER_STREAM else 1, data[8 : 8 + length])
        data = data[8 + length :]
    return data


def _say(note: str) -> None:
    print(f"mlfuncs: {note}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
