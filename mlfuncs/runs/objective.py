"""What a sweep looks for: the name of a number, and whether more or less of it is better."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs.errors import InvalidInput, SpecError


@dataclass(frozen=True)
class Objective:
    """`name` is a metric's, or a key or field of what the function returns."""

    name: str
    maximize: bool

    @classmethod
    def parse(cls, text: str) -> Objective:
        """The objective that "max:auc" or "min:loss" names. Raises SpecError for other text."""
        direction, _, name = text.partition(":")
        if direction not in ("max", "min") or not name.strip():
            raise SpecError(f"objective {text!r} must be 'max:<metric>' or 'min:<metric>', for example 'max:auc'")
        return cls(name.strip(), direction == "max")

    def __str__(self) -> str:
        return f"{'max' if self.maximize else 'min'}:{self.name}"

    def value(self, metrics: dict[str, float], outputs: dict[str, Any]) -> float:
        """The objective of one run: its metric of that name, else a returned number. Raises InvalidInput.

        A function that returns one bare number has that as its objective, whatever the name.
        """
        numbers = {**numbers_of(outputs), **metrics}
        found = self.among(numbers)
        if found is not None:
            return found
        known = ", ".join(sorted(numbers)) or "nothing: log it with ml.log_metric, or return it"
        raise InvalidInput(f"objective {str(self)!r}: no metric is named {self.name!r}; the run has {known}")

    def among(self, numbers: Mapping[str, float]) -> float | None:
        """The objective among a run's numbers: the one of its name, else the only one, returned bare; else None."""
        return numbers.get(self.name, numbers["output"] if list(numbers) == ["output"] else None)

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether `value` beats `than`; not-a-number beats nothing, and anything beats it or None."""
        if math.isnan(value):
            return False
        if than is None or math.isnan(than):
            return True
        return value > than if self.maximize else value < than

    def best_of(self, values: Mapping[int, float]) -> int | None:
        """The key of the best value, the lowest key of equal ones; None when there is none."""
        best: int | None = None
        for key in sorted(values):
            if self.is_better(values[key], None if best is None else values[best]):
                best = key
        return best


def numbers_of(outputs: dict[str, Any]) -> dict[str, float]:
    """The numbers among a run's outputs by name, and those of dicts among them by key."""
    found = {name: float(value) for name, value in outputs.items() if _is_number(value)}
    for value in outputs.values():
        if isinstance(value, dict):
            found |= {name: float(number) for name, number in value.items() if _is_number(number)}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plot_values(values: Sequence[float | None], best: int | None, label: str) -> str:
    """The objective of each point in the order tried as an inline SVG; points without one are left out."""
    shown = [(n, value) for n, value in enumerate(values) if value is not None and math.isfinite(value)]
    if not shown:
        return ""
    width, height, margin = 420, 140, 8
    low, high = min(v for _, v in shown), max(v for _, v in shown)
    span = (high - low) or 1.0

    def place(number: int, value: float) -> tuple[float, float]:
        x = margin + (width - 2 * margin) * (number / max(1, len(values) - 1))
        return x, margin + (height - 2 * margin) * (1 - (value - low) / span)

    dots = []
    for number, value in shown:
        x, y = place(number, value)
        colour, radius = ("#1a7f37", 5) if number == best else ("#0969da", 3)
        tip = html.escape(f"point {number + 1}: {value:.6g}")
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{tip}</title></circle>')
    text = f'<text x="{margin}" y="{height + 12}" font-size="11" fill="#57606a">{html.escape(label)}: '
    text += f"{low:.6g} to {high:.6g}, in the order tried</text>"
    frame = f'<rect width="{width}" height="{height}" fill="none" stroke="#d0d7de"/>'
    return f'<svg width="{width}" height="{height + 18}" role="img">{frame}{"".join(dots)}{text}</svg>'
