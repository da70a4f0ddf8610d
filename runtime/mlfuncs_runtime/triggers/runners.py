"""What runs for one trigger in the trigger process: a thread that watches the clock or drives a pump."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlfuncs import adapters
from mlfuncs.errors import MlfuncsError, SpecError
from mlfuncs.secrets import resolve_secrets
from mlfuncs.serving.client import encode
from mlfuncs.settings import Settings
from mlfuncs.triggers import Cron, KafkaTopic, RedisStream
from mlfuncs_runtime.supervisor.places import read_json, write_json
from mlfuncs_runtime.triggers.calls import Callee, Fault, judge_failure
from mlfuncs_runtime.triggers.cron import Memory, look, next_time
from mlfuncs_runtime.triggers.pump import Policy, Pump, Source
from mlfuncs_runtime.triggers.table import Entry

log = logging.getLogger("mlfuncs.triggers")

_LOOK_EVERY_S = 1.0
_OPEN_AGAIN_S = 15.0
_MOST_OVERLAPPING = 16
_CRON_GIVES_UP_S = 600.0


class CronMemories:
    """What is remembered of the cron triggers, in one file; written before a tick fires, so that none fires twice."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._values: dict[str, Any] = read_json(path) or {}

    def get(self, key: str) -> Memory | None:
        """What is remembered under `key`."""
        values = self._values.get(key)
        return Memory.from_dict(values) if values else None

    def put(self, key: str, memory: Memory) -> None:
        """Remember; returns when it is on disk."""
        with self._lock:
            self._values[key] = memory.to_dict()
            write_json(self._path, self._values)

    def forget_others(self, keys: set[str]) -> None:
        """Forget the triggers that are not in `keys`: one that comes back later starts anew."""
        with self._lock:
            kept = {key: value for key, value in self._values.items() if key in keys}
            if kept != self._values:
                self._values = kept
                write_json(self._path, kept)


class Runner:
    """One trigger's thread. `stop` returns at once; `join` waits for its end."""

    def __init__(self, entry: Entry, callee: Callee) -> None:
        self.entry, self.callee = entry, callee
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=entry.key, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(timeout_s)

    def status(self) -> dict[str, Any]:
        """State, counts and the last error, JSON-ready."""
        raise SpecError(f"{type(self).__name__} has no status")

    def _run(self) -> None:
        while not self.stopping.is_set():
            try:
                self._serve()
            except Exception:  # a server loop: the trigger goes on
                log.exception("trigger %s failed", self.entry.key)
                self.stopping.wait(_LOOK_EVERY_S)

    def _serve(self) -> None:
        raise SpecError(f"{type(self).__name__} serves nothing")


