"""What a list of features means: views, services and "view:feature" references, and the names of the results.

Owns: resolving references against the catalog and naming result columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlfuncs.errors import NotFound, SpecError
from mlfuncs_featurestore.catalog import Catalog
from mlfuncs_featurestore.definitions import FeatureService, FeatureView, OnDemandView


@dataclass(frozen=True)
class Selection:
    """Features to fetch. `wanted` are (view, feature) pairs in the order asked; `views` also has the views that
    on-demand views need."""

    wanted: tuple[tuple[str, str], ...]
    views: Mapping[str, FeatureView]
    on_demand: Mapping[str, OnDemandView]

    @property
    def stored(self) -> dict[str, tuple[str, ...]]:
        """Per view, the features to read: those asked for and those that on-demand views take."""
        pairs = [pair for pair in self.wanted if pair[0] in self.views]
        for name in dict.fromkeys(view for view, _ in self.wanted if view in self.on_demand):
            pairs += [split_reference(source) for source in self.on_demand[name].sources]
        found: dict[str, list[str]] = {}
        for view, feature in dict.fromkeys(pairs):
            found.setdefault(view, []).append(feature)
        return {view: tuple(features) for view, features in found.items()}

    def names(self, full: bool, taken: Iterable[str] = ()) -> dict[tuple[str, str], str]:
        """The result column of each pair: the feature's name, or view__feature when `full` or when names clash.

        `taken` are columns that are there already. Raises SpecError when even full names clash.
        """
        taken = set(taken)
        features = [feature for _, feature in self.wanted]
        names = {
            (view, feature): f"{view}__{feature}"
            if full or features.count(feature) > 1 or feature in taken
            else feature
            for view, feature in self.wanted
        }
        clash = taken.intersection(names.values())
        if clash:
            raise SpecError(f"the spine has a column {sorted(clash)[0]!r} already; rename it")
        return names

    def types(self) -> dict[tuple[str, str], Any]:
        """The feature type of each pair."""
        return {(v, f): (self.views.get(v) or self.on_demand[v]).features[f] for v, f in self.wanted}


def split_reference(reference: str) -> tuple[str, str]:
    """The view and the feature of "view:feature"."""
    view, _, feature = reference.partition(":")
    return view, feature


def select(catalog: Catalog, features: Any) -> Selection:
    """What `features` means: a service, a view, "view:feature", "view:*", "service@2", or a list of these.

    Raises NotFound, with near names, for what is not there.
    """
    pairs: dict[tuple[str, str], None] = {}
    cache = _Cache(catalog)
    given = list(features) if isinstance(features, (list, tuple, set)) else [features]
    if not given:
        raise SpecError("no features were asked for; name some, like ['spend:amount']")
    for one in given:
        for pair in _expand(cache, one):
            pairs[pair] = None
    for view, feature in pairs:
        known = cache.find(view).features
        if feature not in known:
            raise NotFound(f"feature of {view!r}", feature, known)
    for name in list(cache.on_demand):
        for source in cache.on_demand[name].sources:
            cache.find(split_reference(source)[0])
    return Selection(tuple(pairs), dict(cache.views), dict(cache.on_demand))


def selection_of(
    pairs: Sequence[tuple[str, str]], views: Mapping[str, FeatureView], on_demand: Mapping[str, OnDemandView]
) -> Selection:
    """A selection from definitions at hand, as a training record keeps them."""
    return Selection(tuple(pairs), dict(views), dict(on_demand))


class _Cache:
    """Definitions as they are found, one look into the catalog each."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.views: dict[str, FeatureView] = {}
        self.on_demand: dict[str, OnDemandView] = {}

    def find(self, name: str) -> FeatureView | OnDemandView:
        if name in self.views:
            return self.views[name]
        if name in self.on_demand:
            return self.on_demand[name]
        try:
            return self.views.setdefault(name, self.catalog.view(name))
        except NotFound:
            try:
                return self.on_demand.setdefault(name, self.catalog.on_demand(name))
            except NotFound:
                known = [one.name for kind in ("view", "on_demand") for one in self.catalog.all(kind)]
                raise NotFound("view", name, known) from None


def _expand(cache: _Cache, one: Any) -> list[tuple[str, str]]:
    if isinstance(one, (FeatureView, OnDemandView)):
        one = one.name
    if isinstance(one, FeatureService):
        return [pair for reference in one.features for pair in _expand(cache, reference)]
    if not isinstance(one, str):
        raise SpecError(f"{one!r} is not a feature: write 'view:feature', or give a view or a service")
    view, colon, feature = one.partition(":")
    if colon and feature != "*":
        return [(view, feature)]
    if not colon:
        try:
            return _expand(cache, cache.catalog.service(one))
        except NotFound as exc:
            if "@" in one:
                raise
            services = exc.near
        try:
            return [(view, name) for name in cache.find(view).features]
        except NotFound as exc:
            raise NotFound("view or service", one, [*exc.near, *services]) from None
    return [(view, name) for name in cache.find(view).features]
