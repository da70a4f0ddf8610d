"""The supervisor's judgement: what is wished and what is seen go in, what to do comes out.

No process, socket or clock is in here: `now_s` is an argument, and the same arguments always give the same actions.
The shell (`supervisor.py`) carries the actions out and calls again with what it sees then, so a lost action is only a
late one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Key = tuple[str, str]  # (endpoint, revision)

BACKOFF_FIRST_S = 0.5  # guess; doubles with each failure in a row
BACKOFF_MAX_S = 30.0  # guess: a broken function costs one start every half minute
PATIENT_LOADS = 2  # guess: after a restart more zygotes than this load at once only when someone waits for them
PROVEN_S = 10.0  # a replica that was ready this long starts the count of failures anew when it dies


class Phase(StrEnum):
    """Where a replica is in its life. Only `READY` ones are given requests."""

    STARTING = "starting"
    READY = "ready"
    PARKED = "parked"  # ready, stopped by SIGSTOP, kept as a spare
    DRAINING = "draining"  # given no new request; waits for those in flight
    STOPPING = "stopping"  # got SIGTERM
    KILLED = "killed"  # got SIGKILL


class ZygotePhase(StrEnum):
    """Where a revision's zygote is; an `UNUSABLE` one means that workers of this revision are spawned."""

    STARTING = "starting"
    READY = "ready"
    UNUSABLE = "unusable"
    STOPPING = "stopping"


@dataclass(frozen=True)
class Wish:
    """What one revision should have running; a `patient` one lets others load first, as nobody waits for it."""

    endpoint: str
    revision: str
    replicas: int
    spares: int = 0
    start_timeout_s: float = 120.0
    drain_timeout_s: float = 60.0
    stop_timeout_s: float = 35.0
    patient: bool = False

    @property
    def key(self) -> Key:
        """(endpoint, revision)."""
        return (self.endpoint, self.revision)


@dataclass(frozen=True)
class ReplicaSeen:
    """One worker process as it is now; `since_s` is when it entered its phase."""

    id: str
    endpoint: str
    revision: str
    phase: Phase
    since_s: float
    healthy: bool = True
    drained: bool = False  # draining, and no request is in flight there any more

    @property
    def key(self) -> Key:
        """(endpoint, revision)."""
        return (self.endpoint, self.revision)


@dataclass(frozen=True)
class ZygoteSeen:
    """One zygote process as it is now."""

    endpoint: str
    revision: str
    phase: ZygotePhase
    since_s: float

    @property
    def key(self) -> Key:
        """(endpoint, revision)."""
        return (self.endpoint, self.revision)


@dataclass(frozen=True)
class Failures:
    """How often in a row a revision's processes died or never became ready, and when last."""

    count: int = 0
    last_s: float = 0.0
    reason: str = ""

    def after(self, now_s: float, reason: str, ready_for_s: float = 0.0) -> Failures:
        """The record after one more failure; a replica that was ready for long starts the count anew."""
        return Failures(1 if ready_for_s >= PROVEN_S else self.count + 1, now_s, reason)

    @property
    def delay_s(self) -> float:
        """How long after the last failure the next start waits: not at all after the first."""
        if self.count <= 1:
            return 0.0
        return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(self.count - 2, 16)))


@dataclass(frozen=True)
class Observed:
    """Everything that runs, and the record of failures by revision."""

    replicas: tuple[ReplicaSeen, ...] = ()
    zygotes: tuple[ZygoteSeen, ...] = ()
    failures: Mapping[Key, Failures] = field(default_factory=dict)

    def ready(self, key: Key) -> int:
        """How many healthy replicas of that revision take requests."""
        return sum(r.key == key and r.phase is Phase.READY and r.healthy for r in self.replicas)


@dataclass(frozen=True)
class StartZygote:
    """Start the zygote of a revision."""

    endpoint: str
    revision: str


@dataclass(frozen=True)
class StopZygote:
    """Stop the zygote of a revision; the workers it forked live on."""

    endpoint: str
    revision: str


@dataclass(frozen=True)
class StartReplica:
    """Start one more worker, by fork when the revision's zygote can, else by spawn."""

    endpoint: str
    revision: str
    fork: bool


@dataclass(frozen=True)
class DrainReplica:
    """Give the worker no new request and watch until those in flight are answered."""

    id: str
    reason: str


@dataclass(frozen=True)
class StopReplica:
    """Send SIGTERM."""

    id: str


@dataclass(frozen=True)
class KillReplica:
    """Send SIGKILL; `reason` says what it did not do in time."""

    id: str
    reason: str


@dataclass(frozen=True)
class ParkReplica:
    """Take the worker out of the router and stop it by SIGSTOP, as a spare."""

    id: str


@dataclass(frozen=True)
class UnparkReplica:
    """Let a spare go on (SIGCONT) and take requests."""

    id: str


Action = (
    StartZygote | StopZygote | StartReplica | DrainReplica | StopReplica | KillReplica | ParkReplica | UnparkReplica
)


