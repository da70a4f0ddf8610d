"""What the supervisor does on its control socket: orders in, answers out. See `control.py` for the lines' form."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlfuncs
from mlfuncs.errors import InvalidInput, NotFound
from mlfuncs.serving.rollouts import REPLACED
from mlfuncs_runtime.supervisor.overview import endpoint_overview
from mlfuncs_runtime.supervisor.plan import EndpointPlan, Verdict, judge

if TYPE_CHECKING:
    from mlfuncs_runtime.supervisor.supervisor import Supervisor

LOG_LINES = 20  # shown with a failure
_MOST_WAIT_S = 30.0
_POKE_S = 5.0  # then the change comes into force later, e.g. once the router is back


class Orders:
    """Answers orders for one supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._started_s = time.time()
        self._answers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "ping": self._ping,
            "poke": self._poke,
            "wake": self._wake,
            "status": self._status,
            "wait": self._wait,
            "wait_deleted": self._wait_deleted,
            "shutdown": self._shutdown,
        }

    async def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to one order. Raises InvalidInput for an unknown one."""
        name = str(order.get("op") or order.get("event") or "")
        if name not in self._answers:
            raise InvalidInput(f"unknown order {name!r}; known: {', '.join(self._answers)}")
        answer: dict[str, Any] = await self._answers[name](order)
        return answer

    async def _ping(self, _order: dict[str, Any]) -> dict[str, Any]:
        supervisor = self._supervisor
        return {
            "pid": os.getpid(),
            "version": mlfuncs.__version__,
            "registry": registry_mark(supervisor.settings.resolved_registry_url),
            "url": supervisor.router.url,
            "started_at": self._started_s,
        }

    async def _poke(self, order: dict[str, Any]) -> dict[str, Any]:
        """Read the registry; the answer comes when the router knows what changed."""
        supervisor = self._supervisor
        supervisor.take_secrets({str(k): str(v) for k, v in (order.get("secrets") or {}).items()})
        await supervisor.refresh()
        supervisor.wake()
        wanted = supervisor.passes_begun + 1
        answer = await self._ping(order)
        return await self._until(lambda: answer, lambda _: supervisor.passes_done >= wanted, {"timeout_s": _POKE_S})

    async def _wake(self, order: dict[str, Any]) -> dict[str, Any]:
        """The router has requests that wait for a worker: none is there, or all are busy."""
        supervisor = self._supervisor
        plan = supervisor.desired.plans.get(str(order.get("endpoint")))
        if plan is None:
            return {}
        revision = order.get("revision")
        is_served = supervisor.books.observe().ready((plan.name, str(revision))) > 0
        if not is_served and supervisor.scaler.woken(plan, revision, time.monotonic()):
            supervisor.wake()
        supervisor.hurry()
        return {}

    async def _status(self, order: dict[str, Any]) -> dict[str, Any]:
        supervisor = self._supervisor
        plans = supervisor.desired.plans.values()
        wanted = [plan for plan in plans if order.get("project") in (None, plan.project)]
        if order.get("endpoint") is not None:
            wanted = [plan for plan in wanted if plan.name == order["endpoint"]]
        return {
            "supervisor": await self._ping(order),
            "router": {"url": supervisor.router.url, "pid": supervisor.router.pid},
            "endpoints": [self._overview(plan) for plan in sorted(wanted, key=lambda plan: plan.name)],
        }

    def _verdict(self, plan: EndpointPlan) -> Verdict:
        return judge(plan, self._supervisor.books.observe(), self._supervisor.scaler.scaled)

    def _overview(self, plan: EndpointPlan) -> dict[str, Any]:
        supervisor = self._supervisor
        values = endpoint_overview(plan, supervisor.books, supervisor.scaler.scaled, time.monotonic())
        load = {**supervisor.scaler.load_of(plan.name), **values["load"]}
        outcome = supervisor.desired.outcomes.get(plan.name) or {}
        if values["state"] == "empty" and outcome.get("state") == "failed":
            values["message"] = outcome["message"]
        triggers = supervisor.triggers.status(plan.name)
        return {**values, "load": load, "url": f"{supervisor.router.url}/{plan.name}", "triggers": triggers}

    async def _wait(self, order: dict[str, Any]) -> dict[str, Any]:
        """How a rollout stands, as soon as that differs from `message`, at the latest after `timeout_s`."""
        name, rollout = str(order["endpoint"]), str(order["rollout"])

        def look() -> dict[str, Any]:
            desired = self._supervisor.desired
            plan = desired.plans.get(name)
            if plan is None:
                raise NotFound("endpoint", name, desired.plans)
            if plan.rollout is not None and plan.rollout.id == rollout:
                return {"state": "pending", "message": self._verdict(plan).message}
            outcome = desired.outcomes.get(name) or {}
            if outcome.get("id") != rollout:
                return {"state": "replaced", "message": REPLACED}
            if self._supervisor.passes_done < self._supervisor.settled.get(rollout, 1):
                return {"state": "pending", "message": "the traffic moves"}  # the router does not know yet
            return {"state": outcome["state"], "message": outcome["message"]}

        answer = await self._until(
            look, lambda a: a["state"] != "pending" or a["message"] != order.get("message"), order
        )
        if answer["state"] == "failed":
            answer["log"] = await asyncio.to_thread(self._last_lines, name)
        return answer

    async def _wait_deleted(self, order: dict[str, Any]) -> dict[str, Any]:
        name, project = str(order["endpoint"]), order.get("project")

        def look() -> dict[str, Any]:
            row = self._supervisor.desired.deleted.get(name)
            return {"deleted": row is None or row.project != project}

        return await self._until(look, lambda answer: bool(answer["deleted"]), order)

    async def _until(
        self, look: Callable[[], dict[str, Any]], holds: Callable[[dict[str, Any]], bool], order: dict[str, Any]
    ) -> dict[str, Any]:
        deadline = time.monotonic() + min(_MOST_WAIT_S, float(order.get("timeout_s", 1.0)))
        answer = look()
        while not holds(answer) and time.monotonic() < deadline:
            try:
                async with asyncio.timeout(max(0.001, deadline - time.monotonic())), self._supervisor.passed:
                    await self._supervisor.passed.wait()
            except TimeoutError:
                pass
            answer = look()
        return answer

    async def _shutdown(self, _order: dict[str, Any]) -> dict[str, Any]:
        asyncio.get_running_loop().call_soon(self._supervisor.stopping.set)
        return {"pid": os.getpid()}

    def _last_lines(self, endpoint: str) -> list[str]:
        """The end of the newest log of the endpoint."""
        folder = self._supervisor.places.logs / "endpoints" / endpoint
        logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
        return tail(logs[-1], LOG_LINES) if logs else []


def tail(path: Path, n: int) -> list[str]:
    """The last `n` lines of a file, without line ends; none when there is no file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, n)]
    except OSError:
        return []


def registry_mark(url: str) -> str:
    """What tells two registries apart without showing a password."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]
