"""Online features inside an endpoint: the caller sends entity keys, the handler receives the features.

Owns: FeatureReader, which the worker finds as "features:reader". A function with `features=[...]` names what it wants:

    @ml.function(features=["spend:amount_sum_1h", "spend:amount"])
    def score(limit: float, amount_sum_1h: float | None, amount: float | None) -> float: ...

Callers send {"user_id": 7, "limit": 100.0}. A parameter named as a feature column receives its value (None when it is
not PRESENT); one named `features` receives all others: a dict of values, a vector when it is annotated as a numpy
array, or a frame or table. When an entity key or a feature is annotated as a list, an array or a table, the function
takes many entities at once and so do its callers: {"user_id": [7, 8], ...}.
"""

from __future__ import annotations

import asyncio
import datetime
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Union, get_args, get_origin

from mlfuncs.errors import MlfuncsError, SpecError
from mlfuncs.settings import Settings
from mlfuncs_featurestore.online_metrics import ReadMetrics
from mlfuncs_featurestore.online_result import OnlineFeatures
from mlfuncs_featurestore.store import FeatureStore

ALL = "features"  # the parameter that takes what no other parameter is named after
_PYTHON: dict[str, Any] = {
    "int64": int, "int32": int, "int16": int, "int8": int, "float64": float, "float32": float, "bool": bool,
    "string": str, "uuid": str, "bytes": bytes, "timestamp": datetime.datetime, "date": datetime.date,
}  # fmt: skip


