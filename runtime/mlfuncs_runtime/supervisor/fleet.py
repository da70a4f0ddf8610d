"""The hands of the supervisor: carries out the reconciler's actions on the workers and zygotes of one home."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mlfuncs_runtime.routes import Replica
from mlfuncs_runtime.supervisor.books import Books
from mlfuncs_runtime.supervisor.reconcile import (
    Action,
    DrainReplica,
    Failures,
    KillReplica,
    ParkReplica,
    Phase,
    StartReplica,
    StartZygote,
    StopReplica,
    StopZygote,
    UnparkReplica,
)
from mlfuncs_runtime.supervisor.workers import Workers
from mlfuncs_runtime.supervisor.zygotes import Zygotes

log = logging.getLogger("mlfuncs.supervisor")


class Fleet:
    """Begins actions; their ends show in `books.observe()`."""

    def __init__(self, books: Books, drain: Callable[[str, float], Awaitable[None]]) -> None:
        self.books = books
        self._zygotes = Zygotes(books)
        self._workers = Workers(books, self._zygotes, drain)

    def carry_out(self, action: Action) -> None:
        """Begin one action of the reconciler; its end shows in `observe`."""
        match action:
            case StartZygote(endpoint, revision):
                self._zygotes.start((endpoint, revision))
            case StopZygote(endpoint, revision):
                self._zygotes.stop(self.books.zygotes[(endpoint, revision)])
            case StartReplica(endpoint, revision, fork):
                self._workers.start((endpoint, revision), fork)
            case DrainReplica(id, reason):
                log.info("%s %s: it takes no new requests", id, reason)
                self.books.replicas[id].move(Phase.DRAINING)
            case StopReplica(id):
                self._workers.send(self.books.replicas[id], signal.SIGTERM, Phase.STOPPING)
            case KillReplica(id, reason):
                self._workers.kill(self.books.replicas[id], reason)
            case ParkReplica(id):
                self.books.replicas[id].move(Phase.PARKED)
            case UnparkReplica(id):
                self._workers.unpark(self.books.replicas[id])

    def routable(self, endpoint: str) -> list[Replica]:
        """The workers of an endpoint that take requests."""
        return [
            Replica(r.seen.id, r.seen.revision, r.socket)
            for r in self.books.replicas.values()
            if r.seen.endpoint == endpoint and r.seen.phase is Phase.READY and r.seen.healthy
        ]

    def release(self) -> None:
        """After the router knows who takes requests: wait for those in flight at the workers taken out."""
        self._workers.release()

    async def check_health(self) -> None:
        """Ask every ready worker whether it lives."""
        await self._workers.check_health()

    def adopt(self, state: Mapping[str, Any]) -> None:
        """Go on with what an earlier supervisor started and that still runs."""
        self.books.extra = dict(state.get("extra") or {})
        for values in state.get("zygotes") or ():
            self._zygotes.adopt(values)
        for values in state.get("replicas") or ():
            self._workers.adopt(values)
        for values in state.get("failures") or ():  # times before a reboot lie in the future of this clock
            self.books.failures[(values["endpoint"], values["revision"])] = Failures(
                values["count"], min(values["last_s"], time.monotonic()), values["reason"]
            )
