"""The worker in a container: the function baked into the image, on a TCP port or as a replica on a Unix socket.

An image holds, below `/opt/function`: `functions/<name>.json` (a WorkerConfig each), `bundles/` and `artifacts/` as in
a home, and `site-packages/`. A container listens on every address of its own network on purpose: what reaches it is
the cluster's to say, and the manifests bring a NetworkPolicy.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import MlfuncsError, NotFound, SpecError
from mlfuncs.settings import Settings, read_settings
from mlfuncs.spec import Resources
from mlfuncs_runtime.docker.entry import SECRETS_DIR, SOCKET, port

if TYPE_CHECKING:
    from mlfuncs_runtime.worker.asgi import WorkerApp
    from mlfuncs_runtime.worker.config import WorkerConfig

FUNCTION_ROOT = Path("/opt/function")
TERMINATION_LOG = Path("/dev/termination-log")  # Kubernetes shows what is written there as the reason of an exit
_BACKLOG = 1024


def run_worker(order: Mapping[str, Any] | None) -> int:
    """Load the function and serve it until SIGTERM has drained it; the process's exit status."""
    from mlfuncs_runtime.worker.config import WorkerConfig
    from mlfuncs_runtime.worker.process import EXIT_LOAD_FAILED, load_app, prepare_process, report_load_failure, serve

    try:
        if order is None:
            config = image_config(FUNCTION_ROOT, os.environ)
        else:
            config = WorkerConfig.from_dict({**order["config"], "socket": SOCKET, "log_path": ""})
            keep_secrets(order.get("secrets") or {}, Path(SECRETS_DIR))
            os.environ.update(order.get("environ") or {})
        settings = read_settings()
        lend_bundles((FUNCTION_ROOT, Path(SOCKET).parent), settings.home)
        keep_definitions((order or {}).get("definitions") or [], settings)
        config = dataclasses.replace(config, resources=Resources())  # the container is the limit
        prepare_process(config, settings)
    except MlfuncsError as exc:
        print(f"cannot start: {exc}", file=sys.stderr, flush=True)
        _note(str(exc))
        return EXIT_LOAD_FAILED
    try:
        app = load_app(config, settings)
    except Exception as exc:  # noqa: BLE001 - the user's module may raise anything; reported below
        report_load_failure(config, exc)
        _note(f"{type(exc).__name__}: {exc}")
        return EXIT_LOAD_FAILED
    if config.socket:
        serve(app, config)
    else:
        serve_tcp(app, config)
    return 0


def image_config(root: Path, environ: Mapping[str, str]) -> WorkerConfig:
    """The config of the function this container serves: the image's only one, or the one MLFUNCS_FUNCTION names.

    Raises NotFound, and SpecError when an image of several functions is not told which.
    """
    from mlfuncs_runtime.worker.config import WorkerConfig

    names = sorted(path.stem for path in (root / "functions").glob("*.json"))
    name = environ.get("MLFUNCS_FUNCTION") or (names[0] if len(names) == 1 else "")
    if not name:
        raise SpecError(f"this image has the functions {', '.join(names) or '(none)'}: set MLFUNCS_FUNCTION to one")
    if name not in names:
        raise NotFound("function of this image", name, names)
    config = WorkerConfig.read(root / "functions" / f"{name}.json")
    return dataclasses.replace(
        config,
        endpoint=environ.get("MLFUNCS_ENDPOINT") or config.endpoint,
        project=environ.get("MLFUNCS_PROJECT") or config.project,
        revision=environ.get("MLFUNCS_REVISION") or config.revision,
        replica=environ.get("HOSTNAME", ""),
    )


def lend_bundles(roots: Sequence[Path], home: Path) -> None:
    """Let the home of this container, which is empty and writable, show the bundles below these directories."""
    (home / "bundles").mkdir(mode=0o700, parents=True, exist_ok=True)
    for bundle in (bundle for root in roots for bundle in (root / "bundles").glob("*")):
        if not (home / "bundles" / bundle.name).exists():
            (home / "bundles" / bundle.name).symlink_to(bundle)


def keep_definitions(documents: Sequence[Sequence[Any]], settings: Settings) -> None:
    """Put definitions, (kind, name, body) each, into this container's own registry, for the function's features."""
    if not documents:
        return
    from mlfuncs.registry import open_registry

    definitions = open_registry(settings).definitions
    for kind, name, body in documents:
        definitions.put(kind, name, body)


def keep_secrets(values: Mapping[str, str], folder: Path) -> None:
    """One file a secret, readable by this user alone, in a directory that is memory and not disk."""
    for name, value in values.items():
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o400)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(value)
    if values:
        os.environ["MLFUNCS_SECRETS_DIR"] = str(folder)


def serve_tcp(app: WorkerApp, config: WorkerConfig) -> None:
    """Serve a loaded application on the container's port until SIGTERM has drained it."""
    import gc

    from mlfuncs_runtime.worker.process import log, run_traced
    from mlfuncs_runtime.worker.server import Service

    gc.collect()
    gc.freeze()
    listener = listen_tcp(port())
    service = Service(app, listener, config.drain_s)
    service.on_ready = lambda: log.info("%s %s ready on port %d", config.endpoint, config.revision, port())
    run_traced(service, app, config)


def listen_tcp(number: int) -> socket.socket:
    """A listening socket on every address of the container, IPv6 included where there is any."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.create_server(
        ("", number), family=family, backlog=_BACKLOG, dualstack_ipv6=family == socket.AF_INET6
    )
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _note(reason: str) -> None:
    if TERMINATION_LOG.exists():
        TERMINATION_LOG.write_text(reason[:4096], encoding="utf-8")
