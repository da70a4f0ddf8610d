"""Entities and the views of their features, as users declare them. Frozen, right once they exist.

Owns: Entity, FeatureView and the decorator `feature_view`; what all definitions share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlfuncs.errors import SpecError
from mlfuncs_featurestore.declarations import (
    AggregateFeature,
    Aggregation,
    Expectation,
    Source,
    as_names,
    check_identifier,
)
from mlfuncs_featurestore.durations import format_duration, parse_duration
from mlfuncs_featurestore.types import INTEGERS, FeatureType, parse_type

KEY_TYPES = ("int64", "string", "uuid", "bytes")


class SharedDefinition:
    """What all definitions share: a JSON form and the digest of it."""

    kind = ""

    @property
    def digest(self: Any) -> str:
        """SHA-256 of the canonical JSON form: equal definitions have equal digests in every process."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def pairs(mapping: Mapping[str, Any]) -> list[list[str]]:
    """A mapping whose order counts, for JSON stores that sort the keys of objects."""
    return [[name, str(value)] for name, value in mapping.items()]


@dataclass(frozen=True)
class Entity(SharedDefinition):
    """What features describe. One key column named as the entity, or several in `keys`.

    Key types are int64 (any integer), string, uuid and bytes; 0 and "" are keys like any other.

    >>> Entity("user_id", "int64").keys
    {'user_id': 'int64'}
    >>> Entity("card", keys={"bank": "string", "number": int}).keys
    {'bank': 'string', 'number': 'int64'}
    """

    kind = "entity"
    name: str
    type: str = "string"
    keys: Mapping[str, str] | None = None
    description: str = ""

    def __post_init__(self) -> None:
        check_identifier("entity", self.name)
        keys = {self.name: self.type} if self.keys is None else dict(self.keys)
        if not keys:
            raise SpecError(f"entity {self.name!r} has no key column")
        checked = {check_identifier("key", key): _key_type(key, spelled) for key, spelled in keys.items()}
        object.__setattr__(self, "keys", checked)
        object.__setattr__(self, "type", checked.get(self.name, next(iter(checked.values()))))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal entity back."""
        return {"name": self.name, "keys": pairs(self.keys or {}), "description": self.description}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Entity:
        """The entity that `to_dict` wrote."""
        return cls(values["name"], keys=dict(values["keys"]), description=values.get("description", ""))


def _key_type(key: str, spelled: Any) -> str:
    if spelled == "uuid" or getattr(spelled, "__name__", "") == "UUID":
        return "uuid"
    kind = parse_type(spelled).kind
    kind = "int64" if kind in INTEGERS else kind
    if kind not in KEY_TYPES:
        raise SpecError(f"key {key!r} is {spelled!r}; a key is one of {', '.join(KEY_TYPES)}")
    return kind


@dataclass(frozen=True)
class FeatureView(SharedDefinition):
    """Features of the same entities that arrive together, one row per event.

    `timestamp` is the event-time column. With `created_timestamp`, a value is visible to a spine row only from that
    time on (rows without one get the time of ingest). `ttl` is the age, inclusive, at which a value stops being
    one. `event_id` names a field that identifies an event, so that a later row with the same id corrects it and a
    delete removes it. `buckets` is the number of partitions by entity hash, fixed when the table is made.
    """

    kind = "view"
    name: str
    entities: Sequence[Entity]
    fields: Mapping[str, Any]
    timestamp: str = "event_timestamp"
    created_timestamp: str | None = None
    aggregations: Sequence[Aggregation] = ()
    ttl: Any = None
    online: bool = False
    source: Any = None
    expectations: Sequence[Expectation] = ()
    event_id: str | None = None
    deprecated: Sequence[str] = ()
    buckets: int = 8
    tags: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    description: str = ""
    transform: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    transform_bundle: str = ""  # digest of the transform's bundle; set by `apply`

    def __post_init__(self) -> None:
        check_identifier("view", self.name)
        put = object.__setattr__
        put(self, "entities", _several("entities", self.entities, Entity))
        put(self, "fields", types_of("field", self.fields))
        put(self, "aggregations", _several("aggregations", self.aggregations, Aggregation))
        put(self, "expectations", _several("expectations", self.expectations, Expectation))
        put(self, "deprecated", as_names("deprecated", self.deprecated))
        put(self, "tags", {str(key): str(value) for key, value in self.tags.items()})
        put(self, "ttl", None if self.ttl is None else format_duration(parse_duration(self.ttl, "ttl")))
        put(self, "source", None if self.source is None else Source.parse(self.source))
        _check_view(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain result of the view's transform, for a view made by the decorator."""
        if self.transform is None:
            raise SpecError(f"view {self.name!r} has no transform to call")
        return self.transform(*args, **kwargs)

    @cached_property
    def keys(self) -> dict[str, str]:
        """Key columns and their types, in the order of the entities."""
        return {key: kind for entity in self.entities for key, kind in (entity.keys or {}).items()}

    @cached_property
    def ttl_us(self) -> int | None:
        """The ttl in microseconds."""
        return None if self.ttl is None else parse_duration(self.ttl, "ttl")

    @cached_property
    def aggregates(self) -> dict[str, AggregateFeature]:
        """The computed features by name."""
        return {one.name: one for aggregation in self.aggregations for one in aggregation.features(self.fields)}

    @cached_property
    def features(self) -> dict[str, FeatureType]:
        """Every feature that can be asked for, stored and computed, with its type."""
        return {**self.fields, **{name: feature.type for name, feature in self.aggregates.items()}}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row: keys, event time, created time when declared, fields."""
        created = (self.created_timestamp,) if self.created_timestamp else ()
        return (*self.keys, self.timestamp, *created, *self.fields)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal view back (a transform by its bundle's digest only)."""
        return {
            "name": self.name,
            "entities": [entity.to_dict() for entity in self.entities],
            "fields": pairs(self.fields),
            "timestamp": self.timestamp,
            "created_timestamp": self.created_timestamp,
            "aggregations": [aggregation.to_dict() for aggregation in self.aggregations],
            "ttl": self.ttl,
            "online": self.online,
            "source": None if self.source is None else str(self.source),
            "expectations": [expectation.to_dict() for expectation in self.expectations],
            "event_id": self.event_id,
            "deprecated": list(self.deprecated),
            "buckets": self.buckets,
            "tags": dict(self.tags),
            "owner": self.owner,
            "description": self.description,
            "transform_bundle": self.transform_bundle,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureView:
        """The view that `to_dict` wrote."""
        return cls(
            **{
                **values,
                "entities": [Entity.from_dict(one) for one in values["entities"]],
                "aggregations": [Aggregation.from_dict(one) for one in values["aggregations"]],
                "expectations": [Expectation.from_dict(one) for one in values["expectations"]],
            }
        )


def _several(what: str, given: Any, kind: type) -> tuple[Any, ...]:
    """One or several of `kind` as a tuple. Raises SpecError for anything else."""
    found = (given,) if isinstance(given, kind) else given
    if isinstance(found, (str, Mapping)) or not isinstance(found, Iterable):
        raise SpecError(f"{what} must be a list of ml.{kind.__name__}, not {given!r}")
    found = tuple(found)
    for one in found:
        if not isinstance(one, kind):
            raise SpecError(f"{what} must be a list of ml.{kind.__name__}; {one!r} is none")
    return found


def types_of(what: str, given: Any) -> dict[str, FeatureType]:
    """Names and their types, from a mapping or the pairs of one."""
    try:
        pairs = dict(given)
    except (TypeError, ValueError):
        raise SpecError(f"{what}s must be a mapping like {{'amount': 'float64'}}, not {given!r}") from None
    return {check_identifier(what, name): parse_type(kind) for name, kind in pairs.items()}


def _check_view(view: FeatureView) -> None:
    if not view.entities:
        raise SpecError(f"view {view.name!r} needs entities: write entities=[ml.Entity('user_id', 'int64')]")
    if not view.fields:
        raise SpecError(f"view {view.name!r} has no fields")
    check_identifier("timestamp", view.timestamp)
    if view.created_timestamp:
        check_identifier("created_timestamp", view.created_timestamp)
    key_count = sum(len(entity.keys or {}) for entity in view.entities)
    doubled = [name for name in view.columns if view.columns.count(name) > 1]
    if doubled or len(view.keys) != key_count:
        raise SpecError(f"view {view.name!r} uses a column name twice: {', '.join(sorted(set(doubled) or view.keys))}")
    for name in view.deprecated:
        if name not in view.fields:
            raise SpecError(f"view {view.name!r} deprecates {name!r}, which is not one of its fields")
    if view.event_id is not None and view.event_id not in view.fields:
        raise SpecError(f"event_id {view.event_id!r} of view {view.name!r} must be one of its fields")
    if view.event_id is not None and view.fields[view.event_id].kind in ("list", "vector", "struct"):
        kind = view.fields[view.event_id]
        raise SpecError(f"event_id {view.event_id!r} of view {view.name!r} is {kind}; an event is known by one value")
    for expectation in view.expectations:
        if expectation.column not in view.columns:
            raise SpecError(f"view {view.name!r} expects something of {expectation.column!r}, which it does not have")
    names = [name for aggregation in view.aggregations for name in aggregation.names]
    clash = sorted({name for name in names if names.count(name) > 1 or name in view.columns})
    if clash:
        raise SpecError(f"view {view.name!r} has two features named {clash[0]!r}")
    if not 1 <= view.buckets <= 4096:
        raise SpecError(f"buckets is 1 to 4096, not {view.buckets!r}")
    _ = view.aggregates  # raises SpecError when an aggregation does not fit its column


def feature_view(**options: Any) -> Callable[[Callable[..., Any]], FeatureView]:
    """Make a FeatureView of a function that turns a source table into the view's rows: one code, batch and stream.

    Options are those of FeatureView; the name is the function's unless given.

    >>> @feature_view(entities=[Entity("user_id", int)], fields={"double": float})
    ... def doubled(frame):
    ...     return frame.assign(double=frame["amount"] * 2)
    >>> doubled.name
    'doubled'
    """

    def decorate(function: Callable[..., Any]) -> FeatureView:
        defaults = {"name": function.__name__, "description": (function.__doc__ or "").strip()}
        return FeatureView(**{**defaults, **options, "transform": function})

    return decorate
