"""What the supervisor tells the router: which endpoints exist and which workers answer for them.

Plain frozen values with a JSON form, so that both sides and the tests share one definition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Replica:
    """One worker that takes requests on a Unix socket."""

    id: str
    revision: str
    socket: str  # path of the worker's Unix socket


@dataclass(frozen=True)
class Limits:
    """Bounds of one endpoint: what waits, how long, and what is too large."""

    queue_size: int = 1000  # requests that may wait for a replica
    queue_bytes: int = 64 * 2**20  # bytes of request bodies that may wait
    body_bytes: int = 64 * 2**20  # largest request body
    timeout_s: float = 60.0  # from the first byte of the request to the last of the answer's head


@dataclass(frozen=True)
class Access:
    """Who may call: SHA-256 digests of valid tokens (none: open), a token bucket, and allowed CORS origins."""

    token_sha256: tuple[str, ...] = ()
    rate_per_s: float = 0.0  # 0: no limit
    burst: int = 0
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Route:
    """One endpoint: traffic shares by revision, the workers that are ready, and its bounds.

    `traffic` maps revision to a share; shares are relative weights above 0. `tags` maps a tag to a revision that
    `/<endpoint>--<tag>` reaches alone. `mirror` maps a revision to the percentage of requests copied to it.
    `concurrency` is how many requests one replica of a revision takes at once (0, or not named: no limit).
    `broken_until_s` names revisions that failed to start time and again, and when each is tried next (monotonic).
    """

    endpoint: str
    project: str
    traffic: Mapping[str, int]
    replicas: tuple[Replica, ...] = ()
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    tags: Mapping[str, str] = field(default_factory=dict)
    mirror: Mapping[str, int] = field(default_factory=dict)
    sticky_header: str = ""
    sticky_cookie: str = ""
    concurrency: Mapping[str, int] = field(default_factory=dict)
    broken_until_s: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal route back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Route:
        """The route that `to_dict` wrote."""
        access = dict(values.get("access") or {})
        for key in ("token_sha256", "cors_origins"):
            access[key] = tuple(access.get(key) or ())
        return cls(
            **{
                **values,
                "replicas": tuple(Replica(**replica) for replica in values.get("replicas") or ()),
                "limits": Limits(**values.get("limits") or {}),
                "access": Access(**access),
            }
        )
