"""What the autoscaler is asked for: Knative's annotations and ConfigMap keys, with its defaults (v1.23)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlfuncs.errors import SpecError

if TYPE_CHECKING:
    from mlfuncs.spec import Scale

TARGET_MIN = 0.01  # Knative's smallest target per replica
DEFAULT_CONCURRENCY = 100.0  # container-concurrency-target-default
DEFAULT_RPS = 200.0  # requests-per-second-target-default


@dataclass(frozen=True)
class AutoscalerConfig:
    """Knative's own names in snake_case.

    `target` is the total load per replica, and the wished load is that times the utilisation. `max_scale` 0 is no
    upper bound. `reachable` says that some route leads to the revision.
    """

    metric: Literal["concurrency", "rps"] = "concurrency"
    container_concurrency: int = 0
    target: float | None = None
    target_utilization_percentage: float = 70
    window_s: float = 60
    panic_window_percentage: float = 10
    panic_threshold_percentage: float = 200
    max_scale_up_rate: float = 1000
    max_scale_down_rate: float = 2
    target_burst_capacity: float = 211
    activation_scale: int = 1
    scale_down_delay_s: float = 0
    reachable: bool = True
    min_scale: int = 0
    max_scale: int = 0
    initial_scale: int = 1
    allow_zero_initial_scale: bool = False
    enable_scale_to_zero: bool = True
    scale_to_zero_grace_period_s: float = 30
    scale_to_zero_pod_retention_period_s: float = 0
    progress_deadline_s: float = 600
    metric_aggregation_algorithm: Literal["linear", "weighted-exponential"] = "linear"

    def __post_init__(self) -> None:
        if self.metric not in ("concurrency", "rps"):
            raise SpecError(f"metric is 'concurrency' or 'rps', not {self.metric!r}")
        for name in ("window_s", "max_scale_up_rate", "max_scale_down_rate", "panic_window_percentage"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name} must be above 0, not {getattr(self, name)!r}")

    @property
    def total_value(self) -> float:
        """The load that one replica can take; an explicit target never exceeds the container's concurrency."""
        if self.metric == "rps":
            return DEFAULT_RPS if self.target is None else float(self.target)
        limit = float(self.container_concurrency)
        if self.target is None:
            return limit or DEFAULT_CONCURRENCY
        return min(float(self.target), limit) if limit else float(self.target)

    @property
    def target_value(self) -> float:
        """The load per replica that is aimed at: total times utilisation, at least 0.01."""
        return max(TARGET_MIN, self.total_value * (self.target_utilization_percentage / 100))

    @property
    def panic_window_s(self) -> int:
        """The panic window in whole seconds, at least 1.

        >>> AutoscalerConfig(window_s=45).panic_window_s
        5
        """
        return max(1, math.floor(self.window_s * self.panic_window_percentage / 100 + 0.5))

    @classmethod
    def of_scale(cls, scale: Scale, *, reachable: bool = True) -> AutoscalerConfig:
        """What a function's `scale` asks of the autoscaler."""
        return cls(
            metric=scale.metric,
            container_concurrency=scale.concurrency,
            target=scale.target,
            window_s=scale.window_s,
            scale_down_delay_s=scale.scale_down_delay_s,
            reachable=reachable,
            min_scale=scale.min,
            max_scale=scale.max,
            initial_scale=scale.initial,
            allow_zero_initial_scale=True,
            scale_to_zero_grace_period_s=scale.grace_s,
        )
