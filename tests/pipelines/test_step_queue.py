"""How long a failed step waits before it is tried again, by a clock that the test steps."""

from mlfuncs_pipelines.graph import Scheduler
from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.instructions import RunEnded, RunStep
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.step_queue import StepQueue

TASK = {"taskInfo": {"name": "flaky"}, "componentRef": {"name": "comp"}}
RETRIES = {"maxRetryCount": 4, "backoffDuration": "10s", "backoffFactor": 3, "backoffMaxDuration": "60s"}


def scheduler() -> Scheduler:
    spec = {
        "pipelineInfo": {"name": "p"},
        "schemaVersion": "2.1.0",
        "root": {"dag": {"tasks": {"flaky": {**TASK, "retryPolicy": RETRIES}, "steady": {**TASK, **_named("steady")}}}},
        "components": {"comp": {"executorLabel": "exec"}},
        "deploymentSpec": {"executors": {"exec": {"container": {"image": "i", "command": ["true"]}}}},
    }
    return Scheduler(Pipeline.of(spec, {}), {}, {})


def _named(name: str) -> dict[str, object]:
    return {"taskInfo": {"name": name}}


def test_each_attempt_waits_longer_up_to_the_most_and_holds_up_nothing_else() -> None:
    flow, queue, now = scheduler(), StepQueue(), 1000.0
    for told in flow.start():
        assert isinstance(told, RunStep)
        queue.add(told.step, now)
    begun = [queue.next(now), queue.next(now)]
    assert [step.id for step in begun if step] == ["flaky", "steady"] and queue.next(now) is None
    for wait in (10, 30, 60, 60):
        (again,) = [one for one in flow.fail("flaky", "not yet") if isinstance(one, RunStep)]
        queue.add(again.step, now)
        assert queue.due_in(now) == wait and queue.due_in(now + wait + 5) == 0
        assert queue.next(now + wait - 0.001) is None
        now += wait
        step = queue.next(now)
        assert step is not None and step.id == "flaky" and queue.due_in(now) is None
    assert step.attempt == 4
    flow.succeed("steady", Values())
    ended = [one for one in flow.fail("flaky", "never") if isinstance(one, RunEnded)]
    assert [(one.state, one.reason) for one in ended] == [("failed", "flaky: never")]


def test_what_is_due_at_once_comes_in_order() -> None:
    (first, second) = [one.step for one in scheduler().start() if isinstance(one, RunStep)]
    queue = StepQueue()
    queue.add(second, 0.0)
    queue.add(first, 0.0)
    assert [queue.next(0.0), queue.next(0.0), queue.next(0.0)] == [second, first, None]
