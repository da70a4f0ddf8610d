"""What the scheduler of a pipeline tells the engine to do, and what it tells of ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.ir import Component, Task

State = Literal["succeeded", "failed", "skipped", "upstream_failed"]


@dataclass(frozen=True)
class Step:
    """One execution of an executor: what to run, with which values, as which attempt (0 is the first)."""

    id: str  # path of tasks from the root, with loop indices: "for-loop-1/0/train"
    task: Task
    component: Component
    inputs: Values
    attempt: int = 0
    delay_s: float = 0.0


@dataclass(frozen=True)
class RunStep:
    """Start `step`, `step.delay_s` seconds from now."""

    step: Step


@dataclass(frozen=True)
class NodeEnded:
    """A step or group reached its end; `reason` says why it failed or did not run."""

    id: str
    state: State
    is_group: bool
    reason: str = ""


@dataclass(frozen=True)
class RunEnded:
    """The pipeline is over; `outputs` are its declared outputs (empty after a failure)."""

    state: State
    outputs: Values
    reason: str = ""


Instruction = RunStep | NodeEnded | RunEnded
