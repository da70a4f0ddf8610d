"""What one worker is told at start: which bundle it serves, where it listens, and its bounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs.spec import Batch, Resources


@dataclass(frozen=True)
class WorkerConfig:
    """One replica of one revision. A zygote takes the same document without `replica` and `socket`."""

    endpoint: str
    project: str
    revision: str
    bundle: str  # digest
    replica: str = ""
    socket: str = ""  # path of the Unix socket to serve on
    init_args: Mapping[str, Any] = field(default_factory=dict)  # constructor argument -> ArtifactRef as a dict
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    feature_sample_rate: float = 0.0
    timeout_s: float = 60.0
    drain_s: float = 30.0  # how long requests in flight may take after SIGTERM
    stuck_grace_s: float = 5.0  # how long a handler past its timeout may take before the process gives up
    batch: Batch | None = None
    concurrency: int = 0  # threads for a sync handler; 0: one
    queue_size: int = 1000  # requests that may wait for a handler thread
    body_bytes: int = 64 * 2**20
    resources: Resources = field(default_factory=Resources)
    log_path: str = ""  # empty: the process's own stdout
    requested_at: float | None = None  # time.monotonic() of the wish for this replica

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal config back."""
        return dataclasses.asdict(self) | {
            "init_args": dict(self.init_args),
            "env": dict(self.env),
            "secrets": list(self.secrets),
            "features": list(self.features),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WorkerConfig:
        """The config that `to_dict` wrote. Raises SpecError for an unknown or missing key."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise SpecError(f"worker config has an unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
        if missing := [name for name in ("endpoint", "project", "revision", "bundle") if not values.get(name)]:
            raise SpecError(f"worker config lacks {missing[0]!r}")
        return cls(
            **{
                **values,
                "init_args": dict(values.get("init_args") or {}),
                "env": dict(values.get("env") or {}),
                "secrets": tuple(values.get("secrets") or ()),
                "features": tuple(values.get("features") or ()),
                "batch": None if values.get("batch") is None else Batch(**values["batch"]),
                "resources": Resources(**values.get("resources") or {}),
            }
        )

    @classmethod
    def read(cls, path: str | Path) -> WorkerConfig:
        """The config in a JSON file. Raises SpecError when it cannot be read."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise SpecError(f"worker config {str(path)!r} cannot be read: {exc}") from exc
        return cls.from_dict(values)
