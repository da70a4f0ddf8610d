"""What the trigger process should run, from the plans; pure, and the document by which the supervisor tells it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlfuncs.serving.rollouts import serving_revision
from mlfuncs.triggers import Trigger, trigger_from_dict, trigger_to_dict
from mlfuncs_runtime.supervisor.plan import EndpointPlan


@dataclass(frozen=True)
class Entry:
    """One trigger of one endpoint; `timeout_s` bounds one call."""

    project: str
    endpoint: str
    timeout_s: float
    trigger: Trigger

    @property
    def key(self) -> str:
        """The same as long as the trigger is: what is remembered of it is remembered under this."""
        text = json.dumps(trigger_to_dict(self.trigger), sort_keys=True)
        return f"{self.project}/{self.endpoint}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        fields = {"project": self.project, "endpoint": self.endpoint, "timeout_s": self.timeout_s}
        return {**fields, "trigger": trigger_to_dict(self.trigger)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entry:
        """What `to_dict` wrote."""
        return cls(**{**values, "trigger": trigger_from_dict(values["trigger"])})


def entries_of(plans: Iterable[EndpointPlan]) -> tuple[Entry, ...]:
    """The triggers in force: of each endpoint those of the revision with most of the traffic."""
    found = []
    for plan in sorted(plans, key=lambda plan: plan.name):
        if not plan.traffic:
            continue
        spec = plan.revisions[serving_revision(plan.traffic)].spec
        timeout_s = max(plan.revisions[revision].spec.timeout_s for revision in plan.traffic)
        found += [Entry(plan.project, plan.name, timeout_s + 5.0, trigger) for trigger in spec.triggers]
    return tuple(found)
