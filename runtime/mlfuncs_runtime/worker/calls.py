"""Running a sync handler's calls, on threads of their own or inline, with a deadline (async ones: `async_calls.py`).

A sync handler of one thread always runs on the process's main thread, so that what it keeps per thread (a SQLite
connection, a CUDA context) stays valid. While it is quick the main thread runs the server's loop and calls it there
(`inline`); while it is not, the loop moves to a second thread and the main thread takes calls from a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from mlfuncs.errors import DeadlineExceeded, MlfuncsError, Overloaded
from mlfuncs.serving.request_context import RequestContext
from mlfuncs_runtime.worker.forks import end_fork
from mlfuncs_runtime.worker.placement import Placement

_SIGNALS_S = 0.25  # how late a signal may be noticed; as often as the guard looks


class Calls(Protocol):
    """How a handler's call runs; `inline` True allows `run_inline`."""

    inline: bool

    async def run(self, call: Callable[[], Any], context: RequestContext) -> Any:
        """The call's result. Raises what it raises, DeadlineExceeded, or Overloaded."""
        ...

    def run_inline(self, call: Callable[..., Any], values: Mapping[str, Any], context: RequestContext) -> Any:
        """The result of `call(**values)`, made at once on the calling thread."""
        ...


def too_late() -> DeadlineExceeded:
    """The error for a call that did not end before its deadline."""
    return DeadlineExceeded("the function did not answer within its timeout; raise timeout_s or send less at once")


class _Job:
    __slots__ = ("call", "context", "future", "started")

    def __init__(self, call: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self.call, self.future = call, future
        self.context = contextvars.copy_context()
        self.started = False


class ThreadCalls:
    """Sync handlers: first come, first served, on the thread that entered `host` or on `threads` of its own.

    `on_stuck` is called (on the loop) when a call is still running `grace_s` after its deadline: nothing can stop a
    Python thread, so the process has to go.
    """

    def __init__(
        self,
        threads: int = 1,
        queue_size: int = 1000,
        grace_s: float = 5.0,
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        self.inline = False
        self.running_inline: RequestContext | None = None  # what is answered inline now, for the guard
        self.waiting = 0
        self._threads, self._queue_size, self._grace_s, self._on_stuck = threads, queue_size, grace_s, on_stuck
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._orders: SimpleQueue[_Job | None] = self._jobs if threads == 1 else SimpleQueue()
        self._overdue: set[_Job] = set()
        self._finished: deque[tuple[_Job, Any, BaseException | None]] = deque()
        self._delivery_due = False
        self._placement = Placement()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = self._hosted = False

    @property
    def blocked(self) -> bool:
        """True while every handler thread is in a call past its deadline."""
        return len(self._overdue) >= self._threads

    def host(self, serve: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
        """Run `serve` to its end on `loop`; this thread is the handlers' own meanwhile."""
        self._loop, self._hosted = loop, True
        task = loop.create_task(serve)
        task.add_done_callback(self._end)
        self._start(self._threads if self._threads > 1 else 0)
        while not task.done():
            if self._placement.inline:
                self.inline = True
                loop.run_forever()
                self.inline = False
            else:
                self._host_beside(loop)
        task.result()

    def _start(self, threads: int) -> None:
        self._started = True
        for number in range(threads):
            threading.Thread(target=self._take_jobs, name=f"handler-{number}", daemon=True).start()

    def _end(self, _task: asyncio.Task[None]) -> None:
        self._stop()
        self._orders.put(None)

    def _host_beside(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take calls on this thread while another runs the loop, until the loop ends or moves here."""
        io = threading.Thread(target=loop.run_forever, name="http")
        io.start()
        while (job := self._next_order()) is not None:
            self._perform(job)
            if self._placement.inline:
                loop.call_soon_threadsafe(loop.stop)
                break
        io.join()
        while self._threads == 1:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None:
                self._perform(job)

    def _next_order(self) -> _Job | None:
        """What this thread does next. It is the main thread, the one that runs Python's signal handlers.

        A signal that comes right before it begins to wait, or to another thread, does not end the wait: none is long.
        """
        while True:
            with contextlib.suppress(Empty):
                return self._orders.get(timeout=_SIGNALS_S)

    def _take_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._perform(job)
            if self._hosted and self._placement.inline and not self.inline:
                self._orders.put(None)
                self._call_soon(self._stop_loop)

    def _stop_loop(self) -> None:
        if not self.inline:
            self._stop()

    def _stop(self) -> None:
        if self._loop is not None:
            self._loop.stop()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    async def run(self, call: Callable[[], Any], context: RequestContext) -> Any:
        """The call's result, made at once while inline, else queued and waited for until the deadline."""
        if self.inline:
            return self.run_inline(call, {}, context)
        if self.waiting >= self._queue_size:
            raise Overloaded(f"{self.waiting} requests wait for this worker already; try again later")
        loop = asyncio.get_running_loop()
        if not self._started:  # under a server that is not ours: no `host`, so never inline
            self._loop = loop
            self._start(self._threads)
        job = _Job(call, loop.create_future())
        self.waiting += 1
        timer = loop.call_later(max(0.0, context.remaining_s()), self._expire, job)
        self._jobs.put(job)
        try:
            return await job.future
        finally:
            timer.cancel()

    def run_inline(self, call: Callable[..., Any], values: Mapping[str, Any], context: RequestContext) -> Any:
        """Call on this very thread, which is the loop's; allowed while `inline`.

        The loop is hidden meanwhile, so that a handler's own `asyncio.run` works as it does on a thread.
        """
        loop = self._loop
        events._set_running_loop(None)
        self.running_inline = context
        started = time.perf_counter()
        try:
            return call(**values)
        except GeneratorExit as exc:  # Python takes one for the end of whoever awaits
            raise RuntimeError("the function raised GeneratorExit") from exc
        finally:
            end_fork()
            seconds = time.perf_counter() - started
            self.running_inline = None
            events._set_running_loop(loop)
            if not self._placement.observe(seconds):
                self.inline = False
                self._stop()

    def fail_waiting(self, error: MlfuncsError) -> None:
        """Answer every queued call with `error`."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None and not job.future.done():
                job.future.set_exception(error)

    def _perform(self, job: _Job) -> None:
        result: Any = None
        error: BaseException | None = None
        if not job.future.done():  # else it expired while it waited
            job.started = True
            started = time.perf_counter()
            try:
                result = job.context.run(job.call)
            except BaseException as exc:  # noqa: BLE001 - whatever the user's code raises becomes an answer
                error = exc
            end_fork()
            self._placement.observe(time.perf_counter() - started)
        self._finished.append((job, result, error))
        if not self._delivery_due:
            self._delivery_due = True
            self._call_soon(self._deliver)

    def _deliver(self) -> None:
        self._delivery_due = False
        while self._finished:
            job, result, error = self._finished.popleft()
            self.waiting -= 1
            self._overdue.discard(job)
            if job.future.done():
                continue
            if error is None:
                job.future.set_result(result)
            elif isinstance(error, StopIteration | GeneratorExit):  # a future refuses the one, an await the other
                job.future.set_exception(RuntimeError(f"the function raised {type(error).__name__}"))
            else:
                job.future.set_exception(error)

    def _expire(self, job: _Job) -> None:
        if job.future.done():
            return
        job.future.set_exception(too_late())
        if job.started:
            self._overdue.add(job)
            asyncio.get_running_loop().call_later(self._grace_s, self._check_stuck, job)

    def _check_stuck(self, job: _Job) -> None:
        if job in self._overdue:
            self._on_stuck()
