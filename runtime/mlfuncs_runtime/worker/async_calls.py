"""Running the calls of an async handler, step by step on the server's loop, with a deadline.

After each step it is looked whether this is still the process that began it: a fork that awaited would go on with the
server's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping
from types import CoroutineType
from typing import Any

from mlfuncs.serving.request_context import RequestContext
from mlfuncs_runtime.worker.calls import too_late
from mlfuncs_runtime.worker.forks import end_fork


class AsyncCalls:
    """Async handlers run on the loop, as many at once as come."""

    inline = False

    def run_inline(self, call: Callable[..., Any], values: Mapping[str, Any], context: RequestContext) -> Any:
        """Never allowed: an async call does not end at once."""
        raise RuntimeError("an async handler does not run inline")

    async def run(self, call: Callable[[], Awaitable[Any]], context: RequestContext) -> Any:
        """Await the call's coroutine; it is cancelled at the deadline.

        A coroutine that ends at its first step, as most quick handlers do, costs no timer.
        """
        coroutine = call()
        rest: Awaitable[Any]
        if not isinstance(coroutine, CoroutineType):
            rest = coroutine
        else:
            try:
                waiting = coroutine.send(None)
            except StopIteration as done:
                return done.value
            except GeneratorExit as exc:
                raise _odd_end() from exc
            finally:
                end_fork()
            rest = Rest(coroutine, waiting)
        try:
            async with asyncio.timeout(max(0.0, context.remaining_s())) as scope:
                return await rest
        except TimeoutError as exc:
            if scope.expired():
                raise too_late() from exc
            raise


class Rest:
    """A coroutine after its first step, which gave `waiting`; awaiting it goes on as a plain await would."""

    __slots__ = ("_steps", "_waiting")

    def __init__(self, steps: Any, waiting: Any) -> None:
        self._steps, self._waiting = steps, waiting

    def __await__(self) -> Generator[Any, Any, Any]:
        steps, waiting = self._steps, self._waiting
        while True:
            thrown: BaseException | None = None
            sent = None
            try:
                sent = yield waiting
            except GeneratorExit:
                steps.close()
                raise
            except BaseException as exc:  # noqa: BLE001 - thrown on into the coroutine
                thrown = exc
            try:
                waiting = steps.send(sent) if thrown is None else steps.throw(thrown)
            except StopIteration as done:
                return done.value
            except GeneratorExit as exc:
                raise _odd_end() from exc
            finally:
                end_fork()


def _odd_end() -> RuntimeError:
    """What stands for a GeneratorExit of the user's code: Python takes one for the end of whoever awaits."""
    return RuntimeError("the function raised GeneratorExit")
