"""The autoscaler's shell: from the router's measures to replicas, second by second on a stepped clock."""

from __future__ import annotations

from typing import Any

import pytest

from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.spec import FunctionSpec, Scale
from mlfuncs_runtime.router.meter import LoadMeter
from mlfuncs_runtime.supervisor.plan import EndpointPlan, Rollout
from mlfuncs_runtime.supervisor.reconcile import Observed, Phase, ReplicaSeen
from mlfuncs_runtime.supervisor.scaling import Scaler

KEY = ("churn", "rev-1")


class World:
    """A scaler, the replicas it wished for, and a load; `step` lets seconds pass."""

    def __init__(self, **scale: Any) -> None:
        spec = FunctionSpec(name="churn", scale=Scale(**scale))
        revisions = {name: RevisionConfig(spec) for name in ("rev-1", "rev-2")}
        digests = dict.fromkeys(revisions, "d")
        self.plan = EndpointPlan("test", "churn", 1, {"rev-1": 100}, {}, {}, {}, None, revisions, digests)
        self.scaler = Scaler()
        self.now_s = 1000.0

    @property
    def replicas(self) -> int:
        return self.scaler.scaled.get(KEY, 0)

    def observed(self) -> Observed:
        return Observed(tuple(ReplicaSeen(f"r{n}", *KEY, Phase.READY, 0.0) for n in range(self.replicas)))

    def step(self, seconds: int, concurrency: float, requests: int = 0) -> int:
        """Let seconds pass under a load; the replicas wished then."""
        for _ in range(seconds):
            self.now_s += 1.0
            bucket = [int(self.now_s) - 1, concurrency, requests]
            revision = {"buckets": [bucket], "active": 0, "queued": 0, "p50_s": 0.002, "p99_s": None}
            measured = {"queued": 3, "in_flight": {"r0": 2, "r1": 1}, "revisions": {"rev-1": revision}}
            self.scaler.tick([self.plan], self.observed(), {"endpoints": {"churn": measured}}, self.now_s)
        return self.replicas


def test_load_brings_replicas_and_silence_takes_them_to_zero():
    world = World(min=0, max=4, concurrency=10)
    assert world.step(1, 1.0) == 1
    assert world.step(10, 25.0) == 4  # 25 at once, 7 aimed at per replica
    assert world.step(60, 0.0) >= 1  # the window must be idle as a whole
    assert world.step(150, 0.0) == 0


def test_a_window_of_one_second_does_not_flap_under_a_steady_load():
    world = World(min=0, max=2, window_s=1, grace_s=0, concurrency=10)
    world.step(2, 1.0)
    seen = set()
    for _ in range(60):
        seen.add(world.step(1, 1.0))
        world.now_s += 0.5  # the supervisor looks twice a second, and no other second is over yet
        world.scaler.tick([world.plan], world.observed(), {}, world.now_s)
        seen.add(world.replicas)
        world.now_s -= 0.5
    assert seen == {1}
    assert world.step(5, 0.0) == 0


def test_the_minimum_and_the_maximum_hold():
    world = World(min=2, max=3, concurrency=1)
    assert world.step(1, 0.0) == 2
    assert world.step(10, 500.0) == 3
    assert world.step(300, 0.0) == 2


def test_requests_per_second_count_when_asked():
    world = World(min=0, max=9, metric="rps", target=10.0)
    world.step(2, 0.01, requests=1)
    assert world.step(60, 0.01, requests=35) == 5  # 35 a second, 7 aimed at per replica


def test_a_waiting_request_wakes_from_zero_without_a_tick():
    world = World(min=0, max=2, window_s=1, grace_s=0)
    world.step(1, 1.0)
    world.step(20, 0.0)
    assert world.replicas == 0
    assert world.scaler.woken(world.plan, "rev-1", world.now_s)
    assert world.replicas == 1
    assert not world.scaler.woken(world.plan, "rev-1", world.now_s)  # asked again: nothing new
    assert world.step(1, 1.0) == 1


