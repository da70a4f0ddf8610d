"""One worker process: loads a bundle, serves it on a Unix socket until SIGTERM.

    python -m mlfuncs_runtime.worker.process --config FILE.json

The process ends with 0 after a drain, 78 when the bundle cannot be loaded (the reason is in `<socket>.error` as a
problem document and in the log), 70 when a handler did not come back from a call.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.settings import Settings, read_settings
from mlfuncs_runtime.worker.config import WorkerConfig
from mlfuncs_runtime.worker.logs import LogOptions, open_log

if TYPE_CHECKING:
    from mlfuncs_runtime.worker.asgi import WorkerApp
    from mlfuncs_runtime.worker.server import Service

EXIT_LOAD_FAILED = 78  # EX_CONFIG of sysexits.h
_PR_SET_NAME = 15  # prctl(2)
log = logging.getLogger("mlfuncs.worker")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker to its end; the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlfuncs_runtime.worker.process", description=__doc__)
    parser.add_argument("--config", required=True, help="path of a WorkerConfig as JSON")
    config = WorkerConfig.read(parser.parse_args(argv).config)
    settings = read_settings()
    prepare_process(config, settings)
    try:
        app = load_app(config, settings)
    except Exception as exc:  # noqa: BLE001 - the user's module may raise anything; reported below
        report_load_failure(config, exc)
        return EXIT_LOAD_FAILED
    serve(app, config)
    return 0


def prepare_process(config: WorkerConfig, settings: Settings, shared: bool = False) -> None:
    """Environment, secrets, log and limits, before anything of the user's is imported.

    `shared` is for a process that will fork: it starts no thread, not even for its log.
    """
    from mlfuncs.secrets import Redactor, resolve_secrets
    from mlfuncs_runtime.worker.limits import apply_limits

    os.environ.update(config.env)
    secrets = resolve_secrets(config.secrets, settings)
    redact = Redactor(secrets.values()).text
    options = LogOptions(config.log_path, settings.log_format, settings.log_level, labels(config), redact)
    open_log(options, "raw" if not secrets else "nowhere" if shared else "redacted")
    name_process(config)
    apply_limits(config.resources, config.replica or config.revision)


def labels(config: WorkerConfig) -> dict[str, str]:
    """What tells this worker's metrics and log lines from another's."""
    return {"endpoint": config.endpoint, "revision": config.revision, "replica": config.replica}


def name_process(config: WorkerConfig) -> None:
    """Let `ps` and `top` show the endpoint's name (15 bytes are all that the kernel keeps)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, f"ml:{config.endpoint}".encode()[:15], 0, 0, 0)


def load_app(config: WorkerConfig, settings: Settings) -> WorkerApp:
    """The bundle's application, loaded and warmed; it still has to be served. Raises what loading raises."""
    from mlfuncs import adapters
    from mlfuncs.artifacts import ArtifactRef, ArtifactStore
    from mlfuncs.bundles.bundle import open_bundle
    from mlfuncs_runtime.worker.asgi import WorkerApp
    from mlfuncs_runtime.worker.handlers import make_handler
    from mlfuncs_runtime.worker.invocation import AppOptions

    target, reader = open_bundle(config.bundle, settings).load(), None
    if config.features:  # callers send entity keys, the handler receives features
        reader = adapters.load("features:reader")(config.features, settings, config.feature_sample_rate)
        reader.warm()
        target = reader.bind(target)
    values: dict[str, Any] = {}
    if config.init_args:
        store = ArtifactStore.open(settings)
        values = {name: store.get(ArtifactRef.from_dict(ref)) for name, ref in config.init_args.items()}
    handler = make_handler(target, values)
    options = AppOptions(
        name=config.endpoint,
        version=config.revision,
        timeout_s=config.timeout_s,
        batch=config.batch,
        concurrency=config.concurrency,
        queue_size=config.queue_size,
        body_bytes=config.body_bytes,
        stuck_grace_s=config.stuck_grace_s,
        labels=labels(config),
        otel_endpoint=settings.otel_endpoint,
    )
    app = WorkerApp(handler, options)
    if reader is not None:
        app.metrics.parts.append(reader.metrics.lines)
    if (pending := handler.warm()) is not None:
        app.starting.append(pending)
    return app


def serve(app: WorkerApp, config: WorkerConfig) -> None:
    """Serve a loaded application on the config's socket until SIGTERM has drained it."""
    import gc

    from mlfuncs_runtime.worker.server import Service, listen_unix

    gc.collect()
    gc.freeze()  # what was loaded stays: collections look only at what requests make
    listener = listen_unix(config.socket)
    service = Service(app, listener, config.drain_s)
    service.on_ready = lambda: note_ready(app, config)
    run_traced(service, app, config)
    with contextlib.suppress(OSError):
        os.unlink(config.socket)


def run_traced(service: Service, app: WorkerApp, config: WorkerConfig) -> None:
    """Run the service to its end; spans are sent meanwhile when the settings name a collector."""
    if app.options.otel_endpoint:
        from mlfuncs_runtime.worker.spans import start_spans

        app.spans = start_spans(app.options.otel_endpoint, config)
    service.run()
    if app.spans is not None:
        app.spans.export.stop()


def note_ready(app: WorkerApp, config: WorkerConfig) -> None:
    """Record the cold start, from the wish for the replica to now."""
    if config.requested_at is not None:
        app.metrics.cold_start_s = time.monotonic() - config.requested_at
    took = "" if app.metrics.cold_start_s is None else f" after {app.metrics.cold_start_s * 1000:.0f} ms"
    log.info("%s %s ready on %s%s", config.endpoint, config.revision, config.socket, took)


def report_load_failure(config: WorkerConfig, exc: BaseException) -> None:
    """Say why the worker cannot serve: in the log with the traceback, and as a problem beside the socket."""
    log.error("cannot load %s %s: %s", config.endpoint, config.revision, exc, exc_info=exc)
    if isinstance(exc, MlfuncsError):
        problem = exc.to_problem()
    else:
        problem = {"type": "about:blank", "title": type(exc).__name__, "status": 500, "detail": str(exc)}
    if config.socket:
        with contextlib.suppress(OSError):
            Path(config.socket + ".error").write_text(json.dumps(problem, default=str), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
