"""What a list of features means online, worked out once: which keys to read and how their bytes become columns.

Owns: OnlinePlan and ViewRead, made from a `references.Selection`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mlfuncs.errors import InvalidInput, SpecError
from mlfuncs_featurestore.definitions import FeatureView, OnDemandView
from mlfuncs_featurestore.keys import INT64_MAX, INT64_MIN, encode_keys
from mlfuncs_featurestore.redis_keys import ViewKeys
from mlfuncs_featurestore.references import Selection
from mlfuncs_featurestore.row_columns import _NUMPY
from mlfuncs_featurestore.rows import HEADER, PRESENT, RowCodec

LATEST, EVENTS = "r", "e"


def form_of(view: FeatureView) -> str:
    """How the view is stored online: the latest row of an entity, or its events (aggregations, or an event_id)."""
    return EVENTS if view.aggregations or view.event_id else LATEST


class ViewRead:
    """How one view's rows are found and decoded."""

    def __init__(
        self, project: str, view: FeatureView, features: Sequence[str], earlier: Sequence[Mapping[str, Any]]
    ) -> None:
        if not view.online:
            raise SpecError(f"view {view.name!r} is not online; apply it with online=True and materialize it")
        self.view, self.features, self.form = view, tuple(features), form_of(view)
        self.key_types = tuple(view.keys.items())
        self.keys = ViewKeys(project, view.name, self.form)
        self.codec = RowCodec(view.fields, earlier)
        self.matrix = Matrix.of(self.codec, self.features) if self.form == LATEST else None


