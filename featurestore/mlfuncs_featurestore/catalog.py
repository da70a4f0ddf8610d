"""The project's definitions in the registry: apply, get, list, search, lineage.

Owns: the documents of kinds "feature_entity", "feature_view", "feature_on_demand" and "feature_service".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import Conflict, NotFound, SpecError
from mlfuncs.settings import Settings
from mlfuncs_featurestore.checkpoints import reached
from mlfuncs_featurestore.definitions import (
    Definition,
    Entity,
    FeatureService,
    FeatureView,
    OnDemandView,
    definition_from_dict,
)
from mlfuncs_featurestore.plan import Plan, compare, refusals
from mlfuncs_featurestore.types import FeatureType

if TYPE_CHECKING:
    from mlfuncs.registry.definitions import Definitions, Seen

_PREFIX = "feature_"
_KINDS = tuple(_PREFIX + kind for kind in ("entity", "view", "on_demand", "service"))
_SPOKEN = {"on_demand": "on-demand view"}
_ATTEMPTS = 20  # of one apply, while others apply other definitions


class Catalog:
    """Definitions by kind and name; every call sees what the registry holds now."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def _documents(self) -> Definitions:
        from mlfuncs.registry import open_registry

        return open_registry(self.settings).definitions

    def apply(self, definitions: Definition | Iterable[Definition], *, dry_run: bool = False) -> Plan:
        """Record the definitions, all or none, and return the plan. See FeatureStore.apply.

        The plan is made of what was there a moment before: when another process records something in between, it is
        made anew. Raises Conflict when that process changed one of these very definitions to something else.
        """
        if isinstance(definitions, str) or not isinstance(definitions, (Definition, Iterable)):
            raise SpecError(f"apply takes entities, views and services, not {definitions!r}")
        given = [definitions] if isinstance(definitions, Definition) else list(definitions)
        wanted = self._with_code(_with_entities(given))
        for _ in range(_ATTEMPTS):
            seen = self._documents.look(_KINDS)
            plan = self._plan(wanted, dry_run)
            reached("apply:planned")
            try:
                if not dry_run:
                    self._documents.put_all([(_PREFIX + one.kind, one.name, one.to_dict()) for one in wanted], seen)
                return plan
            except Conflict:
                self._check_taken(wanted, seen)
        raise Conflict(
            f"others changed definitions {_ATTEMPTS} times while this apply ran; nothing was applied: repeat it"
        )

    def _plan(self, wanted: list[Definition], dry_run: bool) -> Plan:
        history = {(one.kind, one.name): self._versions(one.kind, one.name) for one in wanted}
        reasons = [reason for one in wanted for reason in refusals(history[one.kind, one.name], one)]
        if reasons:
            raise Conflict("nothing was applied, because it would corrupt what is stored:\n  " + "\n  ".join(reasons))
        self._check_references(wanted)
        changes = tuple(compare(next(iter(history[one.kind, one.name]), None), one) for one in wanted)
        return Plan(changes, applied=not dry_run)

    def _check_taken(self, wanted: list[Definition], seen: Seen) -> None:
        """Refuse to write over what another process made of the same definitions since `seen`."""
        now = self._documents.look(_KINDS).versions
        for one in wanted:
            key = (_PREFIX + one.kind, one.name)
            stored = next(iter(self._versions(one.kind, one.name)), None)
            same = stored is not None and stored.digest == one.digest
            if now.get(key) != seen.versions.get(key) and not same:
                raise Conflict(
                    f"{one.kind} {one.name!r} was changed by another process during this apply (its version is "
                    f"{now.get(key)} now); nothing was applied: look at the plan (dry_run=True), then apply again"
                )

    def view(self, name: str, version: int | None = None) -> FeatureView:
        """The view of that name. Raises NotFound with near names."""
        return self._get("view", name, version)

    def on_demand(self, name: str, version: int | None = None) -> OnDemandView:
        """The on-demand view of that name. Raises NotFound with near names."""
        return self._get("on_demand", name, version)

    def service(self, name: str, version: int | None = None) -> FeatureService:
        """The service of that name, also written "name@2". Raises NotFound with near names."""
        bare, _, number = name.partition("@")
        return self._get("service", bare, int(number) if number.isdigit() else version)

    def all(self, kind: str) -> list[Definition]:
        """The definitions of `kind` ("entity", "view", "on_demand", "service"), by name."""
        return [definition_from_dict(kind, row.body) for row in self._documents.list(_document_kind(kind))]

    def version(self, kind: str, name: str) -> int:
        """The number of the newest version of a definition. Raises NotFound."""
        return self._documents.get(_document_kind(kind), name).version

    def earlier_fields(self, view: str) -> list[dict[str, FeatureType]]:
        """The field lists that a view had before, newest first: what older online rows were packed with."""
        lists = [dict(one.fields) for one in self._versions("view", view) if isinstance(one, FeatureView)]
        return [fields for index, fields in enumerate(lists) if index and fields not in lists[:index]]

    def delete(self, kind: str, name: str) -> None:
        """Remove a definition; its tables stay. Raises NotFound, and Conflict while another definition uses it."""
        seen = self._documents.look(_KINDS)
        self._get(kind, name, None)
        users = [one.name for one in self._dependents() if kind != "entity" and _uses(one, name)]
        if users and kind != "service":
            raise Conflict(f"{kind} {name!r} is used by {', '.join(users)}; delete or change those first")
        self._documents.put_all([(_PREFIX + kind, name, None)], seen)

    def search(self, text: str = "", *, tag: str = "", owner: str = "") -> list[dict[str, Any]]:
        """Features whose name, view, description or tags contain `text`, filtered by tag ("key" or "key=value")."""
        found = []
        for one in (*self.all("view"), *self.all("on_demand")):
            assert isinstance(one, (FeatureView, OnDemandView))
            if (owner and one.owner != owner) or (tag and not _has_tag(one.tags, tag)):
                continue
            about = " ".join([one.name, one.description, one.owner, *one.tags, *one.tags.values()]).lower()
            for feature, kind in one.features.items():
                if text.lower() in f"{feature.lower()} {about}":
                    row = {"feature": f"{one.name}:{feature}", "type": str(kind), "kind": one.kind, "owner": one.owner}
                    stale = feature in getattr(one, "deprecated", ())
                    found.append(row | {"deprecated": stale, "description": one.description, "tags": dict(one.tags)})
        return found

    def lineage(self, name: str) -> dict[str, list[str]]:
        """What a view, on-demand view or service comes from ("upstream") and what uses it ("downstream").

        Entries are "kind:name". Downstream are services, functions and endpoints that are handed its features, runs
        that trained on them and the models these made.
        """
        from mlfuncs.registry import open_registry
        from mlfuncs_featurestore.lineage import consumers

        everything = [one for kind in ("view", "on_demand", "service") for one in self.all(kind)]
        mine = [one for one in everything if one.name == name]
        if not mine:
            raise NotFound("view or service", name, [one.name for one in everything])
        upstream: list[str] = []
        for one in mine:
            if isinstance(one, FeatureView):
                upstream += [f"source:{one.source}"] if one.source else []
                upstream += [f"entity:{entity.name}" for entity in one.entities]
            used = [other for other in everything if other is not one and _uses(one, other.name)]
            upstream += [f"{other.kind}:{other.name}" for other in used]
        downstream = [f"{one.kind}:{one.name}" for one in everything if _uses(one, name) and one.name != name]
        names = [name, *(entry.partition(":")[2] for entry in downstream)]
        downstream += consumers(open_registry(self.settings), names, self.settings)
        return {"upstream": list(dict.fromkeys(upstream)), "downstream": downstream}

    def code(self, definition: FeatureView | OnDemandView) -> Callable[..., Any]:
        """The definition's function: its own, else the one in its signed bundle, verified before it is loaded."""
        own, digest = (
            (definition.transform, definition.transform_bundle)
            if isinstance(definition, FeatureView)
            else (definition.function, definition.function_bundle)
        )
        if own is not None:
            return own
        if not digest:
            raise SpecError(f"{definition.kind} {definition.name!r} has no function; define it with the decorator")
        from mlfuncs.bundles.bundle import open_bundle

        return open_bundle(digest, self.settings).load()

    def _with_code(self, definitions: list[Definition]) -> list[Definition]:
        """The definitions with the digests of their functions' bundles."""
        return [self._bundled(one) for one in definitions]

    def _bundled(self, one: Definition) -> Definition:
        function = getattr(one, "transform", None) or getattr(one, "function", None)
        if function is None:
            return one
        from mlfuncs.bundles.bundle import build_bundle
        from mlfuncs.spec import FunctionSpec, slugify

        digest = build_bundle(function, FunctionSpec(name=slugify(one.name)), self.settings).digest
        changes = {"transform_bundle" if isinstance(one, FeatureView) else "function_bundle": digest}
        return dataclasses.replace(one, **changes)  # type: ignore[arg-type]

    def _check_references(self, wanted: list[Definition]) -> None:
        """Every reference of every service and on-demand view, old and new, leads to a feature."""
        coming = {(one.kind, one.name): one for one in wanted}
        stored = [one for kind in ("view", "on_demand", "service") for one in self.all(kind)]
        after = {**{(one.kind, one.name): one for one in stored}, **coming}
        known: dict[str, Mapping[str, Any]] = {}
        for one in after.values():
            if isinstance(one, (FeatureView, OnDemandView)):
                if one.name in known:
                    raise Conflict(f"{one.name!r} names both a view and an on-demand view; rename one")
                known[one.name] = one.features
        for one in after.values():
            for reference in _references(one):
                view, _, feature = reference.partition(":")
                if view not in known:
                    raise NotFound("view", view, known, hint=f"({one.kind} {one.name!r} uses it)")
                if feature and feature not in known[view]:
                    raise NotFound(f"feature of {view!r}", feature, known[view], f"({one.kind} {one.name!r} uses it)")

    def _dependents(self) -> list[Definition]:
        return [*self.all("on_demand"), *self.all("service")]

    def _get(self, kind: str, name: str, version: int | None) -> Any:
        try:
            return definition_from_dict(kind, self._documents.get(_document_kind(kind), name, version).body)
        except NotFound as exc:
            spoken = _SPOKEN.get(kind, kind)
            if exc.name != name:  # there is one, but not in that version
                raise NotFound(f"version of {spoken} {name!r}", exc.name, exc.near) from None
            raise NotFound(spoken, name, [one.name for one in self.all(kind)]) from None

    def _versions(self, kind: str, name: str) -> list[Definition]:
        rows = self._documents.versions(_PREFIX + kind, name)
        return [definition_from_dict(kind, row.body) for row in rows if row.body is not None]


