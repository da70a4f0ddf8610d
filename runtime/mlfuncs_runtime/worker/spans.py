"""A worker's spans: one of kind SERVER for each request it answers, and of kind CLIENT for endpoints that it calls.

What the function's own code records with OpenTelemetry's API belongs to the same trace, and goes the same way unless
the code has set up a provider of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mlfuncs.errors import MlfuncsError
from mlfuncs.serving.request_context import watch_calls
from mlfuncs_runtime.tracing import (
    PATH_CHARACTERS,
    Span,
    SpanExport,
    new_traceparent,
    note_call,
    open_export,
    read_traceparent,
)

if TYPE_CHECKING:
    from mlfuncs_runtime.worker.config import WorkerConfig
    from mlfuncs_runtime.worker.exchange import Exchange

log = logging.getLogger("mlfuncs.worker")


class Begun(NamedTuple):
    """A request under way: the caller's span ("" without one), and when it came on time.monotonic()'s clock."""

    parent: str
    started_s: float


class WorkerSpans:
    """Makes spans of a worker's requests and hands them to an export."""

    def __init__(self, export: SpanExport, labels: Mapping[str, str]) -> None:
        self.export, self._name = export, labels["endpoint"]
        self._attributes = {f"mlfuncs.{key}": value for key, value in labels.items() if value}

    def enter(self, exchange: Exchange) -> Begun | None:
        """A request begins: what it calls, and what its code records, comes below its span. None: not recorded."""
        if exchange.path.startswith("/-/"):
            return None
        parent = read_traceparent(exchange.traceparent)
        exchange.traceparent = new_traceparent(parent)
        _attach(exchange.traceparent)
        if parent is not None and not parent.sampled:
            return None
        return Begun(parent.span_id if parent is not None else "", time.monotonic())

    def leave(self, exchange: Exchange, begun: Begun) -> None:
        """The request is over, or broke off."""
        status = exchange.status or 499
        attributes: dict[str, str | int | float] = {
            "http.request.method": exchange.method,
            "http.response.status_code": status,
            "url.path": exchange.path[:PATH_CHARACTERS],
            "mlfuncs.request_id": exchange.request_id,
            **self._attributes,
        }
        now_s, failed = time.monotonic(), status >= 500
        span = Span(
            self._name, "SERVER", exchange.traceparent, begun.parent, begun.started_s, now_s, attributes, failed
        )
        self.export.add(span)


def start_spans(endpoint: str, config: WorkerConfig) -> WorkerSpans | None:
    """This worker's spans, being sent from now on; None without the extra, which is said in the log."""
    attributes = {
        "service.namespace": config.project,
        "service.version": config.revision,
        "service.instance.id": config.replica,
        "mlfuncs.project": config.project,
        "mlfuncs.endpoint": config.endpoint,
        "mlfuncs.revision": config.revision,
    }
    try:
        export = open_export(endpoint, config.endpoint, attributes)
    except MlfuncsError as exc:
        log.warning("%s", exc)
        return None
    _provide(export)
    watch_calls(lambda call: note_call(export, call, "CLIENT"))
    export.start()
    labels = {"endpoint": config.endpoint, "revision": config.revision, "replica": config.replica}
    return WorkerSpans(export, labels)


def preload() -> None:
    """Import what sending spans needs, in a process that will fork; starts nothing."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter as exporter
        import opentelemetry.sdk.trace as trace
    except ModuleNotFoundError:
        return  # said by the worker
    assert exporter and trace


def _attach(traceparent: str) -> None:
    """Let spans of the function's own code come below the request's; holds for the task that answers it."""
    from opentelemetry import context, trace

    flags = trace.TraceFlags(int(traceparent[53:55], 16))
    own = trace.SpanContext(int(traceparent[3:35], 16), int(traceparent[36:52], 16), False, flags)
    context.attach(trace.set_span_in_context(trace.NonRecordingSpan(own)))


def _provide(export: SpanExport) -> None:
    """Send what the function's own code records as well, unless it sends it elsewhere."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

    class Forward(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            if span.context is not None and span.context.trace_flags.sampled:
                export.add(span)

    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        provider: Any = TracerProvider(resource=export.resource, shutdown_on_exit=False)
        provider.add_span_processor(Forward())
        trace.set_tracer_provider(provider)