def test_a_wake_is_news_also_for_what_should_run_already_and_is_over_when_it_does():
    world = World(min=0, max=2, initial=1)
    assert world.scaler.woken(world.plan, "rev-1", world.now_s)
    assert world.scaler.waiting == {KEY}
    world.step(1, 1.0)
    world.step(1, 1.0)
    assert world.scaler.waiting == set()


def test_a_wake_for_a_revision_without_traffic_wakes_those_that_have():
    world = World(min=0, max=2, initial=0)
    assert world.scaler.woken(world.plan, "rev-9", world.now_s)
    assert world.scaler.scaled == {KEY: 1}


def test_no_measure_is_not_zero_load():
    world = World(min=0, max=4, concurrency=10)
    world.step(10, 25.0)
    before = world.replicas
    for _ in range(30):
        world.now_s += 1.0
        world.scaler.tick([world.plan], world.observed(), {}, world.now_s)
    assert world.replicas == before


def test_the_next_supervisor_goes_on_with_the_numbers():
    world = World(min=0, max=4, concurrency=10)
    world.step(10, 25.0)
    after = Scaler()
    after.restore(world.scaler.to_dict())
    assert after.scaled == world.scaler.scaled
    after.tick([world.plan], world.observed(), {}, world.now_s + 1)
    assert after.scaled == world.scaler.scaled


def test_a_complete_rollout_starts_from_the_replicas_it_needed():
    world = World(min=0, max=4, concurrency=10)
    world.step(10, 15.0)
    moving = EndpointPlan(**{**vars(world.plan), "rollout": Rollout("r", {"rev-2": 100})})
    world.scaler.start(moving)
    assert world.scaler.scaled[("churn", "rev-2")] == world.replicas == 3


def test_what_lost_its_traffic_is_forgotten():
    world = World(min=1, max=2)
    world.step(1, 1.0)
    moved = EndpointPlan(**{**vars(world.plan), "traffic": {"rev-2": 100}})
    world.scaler.tick([moved], Observed(), {}, world.now_s + 1)
    assert KEY not in world.scaler.scaled
    world.scaler.forget("churn")
    assert world.scaler.scaled == {}
    assert world.scaler.load_of("churn") == {}


def test_the_load_is_told_in_numbers_for_people():
    world = World(min=1, max=2)
    world.step(6, 2.0, requests=50)
    load = world.scaler.load_of("churn")
    assert load["queued"] == 3
    assert load["in_flight"] == 3
    assert 40 <= load["rps"] <= 60
    assert load["p50_ms"] == 2.0
    assert "p99_ms" not in load


