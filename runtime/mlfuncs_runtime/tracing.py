"""Spans for an OpenTelemetry collector: taken up in a microsecond or two, encoded and sent by a thread of their own.

The queue is bounded: what does not fit, and what the collector did not take, is dropped and counted, so that a
collector that is away costs no request anything. Nothing of OpenTelemetry is imported while `otel_endpoint` is empty.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from mlfuncs.errors import MissingExtra, SpecError
from mlfuncs.serving.request_context import OutgoingCall

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger("mlfuncs.tracing")

QUEUE_SPANS = 4096  # spans that wait, at most; a guess: two seconds at full load
PATH_CHARACTERS = 500  # of a request's path that are kept: what waits is bounded in bytes too
_BATCH_SPANS = 256  # spans encoded and sent at once; a guess
_EVERY_S = 0.5
_TIMEOUT_S = 5.0  # for one batch, with the exporter's own retries
HELP = {
    "exported": "Spans that the OpenTelemetry collector took.",
    "dropped": "Spans that were dropped because the collector did not take them.",
}
_PATH = "/v1/traces"
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Span(NamedTuple):
    """A finished span. Times are seconds of time.monotonic(); a `parent` of "" makes it the trace's first."""

    name: str
    kind: str  # SERVER, CLIENT or CONSUMER
    traceparent: str  # W3C's; its parent-id is this span's own id
    parent: str
    start_s: float
    end_s: float
    attributes: dict[str, str | int | float]
    failed: bool = False


class Parent(NamedTuple):
    """What a traceparent says: the trace, the caller's span, and whether the caller wants it recorded."""

    trace_id: str
    span_id: str
    sampled: bool


def read_traceparent(text: str) -> Parent | None:
    """What a traceparent header says; None when it is none.

    >>> read_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").sampled
    True
    """
    match = _TRACEPARENT.fullmatch(text)
    return None if match is None else Parent(match[1], match[2], bool(int(match[3], 16) & 1))


def new_traceparent(parent: Parent | None) -> str:
    """A traceparent with a span id of its own: in the parent's trace, else in a new one that is recorded."""
    trace_id = os.urandom(16).hex() if parent is None else parent.trace_id
    return f"00-{trace_id}-{os.urandom(8).hex()}-{'01' if parent is None or parent.sampled else '00'}"


