"""Runs side by side, as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from mlfuncs.display import Table, format_duration, format_time

if TYPE_CHECKING:
    from mlfuncs.runs.run import Run

# Words that say less is better; only a highlight depends on it, and "loss_reduction" fools it.
_LOWER = re.compile(
    r"(^|_)(loss|error|err|mse|rmse|mae|mape|rmsle|logloss|nll|perplexity|fpr|fnr|latency|time|regret)(_|$)"
)


_OWN = ("run", "function", "step", "status", "started", "took")  # columns of every table


def compare(runs: Sequence[Run], *, details: bool = False) -> Table:
    """One row per run; with `details` the start and every parameter, else only the parameters that differ.

    Steps of pipelines have a column with their place in the pipeline, where a task of a loop is there many times.
    """
    params = {run.id: run.params for run in runs}
    metrics = {run.id: run.metrics for run in runs}
    shown_metrics = {_column("metric", name, _OWN): name for name in _names(metrics.values())}
    shown = _names(params.values()) if details else _differing(list(params.values()))
    shown_params = {_column("param", name, {*_OWN, *shown_metrics}): name for name in shown}
    steps = ["step"] if any(run.row.step for run in runs) else []
    rows: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {"run": run.id, "function": run.function, "status": run.row.status}
        row |= dict.fromkeys(steps, run.row.step)
        if details:
            row["started"] = format_time(run.row.started_at)
        row["took"] = format_duration(run.duration_s)
        row |= {column: params[run.id].get(name) for column, name in shown_params.items()}
        row |= {column: metrics[run.id].get(name) for column, name in shown_metrics.items()}
        rows.append(row)
    columns = ["run", "function", *steps, "status", *(["started"] if details else []), "took"]
    columns += [*shown_params, *shown_metrics]
    return Table(tuple(columns), tuple(rows), best=frozenset(_best(rows, list(shown_metrics))))


def prefers_lower(metric: str) -> bool:
    """Whether a metric of that name is usually better when lower.

    >>> prefers_lower("val_loss"), prefers_lower("auc")
    (True, False)
    """
    return bool(_LOWER.search(re.sub(r"[^a-z0-9]+", "_", metric.lower())))


def _column(kind: str, name: str, taken: Collection[str]) -> str:
    """The column of a parameter or metric: its name, unless another column has that."""
    return f"{kind} {name}" if name in taken else name


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
