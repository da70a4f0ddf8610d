"""The supervisor's judgement with stepped clocks and no process."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mlfuncs_runtime.supervisor.reconcile import (
    PATIENT_LOADS,
    DrainReplica,
    Failures,
    KillReplica,
    Observed,
    ParkReplica,
    Phase,
    ReplicaSeen,
    StartReplica,
    StartZygote,
    StopReplica,
    StopZygote,
    UnparkReplica,
    Wish,
    ZygotePhase,
    ZygoteSeen,
    next_due_s,
    reconcile,
)

KEY = ("churn", "rev-1")
ZYGOTE = ZygoteSeen(*KEY, ZygotePhase.READY, 0.0)


def replicas(*phases: Phase, since_s: float = 0.0) -> tuple[ReplicaSeen, ...]:
    return tuple(ReplicaSeen(f"r{i}", *KEY, phase, since_s + i) for i, phase in enumerate(phases))


def seen(*phases: Phase, zygote: ZygoteSeen | None = ZYGOTE, failures: Failures | None = None) -> Observed:
    return Observed(replicas(*phases), (zygote,) if zygote else (), {KEY: failures} if failures else {})


def test_starts_the_zygote_first_and_then_forks_from_it():
    wish = Wish(*KEY, replicas=2)
    assert reconcile([wish], Observed(), 0.0) == [StartZygote(*KEY)]
    starting = seen(zygote=replace(ZYGOTE, phase=ZygotePhase.STARTING))
    assert reconcile([wish], starting, 0.0) == []
    assert reconcile([wish], seen(), 0.0) == [StartReplica(*KEY, fork=True)] * 2


def test_spawns_when_the_zygote_cannot_fork():
    unusable = seen(zygote=replace(ZYGOTE, phase=ZygotePhase.UNUSABLE))
    assert reconcile([Wish(*KEY, replicas=1)], unusable, 0.0) == [StartReplica(*KEY, fork=False)]


def test_replicas_that_are_starting_count():
    assert reconcile([Wish(*KEY, replicas=2)], seen(Phase.STARTING, Phase.READY), 5.0) == []


def test_a_draining_replica_is_replaced():
    actions = reconcile([Wish(*KEY, replicas=1)], seen(Phase.DRAINING), 1.0)
    assert actions == [StartReplica(*KEY, fork=True)]


def test_scale_down_drains_the_youngest():
    actions = reconcile([Wish(*KEY, replicas=1)], seen(Phase.READY, Phase.READY, Phase.READY), 9.0)
    assert actions == [DrainReplica("r1", "is no longer needed"), DrainReplica("r2", "is no longer needed")]


def test_a_starting_replica_that_is_not_needed_any_more_is_stopped_before_a_ready_one():
    assert reconcile([Wish(*KEY, replicas=1)], seen(Phase.READY, Phase.STARTING), 5.0) == [StopReplica("r1")]


def test_drained_means_stop_and_the_timeouts_are_kept():
    wish = Wish(*KEY, replicas=0, drain_timeout_s=10, stop_timeout_s=5)
    draining = seen(Phase.DRAINING)
    assert reconcile([wish], draining, 9.0) == []
    assert reconcile([wish], draining, 10.5) == [StopReplica("r0")]
    drained = replace(draining, replicas=(replace(draining.replicas[0], drained=True),))
    assert reconcile([wish], drained, 0.1) == [StopReplica("r0")]
    assert reconcile([wish], seen(Phase.STOPPING), 4.0) == []
    assert isinstance(reconcile([wish], seen(Phase.STOPPING), 6.0)[0], KillReplica)


def test_a_replica_that_is_never_ready_is_killed():
    (action,) = reconcile([Wish(*KEY, replicas=1, start_timeout_s=30)], seen(Phase.STARTING), 31.0)
    assert action == KillReplica("r0", "was not ready within 30 s")


def test_an_unhealthy_replica_is_replaced_and_given_one_second_to_go():
    wish = Wish(*KEY, replicas=1)
    sick = replace(seen(Phase.READY), replicas=(replace(replicas(Phase.READY)[0], healthy=False),))
    assert reconcile([wish], sick, 100.0) == [
        DrainReplica("r0", "does not answer health checks"),
        StartReplica(*KEY, fork=True),
    ]
    stopping = replace(sick, replicas=(replace(sick.replicas[0], phase=Phase.STOPPING),))
    assert KillReplica("r0", "did not stop within 1 s") in reconcile([wish], stopping, 1.5)


def test_a_death_after_long_service_is_replaced_at_once():
    failures = Failures(5, 100.0).after(200.0, "killed", ready_for_s=60.0)
    assert failures.count == 1
    assert reconcile([Wish(*KEY, replicas=1)], seen(failures=failures), 200.0) == [StartReplica(*KEY, fork=True)]


def test_failures_in_a_row_wait_longer_each_time():
    failures = Failures()
    delays = []
    for _ in range(10):
        failures = failures.after(50.0, "exit status 1")
        delays.append(failures.delay_s)
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    wish = Wish(*KEY, replicas=3)
    assert reconcile([wish], seen(failures=failures), 79.0) == []
    assert reconcile([wish], seen(failures=failures), 80.0) == [StartReplica(*KEY, fork=True)]


def test_a_dead_zygote_in_back_off_waits_too():
    failures = Failures(3, 10.0)
    assert reconcile([Wish(*KEY, replicas=1)], seen(zygote=None, failures=failures), 10.5) == []
    assert reconcile([Wish(*KEY, replicas=1)], seen(zygote=None, failures=failures), 11.0) == [StartZygote(*KEY)]


def test_what_is_wished_no_more_is_drained_and_its_zygote_stopped():
    assert reconcile([], seen(Phase.READY), 1.0) == [StopZygote(*KEY), DrainReplica("r0", "is no longer needed")]
    assert reconcile([], seen(zygote=replace(ZYGOTE, phase=ZygotePhase.STOPPING)), 1.0) == []


def test_a_revision_at_zero_keeps_its_zygote():
    assert reconcile([Wish(*KEY, replicas=0)], seen(), 1.0) == []


def test_after_a_restart_zygotes_that_nobody_waits_for_load_a_few_at_a_time():
    idle = [Wish(f"idle-{i}", "rev-1", replicas=1, patient=True) for i in range(9)]
    busy = Wish("busy", "rev-1", replicas=1)
    assert StartZygote("busy", "rev-1") in reconcile([*idle, busy], Observed(), 0.0)
    assert len(reconcile([*idle, busy], Observed(), 0.0)) == PATIENT_LOADS
    loading = tuple(ZygoteSeen(f"idle-{i}", "rev-1", ZygotePhase.STARTING, 0.0) for i in range(PATIENT_LOADS))
    assert reconcile(idle, Observed(zygotes=loading), 1.0) == []
    loaded = tuple(replace(zygote, phase=ZygotePhase.READY) for zygote in loading)
    started = [a for a in reconcile(idle, Observed(zygotes=loaded), 2.0) if isinstance(a, StartZygote)]
    assert len(started) == PATIENT_LOADS


def test_what_a_request_waits_for_does_not_wait_for_the_zygotes_of_others():
    loading = tuple(ZygoteSeen(f"idle-{i}", "rev-1", ZygotePhase.STARTING, 0.0) for i in range(PATIENT_LOADS))
    assert reconcile([Wish(*KEY, replicas=1)], Observed(zygotes=loading), 0.0)[-1] == StartZygote(*KEY)


def test_spares_are_parked_and_used_before_anything_is_started():
    wish = Wish(*KEY, replicas=1, spares=1)
    assert reconcile([wish], seen(Phase.READY), 1.0) == [StartReplica(*KEY, fork=True)]
    assert reconcile([wish], seen(Phase.READY, Phase.READY), 2.0) == [ParkReplica("r1")]
    more = replace(wish, replicas=2)
    actions = reconcile([more], seen(Phase.READY, Phase.PARKED), 3.0)
    assert actions == [UnparkReplica("r1"), StartReplica(*KEY, fork=True)]


def test_a_spare_that_is_not_wished_any_more_is_stopped():
    assert reconcile([Wish(*KEY, replicas=1)], seen(Phase.READY, Phase.PARKED), 3.0) == [StopReplica("r1")]


def test_the_end_of_a_back_off_is_announced():
    assert next_due_s(seen(failures=Failures(4, 10.0)), 11.0) == 1.0
    assert next_due_s(seen(failures=Failures(1, 10.0)), 11.0) == float("inf")


PHASES = st.sampled_from(list(Phase))


@given(st.lists(PHASES, max_size=6), st.integers(0, 5), st.integers(0, 2), st.sampled_from(list(ZygotePhase)))
def test_repeating_the_actions_reaches_the_wish_and_stays(phases, wanted, spares, zygote_phase):
    """Carrying out every action, and letting processes do what they are told, ends in exactly the wish."""
    wish = Wish(*KEY, replicas=wanted, spares=spares)
    state = {r.id: r for r in replicas(*phases)}
    zygote: ZygoteSeen | None = replace(ZYGOTE, phase=zygote_phase)
    now_s = 100.0
    for step in range(30):
        now_s += 100.0
        observed = Observed(tuple(state.values()), (zygote,) if zygote else ())
        before = observed.ready(KEY)
        actions = reconcile([wish], observed, now_s)
        drained = sum(isinstance(a, DrainReplica | ParkReplica) for a in actions)
        assert before - drained >= min(before, wanted)  # never takes away what is needed
        for n, action in enumerate(actions):
            match action:
                case StartReplica():
                    state[f"n{step}-{n}"] = ReplicaSeen(f"n{step}-{n}", *KEY, Phase.READY, now_s)
                case StopReplica(id) | KillReplica(id):
                    del state[id]
                case DrainReplica(id):
                    state[id] = replace(state[id], phase=Phase.DRAINING, since_s=now_s)
                case ParkReplica(id):
                    state[id] = replace(state[id], phase=Phase.PARKED, since_s=now_s)
                case UnparkReplica(id):
                    state[id] = replace(state[id], phase=Phase.READY, since_s=now_s)
                case StartZygote():
                    zygote = replace(ZYGOTE, phase=ZygotePhase.READY)
        if zygote and zygote.phase in (ZygotePhase.STARTING, ZygotePhase.STOPPING):
            zygote = ZYGOTE if zygote.phase is ZygotePhase.STARTING else None
        for replica in list(state.values()):
            if replica.phase is Phase.KILLED:
                del state[replica.id]
    counts = [r.phase for r in state.values()]
    assert counts.count(Phase.READY) == wanted
    assert counts.count(Phase.PARKED) == spares
    assert len(counts) == wanted + spares
