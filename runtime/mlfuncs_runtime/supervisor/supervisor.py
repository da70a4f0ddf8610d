"""Keeps the registry's desired state of one home: the router, and for each revision a zygote and its workers.

It takes orders on its Unix socket (`orders.py`), looks for changes in the registry, and on every event runs one pass:
judge rollouts, reconcile, carry out, tell the router. When it is killed the router and the workers go on; the next one,
which the sentinel starts, takes them over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any

from mlfuncs.errors import MlfuncsError, SpecError, Unavailable
from mlfuncs.settings import Settings
from mlfuncs_runtime.control import serve
from mlfuncs_runtime.routes import Route
from mlfuncs_runtime.supervisor import processes, sentinel
from mlfuncs_runtime.supervisor.books import Books, Launch
from mlfuncs_runtime.supervisor.desired import DesiredState
from mlfuncs_runtime.supervisor.fleet import Fleet
from mlfuncs_runtime.supervisor.launching import make_launch
from mlfuncs_runtime.supervisor.log_files import rotate_logs
from mlfuncs_runtime.supervisor.orders import Orders
from mlfuncs_runtime.supervisor.places import Places, read_json, remove_sockets
from mlfuncs_runtime.supervisor.plan import EndpointPlan, judge, route, wishes
from mlfuncs_runtime.supervisor.processes import ProcessHandle
from mlfuncs_runtime.supervisor.reconcile import Failures, Key, Observed, Wish, next_due_s, reconcile
from mlfuncs_runtime.supervisor.router_process import RouterProcess
from mlfuncs_runtime.supervisor.scaling import Scaler
from mlfuncs_runtime.supervisor.triggers import Triggers

log = logging.getLogger("mlfuncs.supervisor")

TICK_S = 0.5
EARLY_TICK_S = 0.1  # guess: while requests wait for replicas; a fork takes less
REGISTRY_EVERY_S = 2.0
HEALTH_EVERY_S = 5.0
LOG_BYTES = 64 * 2**20  # an endpoint's log is moved aside once when it is larger
_STOP_S = 10.0


async def repeat(step: Callable[[], Awaitable[None]], pause_s: float = TICK_S) -> None:
    """Run `step` again and again, also after it failed, which is logged: what fails once may succeed the next time."""
    while True:
        try:
            await step()
        except Exception:  # a server loop
            log.exception("a part of the supervisor failed; trying again")
            await asyncio.sleep(pause_s)


class Supervisor:
    """One home's supervisor. `run` is its life; everything happens on its asyncio loop."""

    def __init__(self, settings: Settings, places: Places) -> None:
        self.settings, self.places = settings, places
        self.desired = DesiredState(settings)
        self.router = RouterProcess(settings, places)
        self.triggers = Triggers(settings, places)
        self.books = Books(places, self._launch, self.wake)
        self.fleet = Fleet(self.books, self.router.drained)
        self.scaler = Scaler()
        self.stopping = asyncio.Event()
        self.passed = asyncio.Condition()  # notified after every pass, for those who wait for a state
        self.passes_begun = self.passes_done = 0
        self.settled: dict[str, int] = {}  # rollout -> the pass that tells the router of its end
        self._due = asyncio.Event()
        self._pressed = asyncio.Event()
        self._finishing: set[str] = set()
        self._seen_rollouts: set[str] = set()
        self._sentinel: ProcessHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def wake(self) -> None:
        """Run a pass as soon as the loop is free."""
        self._due.set()

    def hurry(self) -> None:
        """Requests wait for replicas: let the autoscaler look before its time."""
        self._pressed.set()

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Take over or start what should run, keep it so until `stopping` is set, then stop everything."""
        state = read_json(self.places.state) or {}
        self.fleet.adopt(state)
        self.scaler.restore(self.books.extra.get("scaled") or {})
        await self.router.start()
        await self.refresh()
        server = await serve(self.places.supervisor_socket, Orders(self).answer)
        self._start_sentinel()
        self._stop_old_sentinel(state)  # not sooner: until now it would have started another one in our place
        self._background(
            self.router.watch(),
            repeat(self._tick),
            repeat(self._watch_registry),
            repeat(self._check_health),
            self._passes(),
        )
        on_ready()
        await self.stopping.wait()
        log.info("stopping everything of %s", self.places.home)
        server.close()
        await self._shut_down()

    async def refresh(self) -> None:
        """Read the registry; when it does not answer, what runs goes on as it is."""
        try:
            if await asyncio.to_thread(self.desired.refresh):
                self.wake()
        except MlfuncsError as exc:
            log.warning("%s", exc)

    def take_secrets(self, values: dict[str, str]) -> None:
        """Values for workers started from now on, also by the next supervisor; they are never written down."""
        if any(os.environ.get(name) != value for name, value in values.items()):
            os.environ.update(values)
            self._start_sentinel()

    # --- one pass

    async def _passes(self) -> None:
        while True:
            timeout_s = min(TICK_S * 4, next_due_s(self.books.observe(), time.monotonic()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._due.wait()
            self._due.clear()
            if self.desired.is_known:
                try:
                    await self._pass()
                except Unavailable as exc:
                    log.warning("%s; trying again", exc)
                    await asyncio.sleep(0.1)
                    self.wake()
                except Exception:  # a server loop: the next pass may do better
                    log.exception("a pass failed")
                    await asyncio.sleep(TICK_S)

    async def _pass(self) -> None:
        """Bring what runs nearer to what is wished, and tell the router."""
        self.passes_begun += 1
        number = self.passes_begun
        plans = list(self.desired.plans.values())
        for plan in plans:
            self._judge(plan)
        observed = self.books.observe()
        wished: list[Wish] = [wish for plan in plans for wish in wishes(plan, self.scaler.scaled, self.scaler.waiting)]
        for action in reconcile(wished, observed, time.monotonic()):
            self.fleet.carry_out(action)
        routes = list(self._routes(plans, observed))
        self.triggers.keep(plans, self.router.url)
        await self.router.configure(self.triggers.admit(routes))
        self.fleet.release()
        self.books.extra = {**self.books.extra, "scaled": self.scaler.to_dict()}
        self.books.save()
        self._purge()
        self.passes_done = number
        async with self.passed:
            self.passed.notify_all()

    def _routes(self, plans: Iterable[EndpointPlan], observed: Observed) -> Iterator[Route]:
        """The router's table, without endpoints whose options nobody can serve; that is a failure of theirs alone."""
        for plan in plans:
            try:
                yield route(plan, self.fleet.routable(plan.name), observed.failures)
            except SpecError as exc:
                for revision in {**plan.traffic, **(plan.rollout.traffic if plan.rollout else {})}:
                    if self.books.failures.get((plan.name, revision), Failures()).reason != str(exc):
                        self.books.fail((plan.name, revision), str(exc), fatal=True)

    def _judge(self, plan: EndpointPlan) -> None:
        """Write down a rollout's end, once."""
        if plan.rollout is None or plan.rollout.id in self._finishing:
            return
        rollout = plan.rollout
        if rollout.id not in self._seen_rollouts:  # a new attempt does not pay for earlier ones
            self._seen_rollouts.add(rollout.id)
            for revision in rollout.traffic:
                self.books.failures.pop((plan.name, revision), None)
        verdict = judge(plan, self.books.observe(), self.scaler.scaled)
        if verdict.state == "pending":
            return
        self._finishing.add(rollout.id)

        async def finish() -> None:
            try:
                if verdict.state == "complete":
                    self.scaler.start(plan)
                await asyncio.to_thread(self.desired.finish, plan, rollout, verdict)
            except MlfuncsError as exc:
                log.warning("%s: %s", plan.name, exc)
                await asyncio.sleep(TICK_S)
            finally:
                self._finishing.discard(rollout.id)
                self.settled[rollout.id] = self.passes_begun + 1
                self.wake()

        self.settled[rollout.id] = sys.maxsize  # not before the registry has it
        self._background(finish())

    def _purge(self) -> None:
        """Let go of deleted endpoints that have no process any more."""
        running = {r.seen.endpoint for r in self.books.replicas.values()} | {key[0] for key in self.books.zygotes}
        for name, row in list(self.desired.deleted.items()):
            if name not in running and name not in self._finishing:
                self._finishing.add(name)
                self.scaler.forget(name)

                async def purge(row: Any = row) -> None:
                    try:
                        await asyncio.to_thread(self.desired.purge, row)
                    except MlfuncsError as exc:
                        log.warning("%s: %s", row.name, exc)
                    finally:
                        self._finishing.discard(row.name)
                        self.wake()

                self._background(purge())

    # --- what happens by the clock

    async def _tick(self) -> None:
        await asyncio.sleep(EARLY_TICK_S)
        if not self.scaler.is_pressed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S - EARLY_TICK_S):
                    await self._pressed.wait()
        self._pressed.clear()
        try:
            stats = await self.router.stats()
        except MlfuncsError:
            return  # the router is being restarted: no data is not zero load
        if self.scaler.tick(self.desired.plans.values(), self.books.observe(), stats, time.monotonic()):
            self.wake()

    async def _watch_registry(self) -> None:
        await asyncio.sleep(REGISTRY_EVERY_S)
        await self.refresh()

    async def _check_health(self) -> None:
        await asyncio.sleep(HEALTH_EVERY_S)
        await self.fleet.check_health()
        await asyncio.to_thread(rotate_logs, self.places.logs / "endpoints", LOG_BYTES)
        if self._sentinel is not None and not self._sentinel.is_alive():
            self._start_sentinel()

    # --- life and death

    async def _launch(self, key: Key) -> Launch:
        plan = self.desired.plans.get(key[0])
        if plan is None:
            raise Unavailable(f"endpoint {key[0]!r} is being deleted")
        return await make_launch(plan, key[1], self.settings, self.places, self.router.url)

    def _start_sentinel(self) -> None:
        self._stop_sentinel()
        own = processes.open_process(os.getpid())
        assert own is not None
        command = processes.module_command(sys.executable, "mlfuncs_runtime.supervisor.process")
        watcher = [sys.executable, "-I", "-S", str(sentinel.__file__), str(own.pid), str(own.started), *command]
        own.close()
        env = {**os.environ, **self.settings.to_environ()}
        self._sentinel = processes.spawn(watcher, env, self.places.logs / "supervisor.log", self.places.run)
        self.books.extra = {**self.books.extra, "sentinel": self._sentinel.to_dict(), "supervisor": os.getpid()}
        self.books.save()

    def _stop_sentinel(self) -> None:
        if self._sentinel is not None:
            self._sentinel.send(signal.SIGKILL)  # it has nothing to put away
            self._sentinel.wait_sync(2.0)
            self._sentinel.close()
            self._sentinel = None

    def _stop_old_sentinel(self, state: dict[str, Any]) -> None:
        old = processes.reopen((state.get("extra") or {}).get("sentinel"))
        if old is not None:
            old.send(signal.SIGKILL)
            old.close()

    async def _shut_down(self) -> None:
        self._stop_sentinel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self.books.forget(), return_exceptions=True)
        await asyncio.to_thread(self.triggers.stop)
        self.router.stop()
        processes.stop_sync(self.books.all_processes(), _STOP_S, self.places.home)
        remove_sockets(self.places)

    def _background(self, *work: Coroutine[Any, Any, None]) -> None:
        for coroutine in work:
            task = asyncio.get_running_loop().create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a part of the supervisor failed", exc_info=task.exception())
