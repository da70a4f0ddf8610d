"""The router's spans: one of kind SERVER for every request whose trace is recorded, its parent the caller's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mlfuncs.errors import MlfuncsError
from mlfuncs_runtime.tracing import PATH_CHARACTERS, Span, SpanExport, open_export

if TYPE_CHECKING:
    from mlfuncs.settings import Settings
    from mlfuncs_runtime.router.request import Request


class RouterSpans:
    """Makes spans of requests that are over and hands them to an export."""

    def __init__(self, export: SpanExport) -> None:
        self.export = export

    def own_traceparent(self, given: bytes, number: bytes) -> bytes:
        """What workers are told in place of the caller's traceparent: the same trace, this router's span `number`."""
        return b"00-%b%b%b" % (given[3:36], number, given[52:55])

    def note(self, request: Request, now_s: float, replica: str = "") -> None:
        """Take up a request that is over. An unsampled one, and a copy for a mirror, leaves no span."""
        if request.is_copy or request.traceparent[54:55] not in b"13579bdf":
            return
        head, status = request.head, request.status or 499
        attributes: dict[str, str | int | float] = {
            "http.request.method": head.method.decode("latin-1"),
            "http.response.status_code": status,
            "url.path": head.target.partition(b"?")[0][:PATH_CHARACTERS].decode("latin-1"),
            "url.scheme": "http",
            "mlfuncs.request_id": request.request_id.decode("latin-1"),
        }
        name = attributes["http.request.method"]
        if request.plan is not None:
            route = f"/{request.endpoint.name}"
            name = f"{name} {route}"
            attributes["http.route"] = route
            attributes["mlfuncs.endpoint"] = request.endpoint.name
            attributes["mlfuncs.revision"] = request.revision.name
            if replica:
                attributes["mlfuncs.replica"] = replica
            if request.attempts > 1:
                attributes["http.request.resend_count"] = request.attempts - 1
        self.export.add(
            Span(
                str(name),
                "SERVER",
                request.traceparent.decode("latin-1"),
                head.traceparent[36:52].decode("latin-1"),
                request.arrived_s,
                now_s,
                attributes,
                status >= 500,
            )
        )


def open_router_spans(settings: Settings, log: logging.Logger) -> RouterSpans | None:
    """The router's spans, when the settings name a collector; without the extra it is said, and none are made."""
    if not settings.otel_endpoint:
        return None
    attributes = {"service.namespace": settings.project, "mlfuncs.project": settings.project}
    try:
        return RouterSpans(open_export(settings.otel_endpoint, "mlfuncs-router", attributes))
    except MlfuncsError as exc:
        log.warning("%s", exc)
        return None
