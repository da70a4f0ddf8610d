"""Online features as they were read: decoded when asked for, as numpy, Arrow, pandas or dict.

Owns: OnlineFeatures. Absent, null, expired and zero stay four different things: `statuses` has PRESENT, NULL, NOT_FOUND
or EXPIRED for every cell, and only PRESENT cells have a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.ahead import due_rows
from mlfuncs_featurestore.online_plan import LATEST, OnlinePlan, ViewRead
from mlfuncs_featurestore.rows import ABSENT, PRESENT
from mlfuncs_featurestore.rows import NULL as NULL_STATE

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa

    from mlfuncs_featurestore.store import FeatureStore

STATUSES = ("PRESENT", "NULL", "NOT_FOUND", "EXPIRED")
_PRESENT, _NULL, _NOT_FOUND, _EXPIRED = range(4)
_EXACT = 2**53


class OnlineFeatures:
    """One row per entity asked for, in that order, duplicates kept.

    `names` are the feature columns, `entities` the columns that were given, `at_us` the moment of reading
    (microseconds UTC), `fell_back` whether Redis was away and the fallback values are here instead.
    """

    def __init__(
        self,
        store: FeatureStore,
        plan: OnlinePlan,
        entities: Mapping[str, Any],
        rows: list[bytes | None],
        at_us: int,
        fallback: Mapping[str, Any] | None = None,
    ) -> None:
        self.entities, self.at_us, self.fell_back = entities, at_us, fallback is not None
        self._store, self._plan, self._rows, self._fallback = store, plan, rows, fallback

    @property
    def names(self) -> list[str]:
        """The feature columns, in the order asked."""
        return [self._plan.names[pair] for pair in self._plan.selection.wanted]

    @property
    def references(self) -> dict[str, str]:
        """Of each feature column, the reference it was asked by ("view:feature")."""
        return {self._plan.names[pair]: ":".join(pair) for pair in self._plan.selection.wanted}

    @property
    def types(self) -> dict[str, str]:
        """The type of each feature column, as definitions spell it."""
        kinds = self._plan.selection.types()
        return {self._plan.names[pair]: str(kinds[pair]) for pair in self._plan.selection.wanted}

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return len(next(iter(self.entities.values()))) if self.entities else 0

    def to_numpy(self) -> np.ndarray:
        """The features as one array, shape (entities, features), of their common number type; missing floats are NaN.

        Raises InvalidInput when a feature is no number, or when a missing cell or an integer beyond 2**53 beside
        floats has no place in the array: take `to_arrow` then.
        """
        whole = self._whole
        return _as_matrix(self._columns) if whole is None else whole

    @cached_property
    def _whole(self) -> np.ndarray | None:
        """The features as one array when every cell is PRESENT and of one type; None when that takes decoding."""
        only = self._plan.only
        if only is None or only.matrix is None or self.fell_back:
            return None
        ttl = only.view.ttl_us
        return only.matrix.read(self._rows, None if ttl is None else self.at_us - ttl)

    def to_arrow(self) -> pa.Table:
        """The entity columns that were given, then the features with their exact types; not PRESENT is null."""
        import pyarrow as pa

        from mlfuncs_featurestore.tables import as_table

        given = {name: column for name, column in self.entities.items() if name not in self._columns}
        table = as_table(given) if given else pa.table({})
        for name, array in self._columns.items():
            table = table.append_column(name, array)
        return table

    def to_pandas(self) -> pandas.DataFrame:
        """As a frame, with the same types as `get_historical_features` gives."""
        import pandas as pd

        from mlfuncs_featurestore.pandas_columns import pandas_column

        index = pd.RangeIndex(self._size)
        frame = pd.DataFrame({name: self._given(name, index) for name in self.entities}, index=index)
        for name, array in self._columns.items():
            frame[name] = pandas_column(array, index)
        return frame

    def _given(self, name: str, index: Any) -> Any:
        """A column that was given, for a frame: as Arrow has its values, where it has them."""
        import pandas as pd

        from mlfuncs_featurestore.pandas_columns import pandas_column
        from mlfuncs_featurestore.tables import as_table, cast_column

        column = _listed(self.entities[name])
        try:
            array = as_table({name: column})[name]
        except InvalidInput:  # no key and no request column, but what the caller keeps beside them
            return pd.Series(column, index=index, dtype=object)
        kind = self._plan.request.get(name)
        return pandas_column(array.combine_chunks() if kind is None else cast_column(name, array, kind), index)

    def to_dict(self) -> dict[str, list[Any]]:
        """Each column as a list of Python values; not PRESENT is None."""
        given = {name: _listed(column) for name, column in self.entities.items()}
        return given | {name: array.to_pylist() for name, array in self._columns.items()}

    @property
    def statuses(self) -> dict[str, list[str]]:
        """PRESENT, NULL, NOT_FOUND or EXPIRED per feature and row."""
        return {name: [STATUSES[code] for code in codes] for name, codes in self._decoded[1].items()}

    def counts(self) -> dict[str, int]:
        """How many cells have each status; nothing is decoded for it when all are PRESENT and of one type."""
        if "_decoded" not in self.__dict__ and self._whole is not None:
            return {"PRESENT": self._whole.size}
        codes = list(self._decoded[1].values())
        found = np.bincount(np.concatenate(codes), minlength=len(STATUSES)).tolist() if codes else []
        return {status: count for status, count in zip(STATUSES, found, strict=False) if count}

    @property
    def event_us(self) -> dict[str, np.ndarray]:
        """Event time of the value per feature and row, microseconds UTC; 0 where there is none."""
        return self._decoded[2]

    @property
    def _columns(self) -> dict[str, pa.Array]:
        return self._decoded[0]

    @cached_property
    def _decoded(self) -> tuple[dict[str, pa.Array], dict[str, np.ndarray], dict[str, np.ndarray]]:
        if self._fallback is not None:
            return self._fall_back(self._fallback)
        arrays: dict[tuple[str, str], pa.Array] = {}
        codes: dict[tuple[str, str], np.ndarray] = {}
        times: dict[tuple[str, str], np.ndarray] = {}
        for place, (name, read) in enumerate(self._plan.reads.items()):
            rows: Sequence[bytes | None] = self._rows[place * self._size : (place + 1) * self._size]
            if read.view.event_id:
                rows = self._made_whole(read, rows)
            for feature, (array, code, event_us) in _decode(read, rows, self.at_us).items():
                arrays[name, feature], codes[name, feature], times[name, feature] = array, code, event_us
        self._add_on_demand(arrays, codes, times)
        names = self._plan.names
        wanted = self._plan.selection.wanted
        return (
            {names[pair]: arrays[pair] for pair in wanted},
            {names[pair]: codes[pair] for pair in wanted},
            {names[pair]: times[pair] for pair in wanted},
        )

    def _made_whole(self, read: ViewRead, rows: Sequence[bytes | None]) -> Sequence[bytes | None]:
        from mlfuncs_featurestore.online_plan import encode_entities
        from mlfuncs_featurestore.online_repair import made_whole

        keys = read.keys.of(encode_entities(self.entities, read.key_types))
        return made_whole(self._store, read, keys, rows, self.at_us)

    def _add_on_demand(self, arrays: dict[Any, Any], codes: dict[Any, Any], times: dict[Any, Any]) -> None:
        if not self._plan.on_demand:
            return
        from mlfuncs_featurestore.derived import evaluate
        from mlfuncs_featurestore.references import split_reference
        from mlfuncs_featurestore.tables import as_table, cast_column

        for name, view in self._plan.on_demand.items():
            inputs = {feature: arrays[source, feature] for source, feature in map(split_reference, view.sources)}
            if view.request:
                given = as_table({column: _listed(self.entities[column]) for column in view.request})
                inputs |= {column: cast_column(column, given[column], kind) for column, kind in view.request.items()}
            for feature, array in evaluate(view, self._store.online.code(view), inputs).items():
                missing = array.is_null().to_numpy(zero_copy_only=False)
                arrays[name, feature] = array
                codes[name, feature] = np.where(missing, _NULL, _PRESENT).astype(np.uint8)
                times[name, feature] = np.full(len(array), self.at_us, np.int64)

    def _fall_back(self, fallback: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        import pyarrow as pa

        from mlfuncs_featurestore.tables import cast_column

        arrays, size = {}, self._size
        for pair, kind in self._plan.selection.types().items():
            name = self._plan.names[pair]
            value = fallback.get(name, fallback.get(":".join(pair)))
            given = pa.array([value] * size)
            arrays[name] = pa.nulls(size, kind.arrow) if value is None else cast_column(name, given, kind)
        codes = {name: np.full(size, _NOT_FOUND, np.uint8) for name in arrays}
        return arrays, codes, {name: np.zeros(size, np.int64) for name in arrays}

    def __repr__(self) -> str:
        return f"<online features {', '.join(self.names)} of {self._size} entities>"


def _decode(
    read: ViewRead, rows: Sequence[bytes | None], at_us: int
) -> dict[str, tuple[pa.Array, np.ndarray, np.ndarray]]:
    """Per feature of the view: values, status codes, event times."""
    from mlfuncs_featurestore.online_rows import to_arrow

    if read.form != LATEST:
        from mlfuncs_featurestore.stream_windows import EntityEvents

        found = EntityEvents(read.view, read.codec, rows).evaluate(read.features, at_us)
        event_us = np.where(found.status == _NOT_FOUND, 0, found.event_us)
        return {name: (array, _with_nulls(found.status, array), event_us) for name, array in found.columns.items()}
    columns = read.codec.decode_columns(due_rows(rows, at_us), read.features)
    expired = np.zeros(len(rows), bool)
    if read.view.ttl_us is not None:
        expired = columns.found & (columns.event_us < at_us - read.view.ttl_us)
    event_us = np.where(columns.found, columns.event_us, 0)
    result = {}
    for name in read.features:
        state = np.where(expired, ABSENT, columns.states[name])
        array = to_arrow(read.view.fields[name], columns.values[name], state)
        # a field that the row was written without (the field is newer than the row) reads as offline: null
        code = np.where(state == PRESENT, _PRESENT, np.where(state == NULL_STATE, _NULL, _NOT_FOUND))
        code = np.where(columns.found & (state == ABSENT), _NULL, code)
        result[name] = (array, np.where(expired, _EXPIRED, code).astype(np.uint8), event_us)
    return result


def _with_nulls(status: np.ndarray, array: pa.Array) -> np.ndarray:
    if not array.null_count:
        return status
    missing = array.is_null().to_numpy(zero_copy_only=False)
    return np.where((status == _PRESENT) & missing, _NULL, status).astype(np.uint8)


def _listed(column: Any) -> list[Any]:
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _as_matrix(columns: Mapping[str, pa.Array]) -> np.ndarray:
    import pyarrow as pa

    for name, array in columns.items():
        kind = array.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise InvalidInput(f"{name!r} is {kind}, which a number array cannot hold; take to_arrow() or to_dict()")
    dtype = np.result_type(*{array.type.to_pandas_dtype() for array in columns.values()})
    result = np.empty((len(next(iter(columns.values()))), len(columns)), dtype)
    for place, (name, array) in enumerate(columns.items()):
        _fill(name, array, result[:, place])
    return result


def _fill(name: str, array: pa.Array, column: np.ndarray) -> None:
    """Put the numbers of `array` into a column of the common type. Raises InvalidInput for what it cannot hold."""
    import pyarrow as pa

    is_float = column.dtype.kind == "f"
    if not array.null_count:
        values = array.to_numpy(zero_copy_only=False)
    elif not is_float:
        raise InvalidInput(
            f"{name!r} has missing values, which {column.dtype} cannot hold; take to_arrow() or to_pandas()"
        )
    else:
        values = array.fill_null(False if pa.types.is_boolean(array.type) else 0).to_numpy(zero_copy_only=False)
    if is_float and values.dtype == np.int64 and len(values) and not -_EXACT <= values.min() <= values.max() <= _EXACT:
        raise InvalidInput(f"{name!r} holds integers beyond 2**53, which {column.dtype} would round; take to_arrow()")
    column[:] = values
    if array.null_count:
        column[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
