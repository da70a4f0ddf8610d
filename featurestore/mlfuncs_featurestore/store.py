"""The feature store's facade: each method opens the part that does the work.

Owns: FeatureStore. Offline and definition methods lead to `catalog`, `ingest`, `offline`, `history`, `training`;
online ones to `online`, `push` and `materialize`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from mlfuncs.settings import Settings, read_settings

if TYPE_CHECKING:
    from mlfuncs.display import Table
    from mlfuncs_featurestore.catalog import Catalog
    from mlfuncs_featurestore.definitions import Definition
    from mlfuncs_featurestore.history import HistoricalFeatures
    from mlfuncs_featurestore.ingest import IngestReport
    from mlfuncs_featurestore.materialize import MaterializeReport
    from mlfuncs_featurestore.offline import OfflineStore
    from mlfuncs_featurestore.online import OnlineStore
    from mlfuncs_featurestore.online_result import OnlineFeatures
    from mlfuncs_featurestore.plan import Plan
    from mlfuncs_featurestore.push import PushReport
    from mlfuncs_featurestore.training import TrainingRecord


class FeatureStore:
    """One project's features: definitions in the registry, history in Delta Lake, latest values in Redis.

    It needs no closing; `close`, or a `with` block, commits what was pushed at once and ends the connections.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = read_settings() if settings is None else settings

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def catalog(self) -> Catalog:
        """The project's definitions: get, list, search, lineage."""
        from mlfuncs_featurestore.catalog import Catalog

        return Catalog(self.settings)

    @cached_property
    def offline(self) -> OfflineStore:
        """The Delta tables: versions, time travel, compaction, vacuum, statistics."""
        from mlfuncs_featurestore.offline import OfflineStore

        return OfflineStore(self.settings)

    @cached_property
    def online(self) -> OnlineStore:
        """The Redis side; `online.client` is the redis-py client."""
        from mlfuncs_featurestore.online import OnlineStore

        return OnlineStore(self)

    def apply(self, definitions: Definition | Iterable[Definition], *, dry_run: bool = False) -> Plan:
        """Record `definitions` and return the plan of what changed; applying the same again changes nothing.

        Raises Conflict, with nothing recorded, for a change that would corrupt what is stored: a narrowed type, other
        keys, a removed field that is not deprecated.
        """
        plan = self.catalog.apply(definitions, dry_run=dry_run)
        if "online" in self.__dict__:
            self.online.forget_plans()
        return plan

    def ingest(self, view: str, rows: Any = None, **options: Any) -> IngestReport:
        """Append rows to the view's offline table in one atomic commit; see `ingest.ingest` for the options.

        `rows` is a pandas, polars or Arrow table, an iterator of them, a DuckDB relation, a Parquet or Delta path, or
        None for the view's own source. Raises InvalidInput, with nothing written, when the rows do not fit.
        """
        from mlfuncs_featurestore.ingest import ingest

        return ingest(self, view, rows, **options)

    def get_historical_features(self, spine: Any, features: str | Sequence[Any], **options: Any) -> HistoricalFeatures:
        """The features as they were known at each spine row's time; see `history.get_historical_features`."""
        from mlfuncs_featurestore.history import get_historical_features
        from mlfuncs_featurestore.push import flush_waiting

        flush_waiting(self)
        return get_historical_features(self, spine, features, **options)

    def rebuild(self, record: TrainingRecord | Mapping[str, Any], spine: Any = None) -> HistoricalFeatures:
        """The training set that `record` describes, bit for bit, from the table versions it read."""
        from mlfuncs_featurestore.training import rebuild

        return rebuild(self, record, spine)

    def search(self, text: str = "", *, tag: str = "", owner: str = "") -> Table:
        """The features whose name, view, description, owner or tags contain `text`, as a table with statistics."""
        from mlfuncs_featurestore.finding import feature_table

        return feature_table(self, text, tag=tag, owner=owner)

    def push(self, view: str, rows: Any, **options: Any) -> PushReport:
        """Make rows readable online at once and durable offline, both or neither; see `push.push`."""
        from mlfuncs_featurestore.push import push

        return push(self, view, rows, **options)

    def flush(self, view: str | None = None) -> dict[str, int]:
        """Commit pushed rows that wait in this home's log to the offline tables; rows committed per view."""
        from mlfuncs_featurestore.push import flush

        return flush(self, view)

    def close(self) -> None:
        """Commit pushed rows that wait in this home's log, and close the connections to Redis."""
        from mlfuncs_featurestore.push import flush_waiting

        flush_waiting(self)
        if "online" in self.__dict__:
            self.online.close()

    def materialize(self, view: str | None = None, **options: Any) -> MaterializeReport:
        """Bring the online store up to the offline tables' last commit; see `materialize.materialize`."""
        from mlfuncs_featurestore.materialize import materialize

        return materialize(self, view, **options)

    def get_online_features(
        self,
        features: str | Sequence[Any],
        entities: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
        **options: Any,
    ) -> OnlineFeatures:
        """The latest values for `entities` (columns of keys, or rows of them); see `online.get_online_features`."""
        from mlfuncs_featurestore.online import get_online_features

        return get_online_features(self, features, entities, **options)
