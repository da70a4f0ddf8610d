"""The asyncio shell around `batching`: a queue of requests, one batch at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mlfuncs.errors import Overloaded
from mlfuncs.serving.request_context import CURRENT_REQUEST, RequestContext
from mlfuncs.spec import Batch
from mlfuncs_runtime.worker import batching
from mlfuncs_runtime.worker.batching import RowPlan, Waiting
from mlfuncs_runtime.worker.calls import Calls, too_late
from mlfuncs_runtime.worker.metrics import Histogram


class _Entry:
    __slots__ = ("context", "future", "values", "waiting")

    def __init__(
        self, values: Mapping[str, Any], waiting: Waiting, future: asyncio.Future[Any], context: RequestContext
    ) -> None:
        self.values, self.waiting, self.future, self.context = values, waiting, future, context


class BatchedCalls:
    """Calls a function once for the rows of many requests.

    When a batch fails, its requests run one by one, so that a bad row fails only its own request.
    """

    def __init__(self, call: Callable[..., Any], plan: RowPlan, batch: Batch, calls: Calls, rows: Histogram) -> None:
        self._call, self._plan, self._batch, self._calls, self._rows = call, plan, batch, calls, rows
        self._queue: list[_Entry] = []
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._busy = False  # a request runs alone, in its own task
        self._last = 1  # requests in the last batch
        self.queue_size = 1000

    @property
    def waiting(self) -> int:
        """Requests that wait for the next batch."""
        return len(self._queue)

    async def call(self, values: Mapping[str, Any], context: RequestContext) -> Any:
        """The part of a batch's result that belongs to `values`. Raises what the call raises, or DeadlineExceeded."""
        if len(self._queue) >= self.queue_size:
            raise Overloaded(f"{len(self._queue)} requests wait for this worker already; try again later")
        loop = asyncio.get_running_loop()
        rows = batching.count_rows(values, self._plan)
        waiting = Waiting(batching.group_key(values, self._plan), rows, time.monotonic(), context.deadline_s)
        entry = _Entry(values, waiting, loop.create_future(), context)
        idle = self._task is None or self._task.done()
        if idle and not self._busy and self._last == 1 and not self._batch.max_wait_ms:
            return await self._alone(entry)
        timer = loop.call_later(max(0.0, context.remaining_s()), _expire, entry)
        self._queue.append(entry)
        self._more.set()
        if idle and not self._busy:
            self._task = loop.create_task(self._work())
        try:
            return await entry.future
        finally:
            timer.cancel()

    async def _alone(self, entry: _Entry) -> Any:
        """One client at a time so far: run in the request's own task, which saves two turns of the loop."""
        self._busy = True
        try:
            return (await self._call_rows([entry]))[0]
        finally:
            self._busy = False
            if self._queue:
                self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while self._queue:
            await self._gather()
            self._queue = [entry for entry in self._queue if not entry.future.done()]
            queue = [entry.waiting for entry in self._queue]
            chosen = batching.select(queue, self._batch.max_size, time.monotonic())
            for position in chosen.expired:
                _expire(self._queue[position])
            gone = {*chosen.batch, *chosen.expired}
            batch = [self._queue[position] for position in chosen.batch]
            self._queue = [entry for position, entry in enumerate(self._queue) if position not in gone]
            if batch:
                self._last = len(batch)
                await self._run(batch)

    async def _gather(self) -> None:
        """Wait for more requests, as long as the policy says."""
        while True:
            self._more.clear()
            queue = [entry.waiting for entry in self._queue]
            max_wait_s = self._batch.max_wait_ms / 1000
            wait_s = batching.wait_for_more_s(queue, self._batch.max_size, max_wait_s, time.monotonic())
            if wait_s <= 0:
                return
            try:
                async with asyncio.timeout(wait_s):
                    await self._more.wait()
            except TimeoutError:
                return

    async def _run(self, batch: Sequence[_Entry]) -> None:
        try:
            parts = await self._call_rows(batch)
        except BaseException as exc:  # noqa: BLE001 - each request is answered with its own error, sys.exit() included
            if len(batch) == 1:
                _fail(batch[0], exc)
                return
            for entry in batch:
                if not entry.future.done():
                    await self._run([entry])
            return
        for entry, result in zip(batch, parts, strict=True):
            if not entry.future.done():
                entry.future.set_result(result)

    async def _call_rows(self, batch: Sequence[_Entry]) -> list[Any]:
        """One call for all rows; a single request over `max_size` rows takes several."""
        plan, limit = self._plan, self._batch.max_size
        counts = [entry.waiting.rows for entry in batch]
        values = batching.join([entry.values for entry in batch], plan)
        total = sum(counts)
        self._rows.observe(total)
        context = max((entry.context for entry in batch), key=lambda context: context.deadline_s)
        CURRENT_REQUEST.set(context)
        if total <= limit:
            return batching.part(await self._once(values, context), counts)
        pieces = []
        for start in range(0, total, limit):
            rows = {name: batching.cut_rows(values[name], start, min(start + limit, total)) for name in plan.rows}
            piece = await self._once({**values, **rows}, context)
            pieces.append(batching.part(piece, [min(limit, total - start)])[0])
        return [_join_results(pieces)]

    async def _once(self, values: Mapping[str, Any], context: RequestContext) -> Any:
        if self._calls.inline:
            return self._calls.run_inline(self._call, values, context)
        return await self._calls.run(partial(self._call, **values), context)


def _join_results(pieces: Sequence[Any]) -> Any:
    first = pieces[0]
    if isinstance(first, dict):
        return {name: batching.join_rows([piece[name] for piece in pieces]) for name in first}
    if isinstance(first, tuple):
        made = getattr(type(first), "_make", tuple)
        return made(batching.join_rows(members) for members in zip(*pieces, strict=True))
    return batching.join_rows(pieces)


def _expire(entry: _Entry) -> None:
    if not entry.future.done():
        entry.future.set_exception(too_late())


def _fail(entry: _Entry, exc: BaseException) -> None:
    if not entry.future.done():
        entry.future.set_exception(exc)
