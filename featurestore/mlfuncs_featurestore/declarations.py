"""The parts of a view's definition: aggregations over windows, expectations on its rows, where rows come from.

Owns: Aggregation, AggregateFeature, Expectation, Source. All are frozen, checked once when made, and have a JSON form.
What an aggregation computes is in `windows`; how an expectation is checked is in `quality`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs.errors import NotFound, SpecError
from mlfuncs_featurestore.durations import format_duration, parse_duration
from mlfuncs_featurestore.types import FeatureType, parse_type

FUNCTIONS = ("sum", "mean", "count", "min", "max", "std", "first", "last", "count_distinct", "top_k")
NUMBERS_ONLY = ("sum", "mean", "std")
ORDERED_ONLY = ("min", "max")  # numbers, timestamps and dates
SUMMED_DIGITS = 28  # of decimals: ten billion events of the largest are below 10**38
ACTIONS = ("reject", "quarantine", "warn")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


def check_identifier(what: str, name: Any) -> str:
    """`name`, when it can be a column, a path segment and a Redis key part. Raises SpecError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("__") or "__" in name.strip("_"):
        raise SpecError(
            f"{what} name {name!r} is not valid: use letters, digits and single '_', at most 63, not starting with a "
            "digit or '__'"
        )
    return name


def as_names(what: str, names: Any) -> tuple[str, ...]:
    """`names` as a tuple of strings; one string is refused, because it is a sequence of letters."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise SpecError(f"{what} must be a list of names, not {names!r}: write {what}=[{names!r}]")
    return tuple(names)


@dataclass(frozen=True)
class AggregateFeature:
    """One computed feature: `function` over the `column` values of the events in (t - window_us, t]."""

    name: str
    column: str
    function: str
    window_us: int
    type: FeatureType
    k: int = 10  # top_k: values returned
    exact_bound: int = 1000  # count_distinct: above this many values a HyperLogLog estimate


@dataclass(frozen=True)
class Aggregation:
    """Functions of one column over sliding windows; features are named `<column>_<function>_<window>`.

    >>> Aggregation("amount", ["sum", "count"], windows=["1h"]).names
    ('amount_sum_1h', 'amount_count_1h')
    """

    column: str
    functions: Sequence[str]
    windows: Sequence[Any]  # "1h" or a timedelta, which becomes its shortest spelling
    k: int = 10
    exact_bound: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "functions", as_names("functions", self.functions))
        object.__setattr__(self, "windows", tuple(map(_window, as_names("windows", self.windows))))
        if not self.functions or not self.windows:
            raise SpecError(f"the aggregation of {self.column!r} names no function or no window")
        for function in self.functions:
            if function not in FUNCTIONS:
                raise SpecError(str(NotFound("aggregation function", str(function), FUNCTIONS)))
        lengths = [parse_duration(window) for window in self.windows]
        if len(set(lengths)) != len(lengths) or len(set(self.functions)) != len(self.functions):
            raise SpecError(f"the aggregation of {self.column!r} names a function or a window twice")
        if not 1 <= self.k <= 1000:
            raise SpecError(f"top_k returns 1 to 1000 values, not {self.k!r}")
        if not 1 <= self.exact_bound <= 1_000_000:
            raise SpecError(f"exact_bound is 1 to 1,000,000, not {self.exact_bound!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the features, by window and then function."""
        return tuple(f"{self.column}_{function}_{window}" for window in self.windows for function in self.functions)

    def features(self, fields: Mapping[str, FeatureType]) -> tuple[AggregateFeature, ...]:
        """The features over a view's `fields`. Raises SpecError when a function cannot take the column's type."""
        if self.column not in fields:
            raise SpecError(
                str(NotFound("field", self.column, fields, hint="(an aggregation takes a field of its view)"))
            )
        source = fields[self.column]
        return tuple(
            AggregateFeature(
                f"{self.column}_{function}_{window}",
                self.column,
                function,
                parse_duration(window),
                _result_type(self.column, function, source),
                self.k,
                self.exact_bound,
            )
            for window in self.windows
            for function in self.functions
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal value back."""
        return {
            "column": self.column,
            "functions": list(self.functions),
            "windows": list(self.windows),
            "k": self.k,
            "exact_bound": self.exact_bound,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Aggregation:
        """The aggregation that `to_dict` wrote."""
        return cls(**values)


def _window(window: Any) -> str:
    """A window as it stands in feature names. Raises SpecError."""
    length = parse_duration(window, "window")
    return window.strip().lower() if isinstance(window, str) else format_duration(length)


def _result_type(column: str, function: str, source: FeatureType) -> FeatureType:
    is_decimal = source.kind == "decimal"
    if function in NUMBERS_ONLY and not (source.is_number or is_decimal):
        raise SpecError(f"{function} needs numbers and {column!r} is {source}; store it as float64 or int64")
    if function in ("sum", "mean") and source.precision > SUMMED_DIGITS:
        raise SpecError(
            f"{function} takes decimals of at most {SUMMED_DIGITS} digits, so that no sum of them leaves 38, and "
            f"{column!r} is {source}"
        )
    if function in ORDERED_ONLY and not (source.is_number or is_decimal or source.kind in ("timestamp", "date")):
        raise SpecError(f"{function} needs numbers or times and {column!r} is {source}")
    if function in ("count_distinct", "top_k") and source.kind in ("list", "vector", "struct", "decimal"):
        raise SpecError(f"{function} needs values that compare as a whole and {column!r} is {source}")
    if function in ("count", "count_distinct"):
        return parse_type("int64")
    if function in ("mean", "std"):
        return parse_type("float64")
    if function == "sum" and is_decimal:
        return FeatureType("decimal", precision=38, scale=source.scale)
    if function == "sum":
        return parse_type("float64" if source.kind in ("float32", "float64") else "int64")
    return FeatureType("list", element=source) if function == "top_k" else source


@dataclass(frozen=True)
class Expectation:
    """What every row's `column` must satisfy, and what happens to a batch or row that does not.

    `minimum` and `maximum` are inclusive; `fresh_within` bounds the age at ingest of the (timestamp) column; a null
    passes everything but `not_null`. `action`: "reject" refuses the whole batch, "quarantine" keeps the row aside
    with the reason, "warn" stores it and says so.

    >>> Expectation("amount", minimum=0, action="quarantine").describe()
    'amount >= 0'
    """

    column: str
    not_null: bool = False
    minimum: float | int | None = None
    maximum: float | int | None = None
    one_of: Sequence[Any] | None = None
    regex: str | None = None
    fresh_within: str | None = None
    action: str = "reject"

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise SpecError(f"action is one of {', '.join(ACTIONS)}, not {self.action!r}")
        if self.one_of is not None:
            if isinstance(self.one_of, str):
                raise SpecError(f"one_of must be a list of values, not {self.one_of!r}")
            object.__setattr__(self, "one_of", tuple(self.one_of))
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as exc:
                raise SpecError(f"regex {self.regex!r} of {self.column!r} is not a regular expression: {exc}") from exc
        if self.fresh_within is not None:
            parse_duration(self.fresh_within, "fresh_within")
        if self.describe() == self.column:
            raise SpecError(f"the expectation on {self.column!r} expects nothing: give not_null, minimum, maximum, ...")

    def describe(self) -> str:
        """The rule in one line, as it stands in messages and beside quarantined rows."""
        rules = []
        if self.not_null:
            rules.append("not null")
        if self.minimum is not None:
            rules.append(f">= {self.minimum!r}")
        if self.maximum is not None:
            rules.append(f"<= {self.maximum!r}")
        if self.one_of is not None:
            rules.append(f"in {list(self.one_of)!r}")
        if self.regex is not None:
            rules.append(f"matches {self.regex!r}")
        if self.fresh_within is not None:
            rules.append(f"at most {self.fresh_within} old")
        return " ".join([self.column, " and ".join(rules)]).strip()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal value back."""
        return dataclasses.asdict(self) | {"one_of": None if self.one_of is None else list(self.one_of)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Expectation:
        """The expectation that `to_dict` wrote."""
        return cls(**values)


@dataclass(frozen=True)
class Source:
    """Where a view's rows come from when no table is handed in: Parquet files, a Delta table, or a Redis Stream.

    >>> Source.parse("s3://bucket/spend/*.parquet").kind, Source.parse("redis-stream:clicks").location
    ('parquet', 'clicks')
    """

    kind: str  # "parquet", "delta" or "redis-stream"
    location: str  # fsspec URL or path; a stream's name

    @classmethod
    def parse(cls, source: Any) -> Source:
        """The source that `source` spells: a path or fsspec URL, "delta:<url>", "redis-stream:<name>"."""
        if isinstance(source, Source):
            return source
        text = str(source)
        for kind in ("redis-stream", "delta", "parquet"):
            if text.startswith(f"{kind}:") and len(text) > len(kind) + 1:
                return cls(kind, text[len(kind) + 1 :])
        if text.endswith((".parquet", ".pq")) or "*" in text:
            return cls("parquet", text)
        raise SpecError(f"source {text!r} is not known: write 'dir/*.parquet', 'delta:<url>' or 'redis-stream:<name>'")

    def __str__(self) -> str:
        return f"{self.kind}:{self.location}"
