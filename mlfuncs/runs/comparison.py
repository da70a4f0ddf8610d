"""Runs side by side, as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlfuncs.display import Table, format_duration, format_time

if TYPE_CHECKING:
    from mlfuncs.runs.run import Run

# Words that say less is better; only a highlight depends on it, and "loss_reduction" fools it.
_LOWER = re.compile(
    r"(^|_)(loss|error|err|mse|rmse|mae|mape|rmsle|logloss|nll|perplexity|fpr|fnr|latency|time|regret)(_|$)"
)


def compare(runs: Sequence[Run], *, details: bool = False) -> Table:
    """One row per run; with `details` the start and every parameter, else only the parameters that differ."""
    params = {run.id: run.params for run in runs}
    metrics = {run.id: run.metrics for run in runs}
    shown_params = _names(params.values()) if details else _differing(list(params.values()))
    shown_metrics = _names(metrics.values())
    rows: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {"run": run.id, "function": run.function, "status": run.row.status}
        if details:
            row["started"] = format_time(run.row.started_at)
        row["took"] = format_duration(run.duration_s)
        row |= {_column(name, shown_metrics): params[run.id].get(name) for name in shown_params}
        row |= {name: metrics[run.id].get(name) for name in shown_metrics}
        rows.append(row)
    columns = ["run", "function", "status", *(["started"] if details else []), "took"]
    columns += [_column(name, shown_metrics) for name in shown_params] + shown_metrics
    return Table(tuple(columns), tuple(rows), best=frozenset(_best(rows, shown_metrics)))


def prefers_lower(metric: str) -> bool:
    """Whether a metric of that name is usually better when lower.

    >>> prefers_lower("val_loss"), prefers_lower("auc")
    (True, False)
    """
    return bool(_LOWER.search(re.sub(r"[^a-z0-9]+", "_", metric.lower())))


def _column(param: str, metrics: Sequence[str]) -> str:
    taken = {*metrics, "run", "function", "status", "started", "took"}
    return f"param {param}" if param in taken else param


def _names(values: Any) -> list[str]:
    return list(dict.fromkeys(name for each in values for name in each))


def _differing(params: Sequence[dict[str, Any]]) -> list[str]:
    absent = object()
    return [name for name in _names(params) if len({repr(each.get(name, absent)) for each in params}) > 1]


def _best(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[tuple[int, str]]:
    found = []
    for metric in metrics:
        values = {
            n: row[metric] for n, row in enumerate(rows) if row[metric] is not None and not math.isnan(row[metric])
        }
        if len(set(values.values())) > 1:
            best = (min if prefers_lower(metric) else max)(values.values())
            found += [(number, metric) for number, value in values.items() if value == best]
    return found
