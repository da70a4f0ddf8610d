"""Answers that come item by item: newline-delimited JSON, or server-sent events when the caller asks for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from mlfuncs.errors import HandlerFailed, MlfuncsError
from mlfuncs.serving.request_context import RequestContext
from mlfuncs_runtime.worker.async_calls import Rest
from mlfuncs_runtime.worker.calls import Calls, too_late
from mlfuncs_runtime.worker.exchange import Exchange
from mlfuncs_runtime.worker.forks import end_fork

NDJSON = b"application/x-ndjson"
EVENTS = b"text/event-stream"
_END = object()


async def iterate(calls: Calls, generator: Any, context: RequestContext) -> AsyncIterator[Any]:
    """The items of a sync generator, each made where the handler's calls run, each within the deadline."""
    try:
        while (item := await calls.run(partial(next, generator, _END), context)) is not _END:
            yield item
    finally:
        if hasattr(generator, "close"):
            await calls.run(generator.close, context)


async def iterate_async(generator: Any, context: RequestContext) -> AsyncIterator[Any]:
    """The items of an async generator, each within the deadline."""
    try:
        while True:
            try:
                async with asyncio.timeout(max(0.0, context.remaining_s())) as scope:
                    item = await _step(generator)
            except TimeoutError as exc:
                raise too_late() if scope.expired() else exc from exc
            if item is _END:
                return
            yield item
    finally:
        await generator.aclose()


async def _step(generator: Any) -> Any:
    """The next item, or _END."""
    steps = anext(generator, _END).__await__()
    try:
        waiting = steps.send(None)
    except StopIteration as done:
        return done.value
    finally:
        end_fork()
    return await Rest(steps, waiting)


async def stream(
    exchange: Exchange,
    items: AsyncIterator[Any],
    dump: Callable[[Any], bytes],
    failure: Callable[[BaseException], Exception],
    timeout_s: float,
) -> None:
    """Send every item as it comes; `timeout_s` holds for the first and anew for each one after it.

    An error before the first item is raised; a later one becomes the stream's last message, as the status is sent
    already. The generator is closed when the client goes away.
    """
    events = EVENTS in exchange.headers.get(b"accept", b"")
    gone = asyncio.ensure_future(_disconnected(exchange))
    try:
        first = await anext(items, _END)
        headers = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        payload = _frame(dump(first), events) if first is not _END else b""
        await exchange.start(200, EVENTS if events else NDJSON, headers)
        await exchange.send({"type": "http.response.body", "body": payload, "more_body": True})
        try:
            if first is not _END:
                await _send_rest(exchange, items, lambda item: _frame(dump(item), events), (timeout_s, gone))
        except Exception as exc:  # noqa: BLE001 - the user's generator raised; the caller logs it
            error = failure(exc)
            error = error if isinstance(error, MlfuncsError) else HandlerFailed(str(error))
            problem = json.dumps(error.to_problem(exchange.request_id), default=str).encode()
            last = b"event: error\ndata: " + problem + b"\n\n" if events else b'{"error":' + problem + b"}\n"
            await exchange.send({"type": "http.response.body", "body": last, "more_body": True})
        await exchange.send({"type": "http.response.body", "body": b""})
    finally:
        gone.cancel()
        await items.aclose()  # type: ignore[attr-defined]


async def _send_rest(
    exchange: Exchange,
    items: AsyncIterator[Any],
    frame: Callable[[Any], bytes],
    bounds: tuple[float, asyncio.Future[None]],
) -> None:
    timeout_s, gone = bounds
    while not gone.done():
        exchange.extend(timeout_s)
        item = await anext(items, _END)
        if item is _END:
            return
        await exchange.send({"type": "http.response.body", "body": frame(item), "more_body": True})


async def _disconnected(exchange: Exchange) -> None:
    while (await exchange.receive())["type"] != "http.disconnect":
        pass


def _frame(item: bytes, events: bool) -> bytes:
    if not events:
        return item + b"\n"
    return b"".join(b"data: " + line + b"\n" for line in item.splitlines() or [b""]) + b"\n"
