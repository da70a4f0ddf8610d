"""Moves messages from a source to an endpoint: at least once, bounded in flight, retried, dead-lettered; the port.

A `Source` (Redis Streams, Kafka, one in memory) is used from one thread only, that of the pump; the calls have threads
of their own. A message counts against the bound until it is settled, also while it waits for its next try, so that
a poisoned stream cannot fill the memory.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlfuncs.errors import MlfuncsError, Unavailable
from mlfuncs_runtime.triggers.calls import Failure, Fault, judge_failure

log = logging.getLogger("mlfuncs.triggers")

_IDLE_WAIT_S = 1.0
_BUSY_WAIT_S = 0.02


@dataclass(frozen=True)
class Message:
    """One message: `body` is the JSON to send, `tries` how often it was handed out (1: the first time)."""

    id: str
    body: bytes
    tries: int = 1
    raw: Any = field(default=None, compare=False)  # the source's own


class Source(Protocol):
    """Where messages come from. Every method may raise Unavailable; the pump asks again later."""

    waiting: int | None  # messages that nobody was handed yet, as last seen; None: not known

    def receive(self, limit: int, wait_s: float) -> Sequence[Message]:
        """Up to `limit` messages, those left over by an earlier process first; waits up to `wait_s` for one."""

    def settle(self, message: Message) -> None:
        """It was served: never hand it out again."""

    def bury(self, message: Message, reason: str) -> None:
        """Keep it aside with the reason, then never hand it out again."""

    def retried(self, message: Message) -> None:
        """It is about to be called once more; remember that where a crash does not forget it."""

    def keep(self, messages: Sequence[Message]) -> None:
        """These are still being worked on: nobody else may take them over."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True)
class Policy:
    """Bounds: messages at once, tries of one, and the back-off between them (doubled each time, with jitter)."""

    max_in_flight: int = 8
    max_tries: int = 5
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    keep_every_s: float = 15.0

    def delay_s(self, tries: int) -> float:
        """Seconds before the try after that many."""
        return float(min(self.backoff_max_s, self.backoff_s * 2 ** min(tries - 1, 20)) * random.uniform(0.8, 1.0))


@dataclass
class Counts:
    """What a pump did since it started."""

    served: int = 0
    failed: int = 0  # calls, not messages
    retried: int = 0
    buried: int = 0
    held: int = 0
    last_error: str = ""
    last_at: float = 0.0


class Pump:
    """Serves one source. `run` is its life; `step` one turn of it, for a thread or a test to drive."""

    def __init__(
        self,
        source: Source,
        call: Callable[[Message], None],
        policy: Policy = Policy(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = Counts()
        self._source, self._call, self._policy, self._clock = source, call, policy, clock
        self._pool = ThreadPoolExecutor(policy.max_in_flight, thread_name_prefix="trigger-call")
        self._calls: dict[Future[None], Message] = {}
        self._waiting: list[tuple[float, Message, bool]] = []  # due, message, whether that is one more try
        self._unsettled: list[tuple[Message, str | None]] = []  # answered, the source not told yet
        self._held_until_s = self._kept_s = clock()

    @property
    def waiting(self) -> int | None:
        """Messages of the source that nobody was handed yet; None: not known."""
        return self._source.waiting

    @property
    def in_flight(self) -> int:
        """Messages taken from the source and not settled."""
        return len(self._calls) + len(self._waiting) + len(self._unsettled)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop`; then wait for the calls under way and settle them."""
        while not stop.is_set():
            try:
                self.step(_IDLE_WAIT_S)
            except Unavailable as exc:
                self._note(str(exc))
                log.warning("%s; trying again", exc)
                stop.wait(_IDLE_WAIT_S)
            except Exception as exc:  # a server loop: one message must not end the trigger
                self._note(f"{type(exc).__name__}: {exc}")
                log.exception("a trigger's turn failed")
                stop.wait(_IDLE_WAIT_S)
        self.close()

    def step(self, wait_s: float = 0.0) -> None:
        """Collect answers, tell the source, start what is due, take more."""
        self._collect()
        self._settle()
        now_s = self._clock()
        held = now_s < self._held_until_s
        if not held:
            self._start_due(now_s)
        if now_s - self._kept_s >= self._policy.keep_every_s:
            self._source.keep([*self._calls.values(), *(entry[1] for entry in self._waiting)])
            self._kept_s = now_s
        room = 0 if held else self._policy.max_in_flight - self.in_flight
        for message in self._source.receive(room, self._patience(wait_s, room)):
            self._take(message)
        if self._calls and wait_s:
            wait(self._calls, min(wait_s, _BUSY_WAIT_S), FIRST_COMPLETED)

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for the calls under way, settle what was served, and give the rest back to the source."""
        wait(self._calls, timeout_s)
        self._collect()
        try:
            self._settle()
            self._source.close()
        except MlfuncsError as exc:
            log.warning("%s", exc)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _patience(self, wait_s: float, room: int) -> float:
        if self._calls:
            return 0.0
        return min(wait_s, _BUSY_WAIT_S * 5) if self._waiting or room < 1 else wait_s

    def _take(self, message: Message) -> None:
        if message.tries > self._policy.max_tries:  # each of its tries ended with the process that made it
            self._unsettled.append((message, f"given up after {message.tries - 1} tries that had no end"))
        else:
            self._start(message)

    def _start(self, message: Message) -> None:
        self._calls[self._pool.submit(self._call, message)] = message

    def _start_due(self, now_s: float) -> None:
        for entry in [entry for entry in self._waiting if entry[0] <= now_s]:
            _, message, again = entry
            if again:
                self._source.retried(message)
                message = Message(message.id, message.body, message.tries + 1, message.raw)
            self._waiting.remove(entry)
            self._start(message)

    def _collect(self) -> None:
        for future in [future for future in self._calls if future.done()]:
            message = self._calls.pop(future)
            error = future.exception()
            if error is None:
                self._unsettled.append((message, None))
            else:
                self._failed(message, _failure_of(error))

    def _failed(self, message: Message, failure: Failure) -> None:
        now_s = self._clock()
        self.counts.failed += 1
        self._note(failure.reason)
        if failure.fault is Fault.HOLD:
            self.counts.held += 1
            self._held_until_s = max(self._held_until_s, now_s + failure.wait_s)
            self._waiting.append((self._held_until_s, message, False))
        elif failure.fault is Fault.REFUSED or message.tries >= self._policy.max_tries:
            self._unsettled.append((message, failure.reason))
        else:
            self.counts.retried += 1
            self._waiting.append((now_s + self._policy.delay_s(message.tries), message, True))

    def _settle(self) -> None:
        """Tell the source, in order; what it did not hear is told again."""
        while self._unsettled:
            message, reason = self._unsettled[0]
            if reason is None:
                self._source.settle(message)
                self.counts.served += 1
                self.counts.last_at = time.time()
            else:
                self._source.bury(message, reason)
                self.counts.buried += 1
                log.error("message %s is put aside: %s", message.id, reason)
            self._unsettled.pop(0)

    def _note(self, reason: str) -> None:
        self.counts.last_error = reason[:500]


def _failure_of(error: BaseException) -> Failure:
    if isinstance(error, MlfuncsError):
        return judge_failure(error)
    return Failure(Fault.FAILED, f"{type(error).__name__}: {error}")
