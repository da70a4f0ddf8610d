"""The platform's own pages: /-/healthz, /-/metrics, /-/api/endpoints, and /v2 without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlfuncs
from mlfuncs.errors import NotFound
from mlfuncs_runtime.router.http import problem_of
from mlfuncs_runtime.router.metrics import CONTENT_TYPE, gather

if TYPE_CHECKING:
    from mlfuncs_runtime.router.client import Client
    from mlfuncs_runtime.router.core import Core
    from mlfuncs_runtime.router.request import Request

_GET = (b"GET", b"HEAD")
_JSON = b"application/json"


def _health(core: Core) -> dict[str, Any]:
    return {"status": "draining" if core.draining else "ok"}


def _endpoints(core: Core) -> dict[str, Any]:
    return {
        "endpoints": [
            {
                "name": name,
                "project": endpoint.route.project,
                "path": f"/{name}",
                "traffic": dict(endpoint.route.traffic),
                "tags": dict(endpoint.route.tags),
                "mirror": dict(endpoint.route.mirror),
                "queued": endpoint.queued,
                "replicas": [
                    {"id": key, "revision": state.replica.revision, "in_flight": state.in_flight}
                    for key, state in sorted(endpoint.replicas.items())
                ],
            }
            for name, endpoint in sorted(core.endpoints.items())
        ]
    }


def _server_metadata(_core: Core) -> dict[str, Any]:
    return {"name": "mlfuncs", "version": mlfuncs.__version__, "extensions": ["binary_tensor_data"]}


PAGES: dict[bytes, Callable[[Core], dict[str, Any]]] = {
    b"/-/healthz": _health,
    b"/-/api/endpoints": _endpoints,
    b"/v2": _server_metadata,
    b"/v2/": _server_metadata,
    b"/v2/health/live": lambda core: {"live": True},
    b"/v2/health/ready": lambda core: {"ready": not core.draining},
}
METRICS = b"/-/metrics"


def answer_page(client: Client, request: Request, path: bytes) -> None:
    """Answer a request for one of the platform's own pages."""
    page = PAGES.get(path)
    if page is None and path != METRICS:
        known = [known.decode() for known in (*PAGES, METRICS)]
        status, body, extra = problem_of(NotFound("page", path.decode("latin-1")[:100], known), request.request_id)
        client.reply(request, status, body, extra)
    elif request.head.method not in _GET:
        client.reply(request, 405, b"", b"Allow: GET, HEAD\r\n", _JSON)
    elif page is not None:
        client.reply(request, 200, json.dumps(page(client.core)).encode(), content_type=_JSON)
    else:
        client.core.spawn(_answer_metrics(client, request))


async def _answer_metrics(client: Client, request: Request) -> None:
    client.reply(request, 200, await gather(client.core), content_type=CONTENT_TYPE)