def _document_kind(kind: str) -> str:
    if _PREFIX + kind not in _KINDS:
        raise SpecError(f"kind is one of {', '.join(one.removeprefix(_PREFIX) for one in _KINDS)}, not {kind!r}")
    return _PREFIX + kind


def _with_entities(given: list[Definition]) -> list[Definition]:
    """`given` preceded by the entities of its views; one name with two meanings is refused."""
    wanted: dict[tuple[str, str], Definition] = {}
    for one in given:
        if not isinstance(one, Definition):
            raise SpecError(f"{one!r} is not a definition: apply takes entities, views and services")
        for part in (*(one.entities if isinstance(one, FeatureView) else ()), one):
            known = wanted.setdefault((part.kind, part.name), part)
            if known.digest != part.digest:
                raise Conflict(f"{part.kind} {part.name!r} is given twice with different contents")
    entities = [one for one in wanted.values() if isinstance(one, Entity)]
    return [*entities, *(one for one in wanted.values() if not isinstance(one, Entity))]


def _references(one: Definition) -> tuple[str, ...]:
    if isinstance(one, OnDemandView):
        return tuple(one.sources)
    return tuple(one.features) if isinstance(one, FeatureService) else ()


def _uses(one: Definition, name: str) -> bool:
    return any(reference.partition(":")[0] == name for reference in _references(one))


def _has_tag(tags: Mapping[str, str], tag: str) -> bool:
    key, equals, value = tag.partition("=")
    return key in tags and (not equals or tags[key] == value)
