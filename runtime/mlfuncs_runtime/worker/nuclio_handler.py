"""Serving a Nuclio handler over HTTP: any method and path becomes an event, its output an answer."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from mlfuncs.serving.request_context import CURRENT_REQUEST
from mlfuncs_runtime.worker.batched import BatchedCalls
from mlfuncs_runtime.worker.batching import RowPlan
from mlfuncs_runtime.worker.exchange import Exchange
from mlfuncs_runtime.worker.failures import handler_failure
from mlfuncs_runtime.worker.handlers import Handler
from mlfuncs_runtime.worker.invocation import Invocation
from mlfuncs_runtime.worker.nuclio import Context, Event, make_event
from mlfuncs_runtime.worker.nuclio_answer import Answer, to_answer
from mlfuncs_runtime.worker.streaming import iterate, iterate_async


class NuclioService:
    """One Nuclio handler with its context. `pending` is an async `init_context` still to be awaited, or None."""

    def __init__(self, handler: Handler, invocation: Invocation) -> None:
        self.context = Context()
        self._handler, self._invocation = handler, invocation
        self.pending = self._init_context()
        options = invocation.options
        self._batched: BatchedCalls | None = None
        if options.batch is not None:
            call = self._call_batch_async if handler.style == "async" else self._call_batch
            self._batched = BatchedCalls(call, RowPlan(("events",)), options.batch, invocation.calls, invocation.rows)

    def _init_context(self) -> Awaitable[None] | None:
        init = getattr(inspect.unwrap(self._handler.call), "__globals__", {}).get("init_context")
        result = init(self.context) if callable(init) else None
        return result if inspect.isawaitable(result) else None

    async def post(self, exchange: Exchange) -> None:
        """Answer a request of any method and path. The body stays as it came, also compressed: Nuclio gives it so."""
        body = await exchange.body(self._invocation.options.body_bytes)
        CURRENT_REQUEST.set(exchange)
        event = make_event(exchange.scope, body, exchange.request_id, time.time())
        if self._batched is not None:
            output = (await self._invocation.guarded(self._batched.call({"events": [event]}, exchange)))[0]
        elif self._handler.style.endswith("stream"):
            output = self._handler.call(self.context, event)  # a generator: none of the user's code has run yet
        else:
            output = await self._invocation.call({"context": self.context, "event": event}, exchange)
        answer = to_answer(output)
        if isinstance(answer.body, bytes):
            await exchange.answer(answer.status, answer.body, answer.content_type.encode("latin-1"), _raw(answer))
        else:
            await self._stream(answer, exchange)

    async def _stream(self, answer: Answer, exchange: Exchange) -> None:
        """Send the chunks of a generator as they come; an error after the first one ends the answer early."""
        chunks: AsyncIterator[Any]
        if inspect.isasyncgen(answer.body):
            chunks = iterate_async(answer.body, exchange)
        else:
            chunks = iterate(self._invocation.calls, answer.body, exchange)
        async for chunk in self._failing_as_handler(chunks):
            part = to_answer(chunk)
            if not exchange.status:
                kind = answer.content_type if answer.content_type != "text/plain" else part.content_type
                await exchange.start(answer.status, kind.encode("latin-1"), _raw(answer))
            await exchange.send({"type": "http.response.body", "body": part.body, "more_body": True})
            exchange.extend(self._invocation.options.timeout_s)
        if not exchange.status:
            await exchange.start(answer.status, answer.content_type.encode("latin-1"), _raw(answer))
        await exchange.send({"type": "http.response.body", "body": b""})

    async def _failing_as_handler(self, chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as exc:
            raise handler_failure(exc) from exc

    def _call_batch(self, events: list[Event]) -> list[Any]:
        return _in_order(events, self._handler.call(self.context, _marked(events)))

    async def _call_batch_async(self, events: list[Event]) -> list[Any]:
        return _in_order(events, await self._handler.call(self.context, _marked(events)))


def _raw(answer: Answer) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]


def _marked(events: list[Event]) -> list[Event]:
    for event in events:
        event.last_in_batch = event is events[-1]
    return events


def _in_order(events: Sequence[Event], outputs: Any) -> list[Any]:
    """A batch's responses in the order of its events: by `event_id` where responses have one, else as they come."""
    outputs = [outputs] if not isinstance(outputs, list | tuple) else list(outputs)
    ids: Callable[[Any], Any] = lambda output: getattr(output, "event_id", None)  # noqa: E731
    named = {ids(output): output for output in outputs if ids(output)}
    if named:
        return [named.get(event.id) for event in events]
    return outputs
