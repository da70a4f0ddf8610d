"""Which revision a request goes to, and which replica: pure choices, with the random source as an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar


class Split:
    """Traffic shares. `next` interleaves revisions smoothly, so that any 10 requests at 90:10 hold one of the lesser.

    >>> split = Split({"rev-1": 3, "rev-2": 1})
    >>> [split.next() for _ in range(4)]
    ['rev-1', 'rev-1', 'rev-2', 'rev-1']
    """

    def __init__(self, shares: Mapping[str, int]) -> None:
        self._shares = {revision: share for revision, share in sorted(shares.items()) if share > 0}
        self._total = sum(self._shares.values())
        self._credit = dict.fromkeys(self._shares, 0)
        self.only = next(iter(self._shares)) if len(self._shares) == 1 else None

    def next(self) -> str:
        """The revision of the next request: nginx's smooth weighted round robin. Raises LookupError without shares."""
        if self.only is not None:
            return self.only
        if not self._shares:
            raise LookupError("no revision has traffic")
        credit = self._credit
        for revision, share in self._shares.items():
            credit[revision] += share
        chosen = max(credit, key=credit.__getitem__)
        credit[chosen] -= self._total
        return chosen

    def of(self, key: bytes) -> str:
        """The revision that callers with this key always get; a change of shares moves only as many as it must."""
        if not self._shares:
            raise LookupError("no revision has traffic")
        point = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64 * self._total
        for revision, share in self._shares.items():
            point -= share
            if point < 0:
                return revision
        return revision


class Loaded(Protocol):
    """A replica as the choice sees it."""

    in_flight: int


R = TypeVar("R", bound=Loaded)
_FIRST_AVAILABLE_UP_TO = 3  # Knative's activator: first available for a concurrency of 1 to 3


def choose_replica(replicas: Sequence[R], limit: int, random: Callable[[], float]) -> R | None:
    """The replica for one more request, or None when each has `limit` in flight (0: no limit).

    Power of two choices (Mitzenmacher 2001): the less loaded of two at random; for small limits the first with room,
    so that few replicas are kept busy and the rest can go.
    """
    count = len(replicas)
    if count == 1:
        only = replicas[0]
        return only if not limit or only.in_flight < limit else None
    if not count:
        return None
    if not limit or limit > _FIRST_AVAILABLE_UP_TO:
        first = int(random() * count)
        second = int(random() * (count - 1))
        one, other = replicas[first], replicas[second + (second >= first)]
        chosen = other if other.in_flight < one.in_flight else one
        if not limit or chosen.in_flight < limit:
            return chosen
    return next((replica for replica in replicas if replica.in_flight < limit), None)
