"""A line of the router's log for each request that is over."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlfuncs_runtime.router.core import Core
    from mlfuncs_runtime.router.request import Request


def log_access(core: Core, request: Request, seconds: float) -> None:
    """Write a line about a request that is over."""
    values = {
        "method": request.head.method.decode("latin-1"),
        "target": request.head.target.decode("latin-1"),
        "status": request.status,
        "duration_ms": round(seconds * 1000, 3),
        "endpoint": request.endpoint.name,
        "revision": request.revision.name,
        "request_id": request.request_id.decode("latin-1"),
    }
    if core.options.access_log == "json":
        core.log.info("%s", json.dumps(values))
    else:
        core.log.info("%(method)s %(target)s %(status)s %(duration_ms)s ms %(revision)s %(request_id)s", values)
