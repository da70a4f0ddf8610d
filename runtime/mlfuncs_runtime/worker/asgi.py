"""The worker's ASGI application: the typed fast path, the pages beside it, and the platform's own routes.

POST /                  invoke: a JSON object of the named parameters in, JSON (or a stream) out
GET  /docs              a page made from the type hints
GET  /openapi.json      the same for machines
*    /v2/...            Open Inference Protocol v2
GET  /-/ready           200 once requests are welcome, else 503 with the reason
GET  /-/live            200 while the process answers at all
GET  /-/metrics         Prometheus text
*    anything else      the handler's own ASGI `app`, when it has one; a Nuclio handler takes every path but /-/
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import NotFound, Unavailable
from mlfuncs_runtime.worker.exchange import JSON, Exchange, Receive, Scope, Send
from mlfuncs_runtime.worker.failures import ChosenStatus, handler_failure, internal_failure
from mlfuncs_runtime.worker.handlers import Handler, ItemSignature, make_handler
from mlfuncs_runtime.worker.invocation import AppOptions, Invocation
from mlfuncs_runtime.worker.metrics import CONTENT_TYPE as METRICS_TYPE
from mlfuncs_runtime.worker.metrics import WorkerMetrics
from mlfuncs_runtime.worker.streaming import EVENTS, NDJSON

if TYPE_CHECKING:
    from mlfuncs_runtime.worker.spans import WorkerSpans

Route = Callable[[Exchange], Awaitable[None]]
HTML = b"text/html; charset=utf-8"


def make_app(target: Any, options: AppOptions | None = None, init_args: Mapping[str, Any] | None = None) -> WorkerApp:
    """The ASGI application that serves a function, class or Nuclio handler; ready at once."""
    app = WorkerApp(make_handler(target, init_args), options or AppOptions())
    app.ready = True
    return app


class WorkerApp:
    """One handler behind HTTP. `ready` and `draining` are switched by the worker around it."""

    def __init__(self, handler: Handler, options: AppOptions, on_stuck: Callable[[], None] = lambda: None) -> None:
        self.handler, self.options = handler, options
        self.ready = self.draining = self.stuck = False
        self.in_flight = 0
        self.starting: list[Awaitable[None]] = []
        self.metrics = WorkerMetrics(options.labels)
        self.spans: WorkerSpans | None = None  # where requests' spans go; None: nowhere
        self.on_stuck = on_stuck
        self.invocation = Invocation(handler, options, self.metrics, self.give_up)
        self._post: Route = self.invocation.post
        self._nuclio = None
        self._routes: dict[str, tuple[str, Route]] = {
            "/-/ready": ("GET", self._get_ready),
            "/-/live": ("GET", self._get_live),
            "/-/healthz": ("GET", self._get_live),  # the platform's name for it, which clusters and images ask for
            "/-/metrics": ("GET", self._get_metrics),
        }
        if handler.kind == "nuclio":
            from mlfuncs_runtime.worker.nuclio_handler import NuclioService

            self._nuclio = NuclioService(handler, self.invocation)
            self._post = self._nuclio.post
            if self._nuclio.pending is not None:
                self.starting.append(self._nuclio.pending)
        else:
            self._routes |= {
                "/": ("POST", self._post),
                "/docs": ("GET", self._get_docs),
                "/openapi.json": ("GET", self._get_openapi),
            }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every error becomes a problem document."""
        if scope["type"] != "http":
            await self._not_http(scope, receive, send)
            return
        started = time.perf_counter()
        exchange = Exchange(scope, receive, send, self.options.timeout_s)
        begun = self.spans.enter(exchange) if self.spans is not None else None
        exchange.close = self.draining
        self.in_flight += 1
        try:
            if scope["path"] == "/" and scope["method"] == "POST":
                await self._post(exchange)
            else:
                await self._route(exchange)
        except Exception as exc:  # noqa: BLE001 - the server's loop; what is not expected is logged
            await self._fail(exchange, exc)
        except BaseException as exc:  # noqa: BLE001 - sys.exit() and its like in the user's code, or the server's end
            await self._break_off(exchange, exc)
        finally:
            self.in_flight -= 1
            self.metrics.observe(exchange.status, time.perf_counter() - started)
            if begun is not None and self.spans is not None:
                self.spans.leave(exchange, begun)

    async def start(self) -> None:
        """Await what has to run on the server's own loop before the first request: async warm-ups."""
        for pending in self.starting:
            await pending
        self.starting.clear()

    def begin_drain(self) -> None:
        """Stop welcoming requests: connections close with their next answer."""
        self.draining = True
        if self._nuclio is not None:
            try:
                self._nuclio.context.platform.on_drain()
            except Exception as exc:  # noqa: BLE001 - the user's callback; the drain goes on
                internal_failure(exc)

    def give_up(self) -> None:
        """The handler does not come back from a call: refuse what waits, and tell the worker around."""
        self.stuck = True
        calls = self.invocation.calls
        if hasattr(calls, "fail_waiting"):
            calls.fail_waiting(Unavailable("this worker is stuck in an earlier request and is being replaced"))
        self.on_stuck()

    async def _fail(self, exchange: Exchange, exc: Exception) -> None:
        if exchange.status:  # the head is sent: the only sign left is an answer that ends early
            internal_failure(exc)
            raise exc
        if isinstance(exc, ChosenStatus):
            await exchange.refuse(exc.status, "HandlerFailed", exc.detail)
        else:
            await exchange.fail(internal_failure(exc))

    async def _break_off(self, exchange: Exchange, exc: BaseException) -> None:
        """Answer although the call was cancelled, or its code raised what is no Exception."""
        task = asyncio.current_task()
        cancelled = isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling()
        if isinstance(exc, GeneratorExit) or (cancelled and (exchange.status or not self.draining)):
            raise exc
        if not cancelled:
            await self._fail(exchange, handler_failure(exc))
            return
        exchange.close = True
        await exchange.fail(Unavailable("the worker ended before the function answered; try again"))

    async def _route(self, exchange: Exchange) -> None:
        # "//" is what joining openapi.json's server and path by letters gives
        found = self._routes.get("/" if exchange.path == "//" else exchange.path)
        if found is not None:
            method, route = found
            if exchange.method == method or (method == "GET" and exchange.method == "HEAD"):
                await route(exchange)
                return
            allow = "GET, HEAD" if method == "GET" else method
            detail = f"{exchange.method} is not allowed on {exchange.path!r}; use {allow}"
            await exchange.refuse(405, "MethodNotAllowed", detail, [(b"allow", allow.encode())])
            return
        if self._nuclio is None and (exchange.path == "/v2" or exchange.path.startswith("/v2/")):
            await self._open_inference(exchange)
            return
        if self._nuclio is not None and not exchange.path.startswith("/-/"):
            await self._post(exchange)
            return
        if self.handler.user_app is not None and not exchange.path.startswith("/-/"):
            await self._forward(exchange)
            return
        raise NotFound("path", exchange.path, self._routes)

    async def _forward(self, exchange: Exchange) -> None:
        """Let the user's own application answer, and note its status."""

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            await exchange.send(message)

        await self.handler.user_app(_mounted(exchange.scope), exchange.receive, send)

    async def _not_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and self.handler.user_app is not None:
            await self.handler.user_app(_mounted(scope), receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})

    def unready_reason(self) -> str:
        """Why requests are not welcome now; empty when they are."""
        if self.draining:
            return "draining: the worker finishes what it has and ends"
        if not self.ready:
            return "loading: the function is not ready yet"
        if self.stuck or getattr(self.invocation.calls, "blocked", False):
            return "stuck: the function is past its timeout and has not come back"
        return ""

    async def _get_ready(self, exchange: Exchange) -> None:
        if reason := self.unready_reason():
            await exchange.fail(Unavailable(reason))
        else:
            await exchange.answer(200, b'{"ready":true}')

    async def _get_live(self, exchange: Exchange) -> None:
        await exchange.answer(200, b'{"live":true}')

    async def _get_metrics(self, exchange: Exchange) -> None:
        waiting = getattr(self.invocation.calls, "waiting", 0)
        text = self.metrics.render(self.in_flight - 1, waiting)
        if self.spans is not None:
            text += self.spans.export.metrics(self.metrics.labels)
        await exchange.answer(200, text, METRICS_TYPE)

    async def _get_docs(self, exchange: Exchange) -> None:
        await exchange.answer(200, self._docs, HTML, [(b"content-security-policy", _CSP)])

    async def _get_openapi(self, exchange: Exchange) -> None:
        await exchange.answer(200, self._openapi, JSON)

    @cached_property
    def _open_inference(self) -> Route:
        from mlfuncs_runtime.worker.open_inference import OpenInference

        return OpenInference(self.invocation, self.unready_reason)

    @cached_property
    def _document(self) -> dict[str, Any]:
        from mlfuncs.interface.openapi import openapi

        handler, options = self.handler, self.options
        doc = handler.owner.__doc__ or ""
        if not handler.style.endswith("stream"):
            return openapi(handler.signature, options.name, options.version, doc)
        signature: Any = ItemSignature(handler)
        document: dict[str, Any] = openapi(signature, options.name, options.version, doc)
        for path in document["paths"].values():
            answer = path["post"]["responses"]["200"]
            item = answer["content"]["application/json"]
            answer["content"] = {NDJSON.decode(): item, EVENTS.decode(): item}
            answer["description"] = "One item after the other."
        return document

    @cached_property
    def _openapi(self) -> bytes:
        import json

        return json.dumps(self._document, default=str).encode()

    @cached_property
    def _docs(self) -> bytes:
        from mlfuncs_runtime.worker.docs_page import render

        return render(self._document)


def _mounted(scope: Scope) -> Scope:
    """The scope of an application under the prefix that the router took off the path, so that its links stay there.

    ASGI: `path` begins with `root_path`.
    """
    prefix = dict(scope["headers"]).get(b"x-forwarded-prefix", b"")
    if not _PREFIX.fullmatch(prefix):
        return scope
    root = prefix.decode()
    raw = scope.get("raw_path")
    return {
        **scope,
        "root_path": root,
        "path": root + scope["path"],
        "raw_path": None if raw is None else prefix + raw,
    }


_PREFIX = re.compile(rb"(/[A-Za-z0-9._~-]+)+")  # no "//", which would name another host
_CSP = b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
