"""Greedy batching as pure functions: which requests run together, and how their rows are joined and parted.

A batched function takes rows and gives one result per row, in order: `def predict(rows: list[list[float]]) ->
list[float]`. Its required list, array and table parameters are the rows; the others are options, and only requests
with equal options run together. What queued while the last batch ran is the next batch.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import InvalidInput

if TYPE_CHECKING:
    from mlfuncs.interface.signature import Signature

_TABLES = {("pandas", "DataFrame"), ("pandas", "Series"), ("pyarrow", "Table"), ("polars", "DataFrame")}


@dataclass(frozen=True)
class RowPlan:
    """Names of the parameters that are rows."""

    rows: tuple[str, ...]


@dataclass(frozen=True)
class Waiting:
    """A request that waits: only those with equal `key` run together. Times are of time.monotonic()."""

    key: str
    rows: int
    since_s: float
    deadline_s: float


@dataclass(frozen=True)
class Selection:
    """Positions in the queue: what runs now, and what is too late to run at all."""

    batch: tuple[int, ...]
    expired: tuple[int, ...]


def select(queue: Sequence[Waiting], max_rows: int, now_s: float) -> Selection:
    """The first request that is not too late, and those after it that fit in with it, in the order they came.

    A request that is larger than `max_rows` runs alone.
    """
    batch: list[int] = []
    expired: list[int] = []
    rows, key = 0, None
    for position, waiting in enumerate(queue):
        if waiting.deadline_s <= now_s:
            expired.append(position)
        elif key is None or (waiting.key == key and rows + waiting.rows <= max_rows):
            batch.append(position)
            key, rows = waiting.key, rows + waiting.rows
        elif waiting.key == key and rows >= max_rows:
            break
    return Selection(tuple(batch), tuple(expired))


def wait_for_more_s(queue: Sequence[Waiting], max_rows: int, max_wait_s: float, now_s: float) -> float:
    """How long to wait for more requests before a batch; 0 when it is full or the oldest has waited long enough."""
    if not queue or sum(waiting.rows for waiting in queue) >= max_rows:
        return 0.0
    return max(0.0, min(queue[0].since_s + max_wait_s, min(w.deadline_s for w in queue)) - now_s)


def row_plan(signature: Signature) -> RowPlan | str:
    """How a function is batched, or in a sentence why it cannot be."""
    rows = tuple(p.name for p in signature.parameters if p.required and _is_rows(p.annotation))
    if not rows:
        return f"{signature.name} has no required list, array or table parameter: write rows: list[list[float]]"
    if signature.returns is not Any and not _is_rows(signature.returns):
        return f"{signature.name} gives one result for all: write -> list[...], with one item per row"
    return RowPlan(rows)


def _is_rows(annotation: Any) -> bool:
    annotation = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
    origin = typing.get_origin(annotation) or annotation
    if origin in (list, Sequence):
        return True
    module = getattr(origin, "__module__", "").split(".")[0]
    name = getattr(origin, "__name__", "")
    return (module, name) in _TABLES or (module == "numpy" and name == "ndarray")


def count_rows(values: Mapping[str, Any], plan: RowPlan) -> int:
    """How many rows a request has. Raises InvalidInput when its row parameters differ in length."""
    counts = {name: len(values[name]) for name in plan.rows}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise InvalidInput(f"all row parameters need the same number of rows: {shown}")
    return counts[plan.rows[0]]


def group_key(values: Mapping[str, Any], plan: RowPlan) -> str:
    """Requests with equal keys may run together: equal options, equal table columns, equal array shapes."""
    parts = [f"{name}={value!r}" for name, value in values.items() if name not in plan.rows]
    for name in plan.rows:
        value = values[name]
        if hasattr(value, "columns") or hasattr(value, "schema"):
            parts.append(f"{name}:{list(getattr(value, 'columns', ()))!r}{_types(value)}")
        elif hasattr(value, "shape"):
            parts.append(f"{name}:{value.shape[1:]}{value.dtype}")
    return ";".join(parts)


def _types(table: Any) -> str:
    if hasattr(table, "dtypes"):
        return str(list(table.dtypes))
    return str(table.schema)


def join(requests: Sequence[Mapping[str, Any]], plan: RowPlan) -> dict[str, Any]:
    """The values of one call for all requests; options are those of the first."""
    first = requests[0]
    if len(requests) == 1:
        return dict(first)
    return {**first, **{name: join_rows([values[name] for values in requests]) for name in plan.rows}}


def join_rows(parts: Sequence[Any]) -> Any:
    """Lists, arrays or tables of one kind as one, in order."""
    first = parts[0]
    module = type(first).__module__.split(".")[0]
    if module == "numpy":
        import numpy as np

        return np.concatenate(parts)
    if module == "pandas":
        import pandas as pd

        return pd.concat(parts, ignore_index=True)
    if module == "pyarrow":
        import pyarrow as pa

        return pa.concat_tables(parts)
    if module == "polars":
        import polars as pl

        return pl.concat(parts)
    return list(chain.from_iterable(parts))


def part(result: Any, counts: Sequence[int]) -> list[Any]:
    """The result of a batch, parted by the number of rows of each request; a dict or tuple is parted inside.

    >>> part([1, 2, 3], [1, 2])
    [[1], [2, 3]]

    Raises ValueError when there is not one result per row.
    """
    if isinstance(result, dict):
        columns = {name: part(column, counts) for name, column in result.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(counts))]
    if isinstance(result, tuple):
        members = [part(member, counts) for member in result]
        made = getattr(type(result), "_make", tuple)
        return [made(member[i] for member in members) for i in range(len(counts))]
    if not hasattr(result, "__len__") or isinstance(result, str | bytes):
        raise ValueError(f"a batched function must give one result per row, not {type(result).__name__}")
    if len(result) != sum(counts):
        raise ValueError(f"a batched function must give one result per row: {len(result)} came for {sum(counts)} rows")
    parts, start = [], 0
    for count in counts:
        parts.append(cut_rows(result, start, start + count))
        start += count
    return parts


def cut_rows(rows: Any, start: int, stop: int) -> Any:
    """The rows from `start` up to `stop`, of the same kind; a pandas object is numbered from 0 again."""
    module = type(rows).__module__.split(".")[0]
    if module == "pandas":
        return rows.iloc[start:stop].reset_index(drop=True)
    if module in ("pyarrow", "polars"):
        return rows.slice(start, stop - start)
    return rows[start:stop]