class Step:
    """A step of load on an endpoint at zero, on a stepped clock: the router's meter, a queue, and replicas that start.

    Replicas answer `concurrency` requests at once in 20 ms and are ready 50 ms after they are wished.
    """

    STEP_S, ANSWER_S, START_S = 0.005, 0.02, 0.05

    def __init__(self, began_s: float, early: bool = True, **scale: Any) -> None:
        self.world = World(min=0, **scale)
        self.early = early  # else it looks twice a second at seconds that are over
        self.concurrency = scale["concurrency"]
        self.now_s = began_s
        self.meter = LoadMeter(began_s - 30)
        self.meter.take(began_s)
        self.waiting: list[float] = []
        self.answers: list[float] = []  # when a request in flight is answered
        self.latencies: list[float] = []
        self.replicas: list[float] = []  # when each is ready
        self.most = self.ticks = 0
        self.next_tick_s = began_s

    def run(self, seconds: float, rate: float) -> None:
        """Let so many requests a second come, evenly."""
        due = 0.0
        for _ in range(round(seconds / self.STEP_S)):
            self.now_s += self.STEP_S
            due += rate * self.STEP_S
            while due >= 1.0:
                due -= 1.0
                self.meter.enter(self.now_s)
                self.waiting.append(self.now_s)
            self._serve()
            self._scale()

    def _serve(self) -> None:
        for _ in [at for at in self.answers if at <= self.now_s]:
            self.meter.leave(self.now_s)
        self.answers = [at for at in self.answers if at > self.now_s]
        room = self.concurrency * sum(ready <= self.now_s for ready in self.replicas) - len(self.answers)
        for _ in range(min(room, len(self.waiting))):
            self.latencies.append(self.now_s + self.ANSWER_S - self.waiting.pop(0))
            self.answers.append(self.now_s + self.ANSWER_S)

    def _scale(self) -> None:
        scaler, plan = self.world.scaler, self.world.plan
        if self.waiting and not self.replicas:
            scaler.woken(plan, "rev-1", self.now_s)
        if self.now_s >= self.next_tick_s:
            self._tick(scaler, plan)
            self.ticks += 1
            self.next_tick_s = self.now_s + (0.1 if scaler.is_pressed and self.early else 0.5)
        while len(self.replicas) < scaler.scaled.get(KEY, 0):
            self.replicas.append(self.now_s + self.START_S)
        del self.replicas[scaler.scaled.get(KEY, 0) :]
        self.most = max(self.most, len(self.replicas))

    def _tick(self, scaler: Scaler, plan: EndpointPlan) -> None:
        ready = [at <= self.now_s for at in self.replicas]
        phases = [Phase.READY if one else Phase.STARTING for one in ready]
        observed = Observed(tuple(ReplicaSeen(f"r{n}", *KEY, phase, 0.0) for n, phase in enumerate(phases)))
        measured: dict[str, Any] = {"buckets": self.meter.take(self.now_s)}
        if self.early:
            measured["under_way"] = self.meter.under_way(self.now_s)
        revision = {**measured, "queued": len(self.waiting), "p50_s": None, "p99_s": None}
        scaler.tick([plan], observed, {"endpoints": {"churn": {"revisions": {"rev-1": revision}}}}, self.now_s)


@pytest.mark.parametrize("began_s", [1000.0, 1000.3, 1000.62, 1000.95])
@pytest.mark.parametrize("window_s", [6, 60])
def test_a_step_from_zero_is_answered_before_its_first_second_is_over(began_s: float, window_s: float):
    step = Step(began_s, max=8, concurrency=2, window_s=window_s)
    step.run(2.0, rate=200)
    latencies = sorted(step.latencies)
    assert len(latencies) > 380
    assert latencies[-1] < 0.3  # 0.75 s while only whole seconds counted
    assert latencies[int(len(latencies) * 0.9)] < 0.2


def test_a_burst_that_is_over_at_once_brings_no_more_than_its_second_as_a_whole():
    patient, early = (Step(1000.5, early, max=50, concurrency=1, window_s=6) for early in (False, True))
    for step in (patient, early):
        step.run(0.1, rate=200)  # 20 at once: a wish of 29 for the moment
        step.run(3.0, rate=0)
        assert len(step.latencies) == 20
    assert early.most <= patient.most < 10
    assert early.ticks < 12  # ten a second only while requests waited


def test_requests_that_wait_where_no_more_replicas_may_be_are_no_reason_to_look_more_often():
    world = World(min=0, max=2, concurrency=1)
    world.step(3, 50.0)
    revision = {"buckets": [], "under_way": [1003, 9.0, 9], "queued": 9, "p50_s": None, "p99_s": None}
    stats = {"endpoints": {"churn": {"revisions": {"rev-1": revision}}}}
    world.scaler.tick([world.plan], world.observed(), stats, world.now_s)
    assert world.replicas == 2
    assert not world.scaler.is_pressed


def test_silence_at_zero_is_no_data_so_that_the_next_burst_counts_in_full():
    world = World(min=0, max=9, concurrency=10, window_s=6, grace_s=0)
    world.step(1, 1.0)
    assert world.step(20, 0.0) == 0
    world.scaler.woken(world.plan, "rev-1", world.now_s)
    assert world.step(1, 42.0) == 6  # 7 aimed at per replica; a mean with the silence would be 1
