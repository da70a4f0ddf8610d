"""What a user declares: entities, views of features, on-demand features, services. Frozen, right once they exist.

Owns: OnDemandView, FeatureService and the decorator `on_demand`, beside Entity and FeatureView of `views`; what all
four are together (`Definition`, `definition_from_dict`). Nothing here imports pandas, pyarrow, numba, deltalake or
redis, so that defining is cheap.

Who owns what in this package:

    definitions, views, declarations, types        values that users write (pure)
    plan, catalog                                  what `apply` changes; the registry's documents
    keys, hashing, rows, row_values                entity keys and packed rows as bytes (pure)
    json_rows                                      rows as JSON has them (pure)
    python_values, ranges                          Python values as Arrow columns; numbers that do not fit (pure)
    tables, quality, profile                       anything tabular to Arrow; checks; statistics (pure)
    offline, delta_tables, delta_files, ingest     Delta Lake tables and the way into them
    asof, windows, window_columns, *_kernels       point-in-time join and windows (pure; numba)
    references, history, handed_in, training       `get_historical_features`, its engines and its record
    online, online_*, stream_windows, redis_*      the latest values in Redis, and the way there
    push, pushlog, flusher, materialize, stream    what brings rows online
    verify, skew                                   whether both sides say the same
    pandas_columns                                 Arrow columns as pandas columns (pure)
    derived                                        evaluation of on-demand features (pure)
    store                                          the facade
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs_featurestore.declarations import (
    as_names,
    check_identifier,
)
from mlfuncs_featurestore.types import FeatureType
from mlfuncs_featurestore.views import Entity, FeatureView, SharedDefinition, pairs, types_of

MODES = ("pandas", "numpy", "arrow")


@dataclass(frozen=True)
class OnDemandView(SharedDefinition):
    """Features computed from stored features and request data when they are asked for, offline and online alike.

    `sources` are references ("view:feature"); the function receives them by feature name, and the `request` columns
    by theirs, as columns in the form that `mode` names, and returns a mapping (or frame) with `fields`.
    """

    kind = "on_demand"
    name: str
    sources: Sequence[str]
    fields: Mapping[str, Any]
    request: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "pandas"
    tags: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    description: str = ""
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    function_bundle: str = ""  # digest of the function's bundle; set by `apply`

    def __post_init__(self) -> None:
        check_identifier("on-demand view", self.name)
        put = object.__setattr__
        put(self, "sources", as_names("sources", self.sources))
        put(self, "fields", types_of("field", self.fields))
        put(self, "request", types_of("request", self.request))
        put(self, "tags", {str(key): str(value) for key, value in self.tags.items()})
        if not self.fields:
            raise SpecError(f"on-demand view {self.name!r} has no fields")
        if self.mode not in MODES:
            raise SpecError(f"mode is one of {', '.join(MODES)}, not {self.mode!r}")
        for source in self.sources:
            if source.count(":") != 1:
                raise SpecError(f"source {source!r} of {self.name!r} must be written 'view:feature'")
        names = [*(source.split(":")[1] for source in self.sources), *self.request]
        if len(set(names)) != len(names):
            raise SpecError(f"on-demand view {self.name!r} has two inputs of one name: {', '.join(names)}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain result of the function."""
        if self.function is None:
            raise SpecError(f"on-demand view {self.name!r} has no function to call")
        return self.function(*args, **kwargs)

    @property
    def features(self) -> dict[str, FeatureType]:
        """The features it computes, with their types."""
        return dict(self.fields)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal view back (the function by its bundle's digest only)."""
        return {
            "name": self.name,
            "sources": list(self.sources),
            "fields": pairs(self.fields),
            "request": pairs(self.request),
            "mode": self.mode,
            "tags": dict(self.tags),
            "owner": self.owner,
            "description": self.description,
            "function_bundle": self.function_bundle,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OnDemandView:
        """The on-demand view that `to_dict` wrote."""
        return cls(**values)


@dataclass(frozen=True)
class FeatureService(SharedDefinition):
    """A named list of features that a model takes; each `apply` of a changed list is a new version of it."""

    kind = "service"
    name: str
    features: Sequence[Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        check_identifier("service", self.name)
        references: list[str] = []
        if isinstance(self.features, str) or not isinstance(self.features, (FeatureView, OnDemandView, Iterable)):
            as_names("features", self.features)  # raises SpecError: a string is a sequence of letters
        for one in [self.features] if isinstance(self.features, (FeatureView, OnDemandView)) else self.features:
            references += [f"{one.name}:{name}" for name in one.features] if hasattr(one, "features") else [str(one)]
        object.__setattr__(self, "features", tuple(dict.fromkeys(as_names("features", references))))
        object.__setattr__(self, "tags", {str(key): str(value) for key, value in self.tags.items()})
        if not self.features:
            raise SpecError(f"service {self.name!r} names no feature")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal service back."""
        return {
            "name": self.name,
            "features": list(self.features),
            "tags": dict(self.tags),
            "owner": self.owner,
            "description": self.description,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureService:
        """The service that `to_dict` wrote."""
        return cls(**values)


Definition = Entity | FeatureView | OnDemandView | FeatureService
_KINDS: dict[str, Any] = {cls.kind: cls for cls in (Entity, FeatureView, OnDemandView, FeatureService)}


def definition_from_dict(kind: str, values: Mapping[str, Any]) -> Definition:
    """The definition of `kind` ("entity", "view", "on_demand", "service") that `to_dict` wrote."""
    return _KINDS[kind].from_dict(values)


def on_demand(**options: Any) -> Callable[[Callable[..., Any]], OnDemandView]:
    """Make an OnDemandView of a vectorised function of its inputs, given by name.

    >>> @on_demand(sources=["spend:amount"], request={"limit": float}, fields={"share": float})
    ... def usage(amount, limit):
    ...     return {"share": amount / limit}
    >>> usage.name, str(usage.fields["share"])
    ('usage', 'float64')
    """

    def decorate(function: Callable[..., Any]) -> OnDemandView:
        defaults = {"name": function.__name__, "description": (function.__doc__ or "").strip()}
        return OnDemandView(**{**defaults, **options, "function": function})

    return decorate