@dataclass(frozen=True)
class Matrix:
    """Features of one fixed-width number type that lie side by side: rows of them are read as one array.

    `index` puts the fields in the order asked for, None when they lie in it; `tag` is the bytes from the flags through
    the states of a row that is not deleted and has every field.
    """

    layout: bytes
    size: int
    offset: int
    count: int
    dtype: np.dtype
    index: np.ndarray | None
    tag: bytes

    @classmethod
    def of(cls, codec: RowCodec, features: Sequence[str]) -> Matrix | None:
        """The matrix of `features`, or None when they are of several types or of no fixed number type."""
        slots = [codec.slots[name] for name in features]
        kinds = {slot.type.kind for slot in slots}
        if len(kinds) != 1 or not (kinds <= set(_NUMPY)) or kinds & {"timestamp", "date"}:
            return None
        dtype = np.dtype(_NUMPY[kinds.pop()])
        first = min(slot.position for slot in slots)
        last = max(slot.position for slot in slots) + dtype.itemsize
        between = [slot for slot in codec.slots.values() if first <= slot.position < last]
        if any(slot.width != dtype.itemsize for slot in between):
            return None
        places = np.array([(slot.position - first) // dtype.itemsize for slot in slots])
        count = (last - first) // dtype.itemsize
        in_order = len(places) == count and bool((places == np.arange(count)).all())
        states = bytearray((len(codec.fields) + 3) // 4)
        for slot in codec.slots.values():
            states[slot.index // 4] |= PRESENT << (2 * (slot.index % 4))
        layout = codec.layout.to_bytes(4, "little")
        return cls(layout, codec.fixed_size, first, count, dtype, None if in_order else places, b"\0" + bytes(states))

    @cached_property
    def rows(self) -> np.dtype:
        """A row as a numpy record."""
        return np.dtype(
            {
                "names": ["layout", "event_us", "tag", "values"],
                "formats": ["<u4", "<i8", ("u1", (len(self.tag),)), (self.dtype, (self.count,))],
                "offsets": [0, 4, HEADER.size - 1, self.offset],
                "itemsize": self.size,
            }
        )

    def read(self, rows: Sequence[bytes | None], oldest_us: int | None) -> np.ndarray | None:
        """The values, shape (rows, features); None unless every row is whole and no older than `oldest_us`."""
        if len(rows) == 1:
            values = self._read_one(rows[0], oldest_us)
        else:
            values = self._read_many(rows, oldest_us)
        return values if values is None or self.index is None else values[:, self.index]

    def _read_one(self, row: bytes | None, oldest_us: int | None) -> np.ndarray | None:
        tag_at = HEADER.size - 1
        if row is None or row[:4] != self.layout or row[tag_at : tag_at + len(self.tag)] != self.tag:
            return None
        if oldest_us is not None and int.from_bytes(row[4:12], "little", signed=True) < oldest_us:
            return None
        return np.frombuffer(row, self.dtype, self.count, self.offset).reshape(1, self.count)

    def _read_many(self, rows: Sequence[bytes | None], oldest_us: int | None) -> np.ndarray | None:
        try:
            joined = b"".join(rows)  # type: ignore[arg-type]
        except TypeError:  # a row is not there
            return None
        if len(joined) != self.size * len(rows):
            return None
        table = np.frombuffer(joined, self.rows)
        whole = (table["layout"] == int.from_bytes(self.layout, "little")).all()
        whole = whole and (table["tag"] == np.frombuffer(self.tag, np.uint8)).all()
        if not whole or (oldest_us is not None and (table["event_us"] < oldest_us).any()):
            return None
        return np.ascontiguousarray(table["values"])


class OnlinePlan:
    """A resolved list of features: the views to read, the names of the results."""

    def __init__(self, selection: Selection, reads: Mapping[str, ViewRead], full_feature_names: bool) -> None:
        self.selection, self.reads = selection, dict(reads)
        self.key_names = list(dict.fromkeys(key for read in reads.values() for key, _ in read.key_types))
        self.on_demand: dict[str, OnDemandView] = {
            name: selection.on_demand[name]
            for name in dict.fromkeys(view for view, _ in selection.wanted if view in selection.on_demand)
        }
        self.request = {name: kind for view in self.on_demand.values() for name, kind in view.request.items()}
        self.names = selection.names(full_feature_names, [*self.key_names, *self.request])
        only = next(iter(self.reads.values())) if len(self.reads) == 1 and not self.on_demand else None
        self.only = only if only is not None and only.matrix is not None else None

    def columns(self, entities: Any) -> dict[str, Any]:
        """`entities` (columns of keys and request data, or rows of them) as equally long columns.

        Raises NotFound for a column that is needed and not there, InvalidInput for columns of different lengths.
        """
        if isinstance(entities, Mapping):
            columns = dict(entities)
        elif hasattr(entities, "columns"):  # a pandas, polars or Arrow table
            from mlfuncs_featurestore.tables import as_table

            columns = as_table(entities).to_pydict()
        elif isinstance(entities, (str, bytes)) or not isinstance(entities, Iterable):
            raise InvalidInput(
                f"entities must be columns of keys, like {self._example}, or rows of them, not {entities!r}"
            )
        else:
            entities = list(entities)
            odd = [row for row in entities if not isinstance(row, Mapping)]
            if odd:
                raise InvalidInput(
                    f"entities: {odd[0]!r} is not a row of keys; give columns of them, like {self._example}"
                )
            names = dict.fromkeys(name for row in entities for name in row)
            columns = {name: [row.get(name) for row in entities] for name in names}
        for name in (*self.key_names, *self.request):
            if name not in columns:
                what = "entity key" if name in self.key_names else "request column"
                given = ", ".join(map(repr, columns)) or "nothing"
                raise InvalidInput(
                    f"{what} {name!r} is missing: {given} was given; give a list of values for {name!r}",
                    [{"field": name, "message": "is missing"}],
                )
            if isinstance(columns[name], (str, bytes)) or not hasattr(columns[name], "__len__"):
                raise InvalidInput(
                    f"{name!r} must be a list of values, not {columns[name]!r}: write {{{name!r}: [...]}}"
                )
        if len(columns) > 1 and len({len(column) for column in columns.values()}) > 1:
            lengths = ", ".join(f"{name}: {len(column)}" for name, column in columns.items())
            raise InvalidInput(f"the columns of entities differ in length ({lengths})")
        return columns

    @property
    def _example(self) -> str:
        return "{" + ", ".join(f"{name!r}: [...]" for name in self.key_names) + "}"

    def keys(self, columns: Mapping[str, Any]) -> list[bytes]:
        """The Redis keys to read: those of the first view, then the second's, ... Raises InvalidInput for a bad key."""
        if len(self.reads) == 1:
            read = next(iter(self.reads.values()))
            return read.keys.of(encode_entities(columns, read.key_types))
        encoded: dict[tuple[tuple[str, str], ...], list[bytes]] = {}
        keys: list[bytes] = []
        for read in self.reads.values():
            if read.key_types not in encoded:
                encoded[read.key_types] = encode_entities(columns, read.key_types)
            keys += read.keys.of(encoded[read.key_types])
        return keys


def encode_entities(columns: Mapping[str, Any], key_types: tuple[tuple[str, str], ...]) -> list[bytes]:
    """The encoded entity keys of columns of Python values or numpy arrays."""
    if len(key_types) == 1:
        name, kind = key_types[0]
        values = columns[name]
        values = values.tolist() if hasattr(values, "tolist") else values
        if kind == "int64" and set(map(type, values)) == {int} and INT64_MIN <= min(values) <= max(values) <= INT64_MAX:
            return [b"i%d" % value for value in values]
        return encode_keys({name: values}, {name: kind})
    return encode_keys({name: columns[name] for name, _ in key_types}, dict(key_types))