class SpanExport:
    """A bounded queue of finished spans and the thread that empties it. `add` may be called from any thread."""

    def __init__(self, exporter: SpanExporter, resource: Resource, queue_spans: int = QUEUE_SPANS) -> None:
        self.exported = 0
        self.dropped = 0
        self.resource = resource
        self._exporter, self._limit = exporter, queue_spans
        self._queue: deque[Span | ReadableSpan] = deque()
        self._counting = threading.Lock()
        self._wake = threading.Event()
        self._stopping = self._is_away = False
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)

    def start(self) -> None:
        """Begin to send; after any fork."""
        self._thread.start()

    def add(self, span: Span | ReadableSpan) -> None:
        """Take up a span, or drop it when as many as may wait do so already."""
        queue = self._queue
        if len(queue) >= self._limit:
            with self._counting:
                self.dropped += 1
            return
        queue.append(span)
        if len(queue) == _BATCH_SPANS:
            self._wake.set()

    def metrics(self, labels: str) -> bytes:
        """What became of the spans, as Prometheus text; `labels` as they stand between the braces."""
        text = ""
        for name, value in (("exported", self.exported), ("dropped", self.dropped)):
            family = f"mlfuncs_spans_{name}_total"
            text += f"# HELP {family} {HELP[name]}\n# TYPE {family} counter\n{family}{{{labels}}} {value}\n"
        return text.encode()

    def stop(self, timeout_s: float = 0.8) -> None:
        """Send what waits, for no longer than `timeout_s`."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(_EVERY_S)
            self._wake.clear()
            while self._queue:
                self._send([self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_SPANS))])
        self._exporter.shutdown()

    def _send(self, spans: list[Span | ReadableSpan]) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        offset_ns = _clock_offset_ns()
        try:
            ready = [_readable(span, self.resource, offset_ns) if isinstance(span, Span) else span for span in spans]
            taken = self._exporter.export(ready) is SpanExportResult.SUCCESS
        except Exception:  # the thread's loop: a batch that cannot be encoded must not end all that come after it
            log.exception("%d spans could not be sent", len(spans))
            taken = False
        with self._counting:
            self.exported += len(spans) if taken else 0
            self.dropped += 0 if taken else len(spans)
        if taken is self._is_away:
            self._is_away = not taken
            say = "takes spans again" if taken else "does not take spans; they are dropped until it does"
            log.warning("the collector at MLFUNCS_OTEL_ENDPOINT %s", say)


def _clock_offset_ns() -> int:
    """What to add to time.monotonic_ns() for the wall's clock; the best of some tries, for one may be interrupted."""
    tries = []
    for _ in range(5):
        before_ns, wall_ns, after_ns = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        tries.append((after_ns - before_ns, wall_ns - (before_ns + after_ns) // 2))
    return min(tries)[1]


def open_export(endpoint: str, service: str, attributes: Mapping[str, str]) -> SpanExport:
    """An export to the collector at `endpoint`, not started. `attributes` describe who sends.

    Headers, certificates and compression come from OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_HEADERS, ...),
    further resource attributes from OTEL_RESOURCE_ATTRIBUTES. Raises MissingExtra, and SpecError for what is no URL.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
    except ModuleNotFoundError as exc:
        raise MissingExtra("exporting spans to MLFUNCS_OTEL_ENDPOINT", "otel") from exc
    for name in ("exporter", "sdk"):
        logging.getLogger(f"opentelemetry.{name}").setLevel(logging.CRITICAL)  # an outage is told once, by us
    given = {key: value for key, value in {"service.name": service, **attributes}.items() if value}
    return SpanExport(OTLPSpanExporter(traces_url(endpoint), timeout=_TIMEOUT_S), Resource.create(given))


def note_call(export: SpanExport, call: OutgoingCall, kind: str) -> None:
    """Take up a call of an endpoint: CLIENT below the request that made it, CONSUMER as a trace's first.

    The tries of one trigger's message share a trace.
    """
    parent = read_traceparent(call.parent)
    if parent is None or not parent.sampled:
        return
    attributes: dict[str, str | int | float] = {"http.request.method": "POST", "url.full": call.url}
    if call.status:
        attributes["http.response.status_code"] = call.status
    name = f"POST /{call.url.rpartition('/')[2]}"
    above = parent.span_id if kind == "CLIENT" else ""
    failed = not 0 < call.status < 400
    export.add(Span(name, kind, call.traceparent, above, call.started_s, time.monotonic(), attributes, failed))


def traces_url(endpoint: str) -> str:
    """Where a collector takes spans: `endpoint` itself when it names that path, else the path below it.

    Raises SpecError for what is no HTTP URL.

    >>> traces_url("http://collector:4318/")
    'http://collector:4318/v1/traces'
    """
    if not endpoint.startswith(("http://", "https://")):
        raise SpecError(
            f"MLFUNCS_OTEL_ENDPOINT {endpoint!r} must be a URL, like 'http://collector:4318' (OTLP over HTTP)"
        )
    base = endpoint.rstrip("/")
    return base if base.endswith(_PATH) else base + _PATH


def _readable(span: Span, resource: Resource, offset_ns: int) -> ReadableSpan:
    """The span as the SDK's exporters read it."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    import mlfuncs

    trace_id = int(span.traceparent[3:35], 16)
    own = SpanContext(trace_id, int(span.traceparent[36:52], 16), is_remote=False, trace_flags=TraceFlags(1))
    parent = None
    if span.parent:
        parent = SpanContext(trace_id, int(span.parent, 16), is_remote=True, trace_flags=TraceFlags(1))
    return ReadableSpan(
        name=span.name,
        context=own,
        parent=parent,
        resource=resource,
        attributes=span.attributes,
        kind=SpanKind[span.kind],
        status=Status(StatusCode.ERROR if span.failed else StatusCode.UNSET),
        start_time=int(span.start_s * 1e9) + offset_ns,
        end_time=int(span.end_s * 1e9) + offset_ns,
        instrumentation_scope=InstrumentationScope("mlfuncs", mlfuncs.__version__),
    )
