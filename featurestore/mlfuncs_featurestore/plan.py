"""What `apply` would change, and what it refuses because it would corrupt what is stored.

Owns: comparison of an old and a new definition, and the plan shown to the user. Pure.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlfuncs_featurestore.definitions import Definition, Entity, FeatureView, OnDemandView

CREATE, UPDATE, UNCHANGED = "create", "update", "unchanged"


@dataclass(frozen=True)
class Change:
    """What happens to one definition: `action` is "create", "update" or "unchanged"."""

    kind: str
    name: str
    action: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The changes of one `apply`, in the order given; prints as lines and shows as a table in a notebook."""

    changes: tuple[Change, ...]
    applied: bool

    @property
    def is_empty(self) -> bool:
        """Whether nothing changes."""
        return all(change.action == UNCHANGED for change in self.changes)

    def __str__(self) -> str:
        signs = {CREATE: "+", UPDATE: "~", UNCHANGED: "="}
        head = "no changes" if self.is_empty else ("applied" if self.applied else "would apply")
        lines = [f"{head}:"]
        for change in self.changes:
            lines.append(f"  {signs[change.action]} {change.kind} {change.name}")
            lines += [f"      {detail}" for detail in change.details]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{change.action}</td><td>{change.kind}</td><td>{html.escape(change.name)}</td>"
            f"<td>{'<br>'.join(html.escape(detail) for detail in change.details)}</td></tr>"
            for change in self.changes
        )
        return f"<table><tr><th>action</th><th>kind</th><th>name</th><th>what</th></tr>{rows}</table>"


def compare(old: Definition | None, new: Definition) -> Change:
    """The change from `old` (None: there is none) to `new`."""
    if old is None:
        features = new.features if isinstance(new, (FeatureView, OnDemandView)) else {}
        return Change(new.kind, new.name, CREATE, tuple(f"+ {name}: {kind}" for name, kind in features.items()))
    if old.digest == new.digest:
        return Change(new.kind, new.name, UNCHANGED)
    return Change(new.kind, new.name, UPDATE, tuple(_differences(old, new)))


def _differences(old: Definition, new: Definition) -> Iterable[str]:
    before, after = old.to_dict(), new.to_dict()
    if isinstance(old, FeatureView) and isinstance(new, FeatureView):
        yield from _feature_differences(old, new)
        for name in ("fields", "aggregations"):
            before.pop(name), after.pop(name)
    for name, value in after.items():
        if before.get(name) != value:
            yield f"{name}: {before.get(name)!r} -> {value!r}"


def _feature_differences(old: FeatureView, new: FeatureView) -> Iterable[str]:
    for name, kind in new.features.items():
        if name not in old.features:
            yield f"+ {name}: {kind}"
        elif old.features[name] != kind:
            yield f"~ {name}: {old.features[name]} -> {kind} (widened)"
    for name in old.features:
        if name not in new.features:
            yield f"- {name}"


def refusals(versions: Sequence[Definition], new: Definition) -> list[str]:
    """Why `new` must not follow `versions` (newest first), one line each; empty when it may."""
    if not versions:
        return []
    old = versions[0]
    if isinstance(old, Entity) and isinstance(new, Entity):
        if list((old.keys or {}).items()) != list((new.keys or {}).items()):
            return [f"entity {new.name!r}: its keys are {old.keys} and would become {new.keys}; take a new name"]
        return []
    if not isinstance(old, FeatureView) or not isinstance(new, FeatureView):
        return []
    views = [version for version in versions if isinstance(version, FeatureView)]
    return [f"view {new.name!r}: {reason}" for reason in _view_refusals(views, new)]


def _view_refusals(versions: Sequence[FeatureView], new: FeatureView) -> Iterable[str]:
    old = versions[0]
    if list(old.keys.items()) != list(new.keys.items()):
        yield f"its key is {old.keys} and would become {new.keys}; rows could not be found any more: take a new name"
    for name in ("timestamp", "created_timestamp", "event_id", "buckets"):
        if getattr(old, name) != getattr(new, name):
            yield f"{name} is {getattr(old, name)!r} and cannot become {getattr(new, name)!r}; take a new name"
    for name in old.fields:
        if name not in new.fields and name not in old.deprecated:
            yield f"field {name!r} would vanish; deprecate it first: deprecated=[{name!r}]"
    for name, kind in new.fields.items():
        stored = next((version.fields[name] for version in versions if name in version.fields), None)
        if stored is not None and not stored.widens_to(kind):
            yield f"field {name!r} is stored as {stored} and cannot become {kind} without loss; add a field instead"