class FeatureReader:
    """Reads the features of one endpoint. `sample_rate`: the share of vectors kept for the skew check (see `skew`)."""

    def __init__(self, features: Sequence[str], settings: Settings, sample_rate: float = 0.0) -> None:
        self.features, self.sample_rate = list(features), sample_rate
        self.metrics = ReadMetrics()
        self.store = FeatureStore(settings)

    @cached_property
    def _columns(self) -> list[str]:
        plan = self.store.online.plan(self.features)
        return [plan.names[pair] for pair in plan.selection.wanted]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What callers send: the entity keys and request columns, with their Python types."""
        plan = self.store.online.plan(self.features)
        keys = {name: _PYTHON[kind] for read in plan.reads.values() for name, kind in read.key_types}
        return keys | {name: _PYTHON.get(kind.kind, Any) for name, kind in plan.request.items()}

    def read(self, entities: Mapping[str, Sequence[Any]]) -> OnlineFeatures:
        """The features of `entities`, columns of keys and request data. Raises Unavailable when Redis is away."""
        found = self.store.get_online_features(self.features, entities)
        if self.sample_rate:
            from mlfuncs_featurestore.skew import sample

            sample(self.store, found, self.sample_rate)
        return found

    def warm(self) -> None:
        """Connect and work out the plan, so that the first request does not wait for it."""
        self.store.online.rows.read([b"mlfuncs"])
        self.read({name: [] for name in self.inputs}).to_dict()

    def bind(self, target: Any) -> Any:
        """`target` (a function, or a class called per request) as callers see it: keys in, features filled in.

        Raises SpecError when it takes none of the features.
        """
        target = getattr(target, "target", target) if type(target).__name__ == "Function" else target
        if inspect.isclass(target):
            named = {"__doc__": target.__doc__, "__module__": target.__module__, "__qualname__": target.__qualname__}
            return type(target.__name__, (target,), {**named, "__call__": self._filled(target.__call__, skip=1)})
        return self._filled(target, skip=0)

    def _filled(self, function: Callable[..., Any], skip: int) -> Callable[..., Any]:
        from mlfuncs.interface.hints import resolved_hints

        hints = resolved_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[skip:]
        filling = _Filling(self, parameters, hints)
        if inspect.iscoroutinefunction(function):

            async def awaited(*owner: Any, **values: Any) -> Any:
                return await function(*owner, **await asyncio.to_thread(filling.fill, values))

            return filling.dressed(awaited, function, skip)

        def called(*owner: Any, **values: Any) -> Any:
            return function(*owner, **filling.fill(values))

        return filling.dressed(called, function, skip)


class _Filling:
    """Which parameters of a handler are features, and what its callers send instead."""

    def __init__(self, reader: FeatureReader, parameters: list[inspect.Parameter], hints: Mapping[str, Any]) -> None:
        self.reader, self.hints = reader, hints
        names = [parameter.name for parameter in parameters]
        self.named = [name for name in reader._columns if name in names]
        self.rest = [name for name in reader._columns if name not in names] if ALL in names else []
        if not self.named and ALL not in names:
            raise SpecError(
                f"the function takes none of its features: name a parameter {reader._columns[0]!r}, or one {ALL!r} for "
                "all of them"
            )
        self.own = [one for one in parameters if one.name not in (*self.named, ALL)]
        told = [name for name in (*reader.inputs, *self.named) if name in hints]
        self.many = any(_is_many(hints[name]) for name in told) or _is_table(hints.get(ALL))
        self.returns = hints.get("return", Any)

    def fill(self, values: dict[str, Any]) -> dict[str, Any]:
        """The handler's arguments from what the caller sent."""
        begun = time.perf_counter()
        try:
            found, arguments = self._read(values)
        except MlfuncsError:
            self.reader.metrics.failed()
            raise
        self.reader.metrics.read(time.perf_counter() - begun, found.counts())
        return arguments

    def _read(self, values: Mapping[str, Any]) -> tuple[OnlineFeatures, dict[str, Any]]:
        inputs = self.reader.inputs
        entities = {name: values[name] if self.many else [values[name]] for name in inputs}
        found = self.reader.read(entities)
        arguments = {one.name: values[one.name] for one in self.own if one.name in values}
        columns = found.to_dict() if self.named or self.rest else {}
        for name in self.named:
            arguments[name] = _as_hinted(columns[name], self.hints.get(name)) if self.many else columns[name][0]
        if ALL in self.hints or self.rest:
            arguments[ALL] = self._all(found, columns)
        return found, arguments

    def _all(self, found: OnlineFeatures, columns: Mapping[str, list[Any]]) -> Any:
        hint = self.hints.get(ALL)
        names = self.rest
        if _module(hint) == "numpy":
            matrix = found.to_numpy()
            picked = matrix if len(names) == len(found.names) else matrix[:, [found.names.index(n) for n in names]]
            return picked if self.many else picked[0]
        if _module(hint) == "pandas":
            return found.to_pandas()[names]
        if _module(hint) == "pyarrow":
            return found.to_arrow().select(names)
        return {name: columns[name] if self.many else columns[name][0] for name in names}

    def dressed(self, wrapper: Callable[..., Any], function: Callable[..., Any], skip: int) -> Callable[..., Any]:
        """`wrapper` with the name and doc of `function` and the parameters that callers send."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = {one.name: one for one in self.own}
        kinds = {name: list[kind] if self.many else kind for name, kind in self.reader.inputs.items()}  # type: ignore[valid-type]
        kinds |= {name: self.hints.get(name, Any) for name in own}
        given = [inspect.Parameter(name, keyword) for name in kinds if name not in own]
        given += [one.replace(kind=keyword, annotation=inspect.Parameter.empty) for one in own.values()]
        owner = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)] if skip else []
        wrapper.__dict__.update({key: value for key, value in vars(function).items() if key != "__wrapped__"})
        wrapper.__signature__ = inspect.Signature([*owner, *given])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {**kinds, "return": self.returns}
        wrapper.__name__, wrapper.__doc__ = function.__name__, function.__doc__
        wrapper.__qualname__, wrapper.__module__ = function.__qualname__, function.__module__
        return wrapper


def _module(hint: Any) -> str:
    return str(getattr(get_origin(hint) or hint, "__module__", "")).split(".")[0]


def _is_table(hint: Any) -> bool:
    return _module(hint) in ("pandas", "pyarrow", "polars")


def _is_many(hint: Any) -> bool:
    """Whether a parameter of this type holds one value per entity."""
    origin = get_origin(hint)
    if origin is Union or type(hint).__name__ == "UnionType":
        return any(_is_many(part) for part in get_args(hint))
    return (origin or hint) in (list, tuple, Sequence) or _is_table(hint) or _module(hint) == "numpy"


def _as_hinted(column: list[Any], hint: Any) -> Any:
    if _module(hint) == "numpy":
        import numpy as np

        return np.array([np.nan if value is None else value for value in column])
    return column
