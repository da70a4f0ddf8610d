"""Which parameter settings a sweep tries: every combination, a list, or random draws."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs.errors import SpecError


@dataclass(frozen=True)
class LogUniform:
    """Numbers between `low` and `high` whose logarithm is uniform, for scales such as learning rates."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise SpecError(f"LogUniform needs 0 < low <= high, not {self.low!r} and {self.high!r}")

    def draw(self, source: random.Random) -> float:
        """One number."""
        return math.exp(source.uniform(math.log(self.low), math.log(self.high)))


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of `grid`, the last name varying fastest.

    >>> grid_points({"a": [1, 2], "b": ["x"]})
    [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'x'}]
    """
    for name, values in grid.items():
        if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
            raise SpecError(f"grid[{name!r}] must be a list of values to try, not {values!r}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def random_points(distributions: Mapping[str, Any], n: int, seed: int | None) -> list[dict[str, Any]]:
    """`n` settings drawn from `distributions`; the same seed draws the same ones.

    A distribution is a list (one of its values), a pair of whole numbers (both included), a pair of floats (uniform),
    a `LogUniform`, or anything with scipy's `rvs(random_state=...)`.
    """
    if n < 1:
        raise SpecError(f"n must be 1 or more settings to draw, not {n!r}")
    source = random.Random(seed)
    return [{name: _draw(name, d, source) for name, d in distributions.items()} for _ in range(n)]


def _draw(name: str, distribution: Any, source: random.Random) -> Any:
    if isinstance(distribution, LogUniform):
        return distribution.draw(source)
    if isinstance(distribution, tuple) and len(distribution) == 2:
        low, high = distribution
        whole = all(isinstance(end, int) and not isinstance(end, bool) for end in distribution)
        if all(isinstance(end, int | float) for end in distribution) and low <= high:
            return source.randint(low, high) if whole else source.uniform(low, high)
    if isinstance(distribution, list) and distribution:
        return source.choice(distribution)
    if hasattr(distribution, "rvs"):
        value = distribution.rvs(random_state=source.randrange(2**32))
        return value.item() if hasattr(value, "item") else value
    raise SpecError(
        f"random[{name!r}] is no distribution: {distribution!r}; give a list to choose from, a pair (low, high), "
        "LogUniform(low, high), or a scipy.stats distribution"
    )
