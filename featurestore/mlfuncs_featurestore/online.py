"""The online store: the latest values of entities, read in milliseconds from Redis.

Owns: `get_online_features` and OnlineStore. `redis_store` does the reading and writing, `online_plan` the working out,
`online_result` the decoding; rows get there by `push`, `materialize` and `stream`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import Unavailable
from mlfuncs_featurestore.definitions import FeatureService, FeatureView, OnDemandView
from mlfuncs_featurestore.online_plan import OnlinePlan, ViewRead
from mlfuncs_featurestore.online_result import OnlineFeatures
from mlfuncs_featurestore.references import select
from mlfuncs_featurestore.rows import moment_us

if TYPE_CHECKING:
    import datetime

    import pyarrow as pa

    from mlfuncs_featurestore.redis_store import RedisOnlineStore
    from mlfuncs_featurestore.store import FeatureStore

PLAN_S = 5.0  # a definition that another process changed is seen within this time


def get_online_features(
    store: FeatureStore,
    features: str | Sequence[Any],
    entities: Any,
    *,
    full_feature_names: bool = False,
    now: datetime.datetime | None = None,
    fallback: Mapping[str, Any] | None = None,
) -> OnlineFeatures:
    """The features of `entities` as of now, one row per entity in the order given, duplicates kept.

    `features` are references, views or services as for `get_historical_features`, and the columns are named by the same
    rule; `entities` are columns of keys ({"user_id": [1, 2]}, a table) or rows of them, with the request columns of
    on-demand features beside. Fields are as of the newest row, aggregates as of `now` (the clock). Raises NotFound for
    an unknown feature or missing key column, InvalidInput for a bad key, Unavailable when Redis does not answer;
    `fallback` ({feature column: value}) is returned in that case instead, marked `fell_back`.
    """
    online = store.online
    plan = online.plan(features, full_feature_names)
    columns = plan.columns(entities)
    keys = plan.keys(columns)
    at_us = time.time_ns() // 1000 if now is None else moment_us("now", now)
    try:
        rows = online.rows.read(keys)
    except Unavailable:
        if fallback is None:
            raise
        rows = [None] * len(keys)
        return OnlineFeatures(store, plan, columns, rows, at_us, fallback)
    return OnlineFeatures(store, plan, columns, rows, at_us)


class OnlineStore:
    """One project's online rows in Redis. `client` is the redis-py client, `address` where it is (no password)."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._plans: dict[Any, tuple[OnlinePlan, float]] = {}
        self._earlier: dict[tuple[str, str], tuple[list[Any], float]] = {}
        self._code: dict[str, Callable[..., Any]] = {}

    @cached_property
    def rows(self) -> RedisOnlineStore:
        """Packed rows by Redis key: the adapter that reads and writes them."""
        from mlfuncs_featurestore.redis_client import RedisLink
        from mlfuncs_featurestore.redis_store import RedisOnlineStore

        return RedisOnlineStore(RedisLink(self._store.settings))

    @property
    def client(self) -> Any:
        """The redis-py client (redis.Redis or redis.RedisCluster)."""
        return self.rows.link.client

    @property
    def address(self) -> str:
        """Where Redis is, without user and password."""
        return self.rows.link.address

    def plan(self, features: str | Sequence[Any], full_feature_names: bool = False) -> OnlinePlan:
        """What `features` means; kept for PLAN_S seconds. Raises NotFound for what is not there."""
        try:
            wanted = features if isinstance(features, str) else tuple(features)
            key = (wanted, full_feature_names)
            plan, until = self._plans[key]
            if time.monotonic() < until:
                return plan
        except (KeyError, TypeError):
            key = (tuple(_spelled(features)), full_feature_names)
        selection = select(self._store.catalog, features if isinstance(features, str) else list(features))
        plan = OnlinePlan(
            selection,
            {name: self.read_of(selection.views[name], wanted) for name, wanted in selection.stored.items()},
            full_feature_names,
        )
        if len(self._plans) > 1000:
            self._plans.clear()
        self._plans[key] = (plan, time.monotonic() + PLAN_S)
        return plan

    def read_of(self, view: FeatureView, features: Sequence[str]) -> ViewRead:
        """How rows of the view are found and decoded. Raises SpecError for a view that is not online."""
        key, now = (view.name, view.digest), time.monotonic()
        if key not in self._earlier or self._earlier[key][1] < now:
            self._earlier[key] = (self._store.catalog.earlier_fields(view.name), now + PLAN_S)
        return ViewRead(self._store.settings.project, view, features, self._earlier[key][0])

    def write(
        self, view: FeatureView, rows: pa.Table, now_us: int | None = None, left_out_us: int | None = None
    ) -> int:
        """Write conformed rows with their `__ingest` numbers, each entity's newest winning; how many were stored."""
        from mlfuncs_featurestore.online_write import write_rows

        return write_rows(self, view, rows, time.time_ns() // 1000 if now_us is None else now_us, left_out_us)

    def delete(self, view: str, entities: Mapping[str, Sequence[Any]]) -> int:
        """Remove the online rows of `entities` (columns of keys); history stays. How many entities were named."""
        read = self.read_of(self._store.catalog.view(view), ())
        from mlfuncs_featurestore.online_plan import encode_entities

        keys = read.keys.of(encode_entities(entities, read.key_types))
        self.rows.delete(keys)
        return len(keys)

    def code(self, view: OnDemandView) -> Callable[..., Any]:
        """The function of an on-demand view, loaded once."""
        if view.function_bundle not in self._code or not view.function_bundle:
            self._code[view.function_bundle] = self._store.catalog.code(view)
        return self._code[view.function_bundle]

    def forget_plans(self) -> None:
        """Look definitions up again at the next read: they were just changed."""
        self._plans.clear()
        self._earlier.clear()

    def close(self) -> None:
        """Close the connections; they open again when needed."""
        if "rows" in self.__dict__:
            self.rows.link.close()


def _spelled(features: Any) -> list[str]:
    """The features as text, to remember their plan by."""
    given = [features] if isinstance(features, (str, FeatureView, OnDemandView, FeatureService)) else list(features)
    spelled: list[str] = []
    for one in given:
        spelled += list(one.features) if isinstance(one, FeatureService) else [getattr(one, "name", str(one))]
    return spelled