def reconcile(wishes: Iterable[Wish], observed: Observed, now_s: float) -> list[Action]:
    """The actions that bring what is observed nearer to the wishes."""
    by_key = {wish.key: wish for wish in wishes}
    actions: list[Action] = []
    for zygote in observed.zygotes:
        if zygote.key not in by_key and zygote.phase is not ZygotePhase.STOPPING:
            actions.append(StopZygote(*zygote.key))
    groups: dict[Key, list[ReplicaSeen]] = {key: [] for key in by_key}
    for replica in observed.replicas:
        groups.setdefault(replica.key, []).append(replica)
    for key, replicas in groups.items():
        wish = by_key.get(key) or Wish(*key, replicas=0)
        overdue = _overdue(wish, replicas, now_s)
        actions += overdue.values()
        if key in by_key:
            actions += _starts(wish, replicas, observed, now_s)
        actions += _surplus(wish, [replica for replica in replicas if replica.id not in overdue])
    return _in_turn(actions, by_key, observed)


def _in_turn(actions: list[Action], wishes: Mapping[Key, Wish], observed: Observed) -> list[Action]:
    """The actions without starts of patient zygotes while others load: those come in a later pass."""

    def is_patient(action: Action) -> bool:
        return isinstance(action, StartZygote) and wishes[action.endpoint, action.revision].patient

    loading = sum(zygote.phase is ZygotePhase.STARTING for zygote in observed.zygotes)
    loading += sum(isinstance(action, StartZygote) and not is_patient(action) for action in actions)
    patient = [action for action in actions if is_patient(action)][: max(0, PATIENT_LOADS - loading)]
    return [action for action in actions if not is_patient(action) or action in patient]


def next_due_s(observed: Observed, now_s: float) -> float:
    """Seconds until a back-off ends, or infinity; everything else is found by the regular tick."""
    ends = (failure.last_s + failure.delay_s - now_s for failure in observed.failures.values() if failure.delay_s)
    return min((end for end in ends if end > 0), default=float("inf"))


def _overdue(wish: Wish, replicas: list[ReplicaSeen], now_s: float) -> dict[str, Action]:
    """Actions, by id, on replicas that are unhealthy, drained, or longer in a phase than allowed."""
    actions: dict[str, Action] = {}
    for replica in replicas:
        age_s = now_s - replica.since_s
        if replica.phase is Phase.STARTING and age_s > wish.start_timeout_s:
            actions[replica.id] = KillReplica(replica.id, f"was not ready within {wish.start_timeout_s:g} s")
        elif replica.phase is Phase.READY and not replica.healthy:
            actions[replica.id] = DrainReplica(replica.id, "does not answer health checks")
        elif replica.phase is Phase.DRAINING:
            allowed_s = wish.drain_timeout_s if replica.healthy else 1.0
            if replica.drained or age_s > allowed_s:
                actions[replica.id] = StopReplica(replica.id)
        elif replica.phase is Phase.STOPPING:
            allowed_s = wish.stop_timeout_s if replica.healthy else 1.0
            if age_s > allowed_s:
                actions[replica.id] = KillReplica(replica.id, f"did not stop within {allowed_s:g} s")
    return actions


def _starts(wish: Wish, replicas: list[ReplicaSeen], observed: Observed, now_s: float) -> list[Action]:
    """The zygote, spares that go on, and new replicas, as far as the back-off allows."""
    failures = observed.failures.get(wish.key, Failures())
    may_start = now_s >= failures.last_s + failures.delay_s
    zygote = next((z for z in observed.zygotes if z.key == wish.key and z.phase is not ZygotePhase.STOPPING), None)
    actions: list[Action] = []
    if zygote is None and may_start:
        actions.append(StartZygote(*wish.key))
    ready = [r for r in replicas if r.phase is Phase.READY and r.healthy]
    starting = [r for r in replicas if r.phase is Phase.STARTING]
    parked = sorted((r for r in replicas if r.phase is Phase.PARKED), key=lambda r: r.since_s)
    woken = parked[: max(0, wish.replicas - len(ready))]
    actions += [UnparkReplica(r.id) for r in woken]
    missing = wish.replicas + wish.spares - len(ready) - len(starting) - len(parked)
    if zygote is None or zygote.phase is ZygotePhase.STARTING or not may_start:
        return actions  # forking from a zygote that is nearly up is quicker than a spawn beside it
    if failures.count >= 2:  # after repeated failures one at a time, as a probe
        missing = min(missing, 1 - len(starting))
    fork = zygote.phase is ZygotePhase.READY
    return actions + [StartReplica(*wish.key, fork=fork)] * max(0, missing)


def _surplus(wish: Wish, replicas: list[ReplicaSeen]) -> list[Action]:
    """Parks or stops what is over the wish: starting ones first, then the youngest ready ones."""
    ready = sorted((r for r in replicas if r.phase is Phase.READY), key=lambda r: (r.since_s, r.id))
    starting = sorted((r for r in replicas if r.phase is Phase.STARTING), key=lambda r: (r.since_s, r.id))
    parked = sorted((r for r in replicas if r.phase is Phase.PARKED), key=lambda r: (r.since_s, r.id))
    actions: list[Action] = []
    over = len(ready) + len(starting) + len(parked) - wish.replicas - wish.spares
    for replica in reversed(starting):
        if over > 0:
            actions.append(StopReplica(replica.id))
            over -= 1
    extra = ready[wish.replicas :]
    room = max(0, wish.spares - len(parked))
    actions += [ParkReplica(replica.id) for replica in extra[:room]]
    actions += [DrainReplica(replica.id, "is no longer needed") for replica in extra[room:]]
    woken = max(0, wish.replicas - len(ready))
    idle = parked[woken:]
    actions += [StopReplica(replica.id) for replica in idle[wish.spares :]]
    return actions
