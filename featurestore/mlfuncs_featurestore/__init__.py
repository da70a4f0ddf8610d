"""One definition of features: offline on Delta Lake, online on Redis, joined as of any time.

Names below are imported when first used; defining features loads no table library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_NAMES = {
    "Aggregation": "declarations",
    "Entity": "views",
    "Expectation": "declarations",
    "FeatureService": "definitions",
    "FeatureStore": "store",
    "FeatureView": "views",
    "OnDemandView": "definitions",
    "feature_view": "views",
    "on_demand": "definitions",
}

__all__ = sorted(_NAMES)

if TYPE_CHECKING:
    from mlfuncs_featurestore.declarations import Aggregation as Aggregation
    from mlfuncs_featurestore.declarations import Expectation as Expectation
    from mlfuncs_featurestore.definitions import FeatureService as FeatureService
    from mlfuncs_featurestore.definitions import OnDemandView as OnDemandView
    from mlfuncs_featurestore.definitions import on_demand as on_demand
    from mlfuncs_featurestore.store import FeatureStore as FeatureStore
    from mlfuncs_featurestore.views import Entity as Entity
    from mlfuncs_featurestore.views import FeatureView as FeatureView
    from mlfuncs_featurestore.views import feature_view as feature_view


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'mlfuncs_featurestore' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"mlfuncs_featurestore.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
