"""What came of a sweep: its runs, the best of them, and how they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlfuncs.display import Table, card_html, format_duration, format_value
from mlfuncs.errors import NotFound
from mlfuncs.runs.handle import Run
from mlfuncs.runs.objective import Objective, plot_values
from mlfuncs.runs.values import describe

if TYPE_CHECKING:
    import pandas

_FACTS = ("run", "status", "took")  # the columns that every table of a sweep has


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep in the order of its points, and their objectives (None: failed, cancelled, or not asked)."""

    run: Run  # the sweep itself, parent of the others
    runs: tuple[Run, ...]
    points: tuple[dict[str, Any], ...]
    values: tuple[float | None, ...]
    objective: Objective | None

    @property
    def best(self) -> Run:
        """The run with the best objective. Raises NotFound when there is none."""
        number = self._best_number()
        if number is None:
            why = "no point has a number as its objective" if self.objective else "give objective='max:<metric>'"
            raise NotFound("best run of the sweep", self.run.id, hint=f"({why})")
        return self.runs[number]

    def table(self) -> Table:
        """One row per point: run, status, duration, parameters and metrics; the best one stands out.

        A metric that is named like a parameter, or like a column before it, has the column "metric.<name>".
        """
        goal = self.objective.name if self.objective else None
        metrics = list(dict.fromkeys(name for run in self.runs for name in run.metrics))
        if goal is not None and goal not in metrics:
            metrics = [goal, *metrics]
        params = _columns("param", dict.fromkeys(name for point in self.points for name in point), _FACTS)
        shown = _columns("metric", metrics, [*_FACTS, *params.values()])
        rows = []
        for run, point, objective in zip(self.runs, self.points, self.values, strict=True):
            row = {"run": run.id, "status": run.status, "took": format_duration(run.duration_s)}
            row |= {column: describe(point.get(name), {}) for name, column in params.items()}
            numbers = {**({} if goal is None else {goal: objective}), **run.metrics}
            rows.append({**row, **{shown[name]: value for name, value in numbers.items()}})
        number = self._best_number()
        best = {(number, shown[goal])} if goal is not None and number is not None else set()
        return Table((*_FACTS, *params.values(), *shown.values()), tuple(rows), best=frozenset(best))

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a DataFrame."""
        return self.table().to_pandas()

    def _repr_html_(self) -> str:
        number = self._best_number()
        facts: dict[str, Any] = {"objective": self.objective, "points": len(self.points)}
        if number is not None:
            facts["best"] = format_value(self.values[number])
            facts["with"] = describe_point(self.points[number])
        plot = plot_values(self.values, number, str(self.objective)) if self.objective else ""
        return card_html(f"sweep of {self.run.function}", self.run.status, facts, plot) + self.table()._repr_html_()

    def __repr__(self) -> str:
        return f"<sweep {self.run.id} of {self.run.function!r}: {len(self.points)} points, {self.run.status}>"

    def _best_number(self) -> int | None:
        known = {number: value for number, value in enumerate(self.values) if value is not None}
        return self.objective.best_of(known) if self.objective else None


def describe_point(point: Mapping[str, Any]) -> str:
    """A point as short text, like "depth=3, rate=0.1"."""
    return ", ".join(f"{name}={format_value(describe(value, {}))}" for name, value in point.items())


def _columns(kind: str, names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """The column of each name: itself, or with its kind before it where that is taken."""
    columns: dict[str, str] = {}
    for name in names:
        column = name
        while column in {*taken, *columns.values()}:
            column = f"{kind}.{column}"
        columns[name] = column
    return columns
