"""Orders from the supervisor, and the word to it that requests wait for a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mlfuncs.errors import InvalidInput, MlfuncsError, StorageError
from mlfuncs_runtime.control import ControlClient
from mlfuncs_runtime.router.core import Core
from mlfuncs_runtime.router.endpoint import Endpoint
from mlfuncs_runtime.routes import Route
from mlfuncs_runtime.supervisor.places import read_json, write_json

_WAKE_AGAIN_S = 1.0  # a request that still waits asks again


class RouterOrders:
    """Answers the supervisor's orders: configure, stats, drain, ping."""

    def __init__(self, core: Core, state: Path | None) -> None:
        self._core, self._state = core, state
        self._table: list[dict[str, Any]] | None = None
        self._answers: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "configure": self._configure,
            "stats": self._stats,
            "drain": self._drain,
            "ping": self._ping,
        }

    def restore(self) -> None:
        """Serve what the last router served, until the supervisor speaks."""
        found = read_json(self._state) if self._state is not None else None
        if isinstance(found, dict) and isinstance(found.get("routes"), list):
            try:
                self._apply(found["routes"])
            except (MlfuncsError, TypeError, KeyError, ValueError, AttributeError) as exc:
                self._core.log.warning("%s holds no table that can be used (%s)", self._state, exc)

    async def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to one order. Raises InvalidInput for one that is not known or not whole."""
        name = str(order.get("op"))
        if name not in self._answers:
            raise InvalidInput(f"unknown order {name!r}; known: {', '.join(self._answers)}")
        return await self._answers[name](order)

    async def _configure(self, order: dict[str, Any]) -> dict[str, Any]:
        routes = order.get("routes")
        if not isinstance(routes, list):
            raise InvalidInput("configure needs 'routes', a list")
        try:
            self._apply(routes)
        except (TypeError, KeyError, ValueError, AttributeError) as exc:
            raise InvalidInput(f"a route cannot be read: {exc}") from exc
        if self._state is not None and routes != self._table:
            try:
                write_json(self._state, {"routes": routes})
            except OSError as exc:
                raise StorageError(f"the table cannot be kept in {str(self._state)!r} ({exc.strerror})") from exc
        self._table = routes
        return {"routes": len(routes)}

    def _apply(self, routes: list[dict[str, Any]]) -> None:
        self._core.configure([Route.from_dict(values) for values in routes])

    async def _stats(self, _order: dict[str, Any]) -> dict[str, Any]:
        now_s = time.monotonic()
        endpoints = {name: _endpoint_stats(endpoint, now_s) for name, endpoint in self._core.endpoints.items()}
        return {"now_s": now_s, "endpoints": endpoints}

    async def _drain(self, order: dict[str, Any]) -> dict[str, Any]:
        wanted = str(order.get("replica"))
        for state in self._core.replicas_of(wanted):
            if state.in_flight:
                waiter = asyncio.get_running_loop().create_future()
                state.waiters.append(waiter)
                await waiter
        return {"replica": wanted}

    async def _ping(self, _order: dict[str, Any]) -> dict[str, Any]:
        core = self._core
        return {"pid": os.getpid(), "draining": core.draining, "endpoints": sorted(core.endpoints)}


def _endpoint_stats(endpoint: Endpoint, now_s: float) -> dict[str, Any]:
    revisions = {}
    for name, revision in endpoint.revisions.items():
        p50, p99 = revision.counts.recent_quantiles_s((0.5, 0.99))
        revisions[name] = {
            "buckets": revision.meter.take(now_s),  # [second, average concurrency, requests], oldest first
            "under_way": revision.meter.under_way(now_s),  # the same of the second that is not over
            "active": revision.meter.active,
            "queued": len(revision.queue),
            "p50_s": p50,
            "p99_s": p99,
        }
    return {
        "queued": endpoint.queued,
        "queued_bytes": endpoint.queued_bytes,
        "in_flight": dict(endpoint.in_flight()),
        "revisions": revisions,
    }


class Waker:
    """Tells the supervisor for which revisions requests wait, no worker being free: at once, then every second."""

    def __init__(self, supervisor: Path | None) -> None:
        self._client = ControlClient(supervisor) if supervisor is not None else None
        self._wanted: set[tuple[str, str]] = set()
        self._something = asyncio.Event()
        self.core: Core | None = None

    def wake(self, endpoint: str, revision: str) -> None:
        """A request waits for a worker of this revision."""
        if (endpoint, revision) not in self._wanted:
            self._wanted.add((endpoint, revision))
            self._something.set()

    async def run(self) -> None:
        """Send what is to be said; runs until cancelled."""
        told: dict[tuple[str, str], float] = {}
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WAKE_AGAIN_S if self._wanted else None):
                    await self._something.wait()
            self._something.clear()
            now_s = time.monotonic()
            self._wanted = {key for key in self._wanted if self._waits(key)}
            told = {key: at_s for key, at_s in told.items() if key in self._wanted}
            for key in list(self._wanted):
                if now_s - told.get(key, -1e9) >= _WAKE_AGAIN_S * 0.9 and await self._tell(*key):
                    told[key] = now_s

    def _waits(self, key: tuple[str, str]) -> bool:
        endpoint = self.core.endpoints.get(key[0]) if self.core is not None else None
        revision = endpoint.revisions.get(key[1]) if endpoint is not None else None
        return revision is not None and bool(revision.queue)

    async def _tell(self, endpoint: str, revision: str) -> bool:
        if self._client is None:
            return True
        try:
            await self._client.call({"event": "wake", "endpoint": endpoint, "revision": revision}, timeout_s=1.0)
        except MlfuncsError as exc:
            if self.core is not None:
                self.core.log.warning("the supervisor was not woken for %s: %s", endpoint, exc)
            return False
        return True
