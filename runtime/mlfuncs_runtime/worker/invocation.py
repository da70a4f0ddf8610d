"""A typed call over HTTP: body to named values, values to the handler, its result to JSON or a stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from mlfuncs.errors import InvalidInput, MlfuncsError
from mlfuncs.serving.request_context import CURRENT_REQUEST
from mlfuncs.spec import Batch
from mlfuncs_runtime.worker.arrow_io import ARROW, read_values
from mlfuncs_runtime.worker.arrow_io import dump as dump_arrow
from mlfuncs_runtime.worker.async_calls import AsyncCalls
from mlfuncs_runtime.worker.batched import BatchedCalls
from mlfuncs_runtime.worker.batching import row_plan
from mlfuncs_runtime.worker.calls import ThreadCalls, too_late
from mlfuncs_runtime.worker.content_coding import read_body
from mlfuncs_runtime.worker.exchange import JSON, Exchange
from mlfuncs_runtime.worker.failures import bad_result, handler_failure
from mlfuncs_runtime.worker.handlers import Handler, ItemSignature
from mlfuncs_runtime.worker.metrics import WorkerMetrics
from mlfuncs_runtime.worker.streaming import iterate, iterate_async, stream

log = logging.getLogger("mlfuncs.worker")


@dataclass(frozen=True)
class AppOptions:
    """What an application needs to know beside its handler; the fields are WorkerConfig's."""

    name: str = "function"
    version: str = "0"
    timeout_s: float = 60.0
    batch: Batch | None = None
    concurrency: int = 0
    queue_size: int = 1000
    body_bytes: int = 64 * 2**20
    stuck_grace_s: float = 5.0
    labels: Mapping[str, str] = field(default_factory=dict)
    otel_endpoint: str = ""  # the setting of that name


class Invocation:
    """How one handler is called; shared by every protocol. `call` is for any of them, `post` for typed JSON."""

    def __init__(
        self, handler: Handler, options: AppOptions, metrics: WorkerMetrics, on_stuck: Callable[[], None]
    ) -> None:
        self.handler, self.options = handler, options
        self.rows = metrics.batch_rows
        self.calls: AsyncCalls | ThreadCalls
        if handler.style.startswith("async"):
            self.calls = AsyncCalls()
        else:
            threads = max(1, options.concurrency)
            self.calls = ThreadCalls(threads, options.queue_size, options.stuck_grace_s, on_stuck)
        self.batched = _make_batched(handler, options, self.calls, metrics)
        self.streams = handler.style.endswith("stream")
        self._validate = handler.signature.validate_json
        self._call = handler.call
        self._body_bytes = options.body_bytes
        self._quick = returns if (returns := handler.signature.returns) in _QUICK else None
        self._dump = ItemSignature(handler).dump_json if self.streams else handler.signature.dump_json

    async def call(self, values: Mapping[str, Any], exchange: Exchange) -> Any:
        """The handler's result for named values, alone or in a batch. Raises what the caller is to be told."""
        calls = self.calls
        try:
            if self.batched is not None:
                return await self.batched.call(values, exchange)
            if calls.inline:
                return calls.run_inline(self._call, values, exchange)
            return await calls.run(partial(self._call, **values), exchange)
        except Exception as exc:
            raise handler_failure(exc) from exc

    async def collect(self, values: Mapping[str, Any], exchange: Exchange) -> Any:
        """As `call`; a stream's items come as a list, all within the one deadline."""
        if not self.streams:
            return await self.call(values, exchange)
        collected = []
        items = self._items(values, exchange)
        try:
            async for item in items:
                collected.append(item)
                if exchange.remaining_s() <= 0:
                    raise too_late()
        except Exception as exc:
            raise handler_failure(exc) from exc
        finally:
            await items.aclose()  # type: ignore[attr-defined]
        return collected

    async def guarded(self, running: Awaitable[Any]) -> Any:
        """What `running` gives. Raises what the caller is to be told."""
        try:
            return await running
        except Exception as exc:
            raise handler_failure(exc) from exc

    async def post(self, exchange: Exchange) -> None:
        """Answer a typed request. Written flat: each awaited helper would cost a microsecond on every request."""
        headers = exchange.headers
        if headers.get(b"content-type", JSON) != JSON and not _is_json(exchange.content_type(), headers):
            if exchange.content_type() != ARROW:
                await _refuse_media(exchange)
                return
            body = await read_body(exchange, self._body_bytes)
            if body is None:
                return
            values = read_values(self.handler.signature, body, exchange.scope.get("query_string", b""))
        elif b"content-encoding" in headers:
            body = await read_body(exchange, self._body_bytes)
            if body is None:
                return
            values = self._validate(body)
        else:
            values = self._validate(await exchange.body(self._body_bytes))
        CURRENT_REQUEST.set(exchange)
        if self.streams:
            await self._stream(values, exchange)
            return
        result = await self.call(values, exchange)
        if ARROW in headers.get(b"accept", b""):
            await exchange.answer(200, self._dump_arrow(result), ARROW)
            return
        await exchange.answer(200, _quick_json(result) if type(result) is self._quick else self.dump(result))

    def dump(self, result: Any) -> bytes:
        """The result as JSON. Raises HandlerFailed when it is not what the return hint says."""
        try:
            return self._dump(result)
        except MlfuncsError as exc:
            raise bad_result(self.handler.name, exc) from exc

    def _dump_arrow(self, result: Any) -> bytes:
        try:
            return dump_arrow(result)
        except (TypeError, ValueError) as exc:
            raise bad_result(self.handler.name, InvalidInput(str(exc))) from exc

    async def _stream(self, values: dict[str, Any], exchange: Exchange) -> None:
        items = self._items(values, exchange)
        await stream(exchange, items, self.dump, handler_failure, self.options.timeout_s)

    def _items(self, values: Mapping[str, Any], exchange: Exchange) -> AsyncIterator[Any]:
        made = self.handler.call(**values)  # a generator: none of the user's code has run yet
        return iterate(self.calls, made, exchange) if self.handler.style == "stream" else iterate_async(made, exchange)


def _make_batched(
    handler: Handler, options: AppOptions, calls: AsyncCalls | ThreadCalls, metrics: WorkerMetrics
) -> BatchedCalls | None:
    if options.batch is None or handler.kind == "nuclio" or handler.style.endswith("stream"):
        return None
    plan = row_plan(handler.signature)
    if isinstance(plan, str):
        log.warning("requests are not batched: %s", plan)
        return None
    batched = BatchedCalls(handler.call, plan, options.batch, calls, metrics.batch_rows)
    batched.queue_size = options.queue_size
    return batched


# results of exactly these types need no check against the hint, and orjson writes them as pydantic would
_QUICK = (float, str, bool)
_quick_json = orjson.dumps
_UNSAID = b"application/x-www-form-urlencoded"


def _is_json(media: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a body of this media type is read as JSON: also what curl and urllib say of it when not told.

    A page of another site can send that type without asking first, but not without its Origin: then it is refused.
    """
    if media == _UNSAID and b"origin" not in headers:
        return True
    return media in (JSON, b"") or (media.startswith(b"application/") and media.endswith(b"+json"))


async def _refuse_media(exchange: Exchange) -> None:
    exchange.close = True  # the body is not read
    given = exchange.content_type().decode("latin-1")
    detail = f"content type {given!r} is not understood here; send a JSON object with Content-Type: application/json"
    await exchange.refuse(415, "UnsupportedMediaType", detail, [(b"accept", JSON + b", " + ARROW)])