class CronRunner(Runner):
    """Fires at the ticks of one cron trigger."""

    def __init__(
        self,
        entry: Entry,
        callee: Callee,
        memories: CronMemories,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        super().__init__(entry, callee)
        assert isinstance(entry.trigger, Cron)
        self.cron = entry.trigger
        self._memories, self._now = memories, now
        self._fired: list[threading.Thread] = []
        self._counts = {"served": 0, "failed": 0, "retried": 0, "given_up": 0, "dropped": 0}
        self._last_at = 0.0
        self._last_error = ""

    def turn(self) -> datetime:
        """One look at the clock; when to look again."""
        now = self._now()
        self._fired = [thread for thread in self._fired if thread.is_alive()]
        known = self._memories.get(self.entry.key)
        busy = bool(self._fired) if self.cron.overlap == "skip" else False
        full = len(self._fired) >= _MOST_OVERLAPPING
        found = look(self.cron, known, now, busy or full)
        if found.memory != known:
            self._memories.put(self.entry.key, found.memory)
        if found.dropped is not None or (found.fire is not None and full):
            self._counts["dropped"] += 1
            log.warning("%s: the tick of %s is dropped", self.entry.key, found.dropped or found.fire)
        elif found.fire is not None:
            thread = threading.Thread(target=self._fire, args=(found.fire,), daemon=True)
            self._fired.append(thread)
            thread.start()
        return next_time(self.cron.schedule, now, self.cron.time_zone) or now

    def join(self, timeout_s: float) -> None:
        """Wait for the end and for the calls under way."""
        deadline_s = time.monotonic() + timeout_s
        for thread in [self._thread, *self._fired]:
            if thread.ident is not None:
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def status(self) -> dict[str, Any]:
        """State, counts, the tick fired last and the next one."""
        memory = self._memories.get(self.entry.key)
        fired = memory.fired.isoformat() if memory and memory.fired else None
        coming = next_time(self.cron.schedule, self._now(), self.cron.time_zone)
        values: dict[str, Any] = {"fired": fired, "next": coming.isoformat() if coming else None}
        values |= {"last_at": self._last_at, "last_error": self._last_error}
        return {"state": "running" if any(t.is_alive() for t in self._fired) else "waiting", **self._counts, **values}

    def _serve(self) -> None:
        again = self.turn()
        self.stopping.wait(min(_LOOK_EVERY_S, max(0.01, (again - self._now()).total_seconds())))

    def _fire(self, tick: datetime) -> None:
        request_id = f"cron-{self.entry.endpoint}-{tick:%Y%m%dT%H%M%SZ}"
        policy, body, tries = Policy(), encode(self.cron.body), 1
        give_up_s = time.monotonic() + _CRON_GIVES_UP_S
        while not self.stopping.is_set():
            try:
                self.callee.call(body, request_id)
                self._counts["served"] += 1
                self._last_at = time.time()
                return
            except MlfuncsError as exc:
                failure = judge_failure(exc)
            self._counts["failed"] += 1
            self._last_error = failure.reason[:500]
            spent = failure.fault is Fault.REFUSED or tries >= self.cron.max_tries
            if (spent and failure.fault is not Fault.HOLD) or time.monotonic() > give_up_s:
                break
            tries += failure.fault is Fault.FAILED
            self._counts["retried"] += 1
            self.stopping.wait(failure.wait_s or policy.delay_s(tries))
        self._counts["given_up"] += 1
        log.error("%s: the tick of %s failed: %s", self.entry.key, tick, self._last_error)


class StreamRunner(Runner):
    """Drives the pump of one stream; opens the source again when that cannot be done now."""

    def __init__(self, entry: Entry, callee: Callee, open_source: Callable[[], Source]) -> None:
        super().__init__(entry, callee)
        self._open, self._problem = open_source, ""
        self._pump: Pump | None = None

    def status(self) -> dict[str, Any]:
        """State, messages in flight, counts and the last error."""
        if self._pump is None:
            return {"state": "failing" if self._problem else "starting", "last_error": self._problem}
        pump = self._pump
        return {"state": "running", "waiting": pump.waiting, "in_flight": pump.in_flight, **vars(pump.counts)}

    def _serve(self) -> None:
        trigger = self.entry.trigger
        assert isinstance(trigger, RedisStream | KafkaTopic)
        try:
            source = self._open()
        except MlfuncsError as exc:
            self._problem = f"{exc.title}: {exc}"
            log.error("%s: %s", self.entry.key, self._problem)
            self.stopping.wait(_OPEN_AGAIN_S)
            return
        self._pump = Pump(
            source,
            lambda message: self.callee.call(message.body, f"{trigger.kind}-{message.id}"),
            Policy(trigger.max_in_flight, trigger.max_tries),
        )
        self._pump.run(self.stopping)


def make_runner(entry: Entry, callee: Callee, memories: CronMemories, settings: Settings, consumer: str) -> Runner:
    """The runner of an entry; `consumer` names this home in consumer groups."""
    trigger = entry.trigger
    if isinstance(trigger, Cron):
        return CronRunner(entry, callee, memories)
    if isinstance(trigger, RedisStream):
        return StreamRunner(entry, callee, lambda: _open_redis(trigger, settings, f"{consumer}-{entry.endpoint}"))
    return StreamRunner(entry, callee, lambda: _open_kafka(trigger, settings))


def _open_redis(trigger: RedisStream, settings: Settings, consumer: str) -> Source:
    from mlfuncs_runtime.triggers.redis import RedisStreamSource

    url = _plain(trigger.url or settings.redis_url, settings)
    if url:
        return RedisStreamSource(trigger, lambda: url, consumer)
    ensure = adapters.load("features:redis")
    return RedisStreamSource(trigger, lambda: f"unix://{ensure(settings)}", consumer)


def _open_kafka(trigger: KafkaTopic, settings: Settings) -> Source:
    from mlfuncs_runtime.triggers.kafka import KafkaSource

    options = {key: _plain(value, settings) for key, value in trigger.options.items()}
    return KafkaSource(trigger, _plain(trigger.servers, settings), options)


def _plain(value: str, settings: Settings) -> str:
    """The value, of a secret when it names one."""
    name = value.removeprefix("secret:")
    return value if name == value else resolve_secrets([name], settings)[name]
