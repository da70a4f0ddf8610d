"""Anything tabular to Arrow, and Arrow columns to the feature store's types.

Owns: reading what a user hands in (pandas, polars, Arrow, DuckDB, rows, Parquet and Delta paths, SQL, iterators) and
the strict cast to feature types: no number becomes text, no text a number, no NaN a null, no digit is lost.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs.errors import InvalidInput, NotFound, StorageError
from mlfuncs_featurestore.python_values import REFUSALS, python_column
from mlfuncs_featurestore.ranges import beyond_int64, check_range, exact_decimals
from mlfuncs_featurestore.types import FLOATS, INTEGERS, FeatureType, parse_type

BATCH_ROWS = 1_000_000
_SQL = re.compile(r"\s*(select|with|from)\s", re.IGNORECASE)
_UTC = parse_type("timestamp").arrow
_SAID: set[str] = set()
_OTHER_FILES = (".csv", ".tsv", ".csv.gz", ".json", ".jsonl", ".ndjson")


def read_tables(source: Any, batch_rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
    """`source` as Arrow tables of at most `batch_rows` rows; read lazily where the source allows.

    Raises InvalidInput for something that is no table, NotFound for a path that is not there.
    """
    if isinstance(source, (str, Path)):
        yield from _read_text(str(source), batch_rows)
    elif isinstance(source, pa.RecordBatchReader):
        for batch in source:
            yield from _slices(pa.Table.from_batches([batch]), batch_rows)
    elif (table := _whole_table(source)) is not None:
        yield from _slices(table, batch_rows)
    elif isinstance(source, Iterable):
        for part in source:
            yield from read_tables(part, batch_rows)
    else:
        raise InvalidInput(
            f"{type(source).__name__} is not a table: give a pandas, polars or Arrow table, a DuckDB relation, rows as "
            "dicts, a Parquet or Delta path, SQL, or an iterator of tables"
        )


def as_table(source: Any) -> pa.Table:
    """`source` as one Arrow table."""
    tables = list(read_tables(source))
    if not tables:
        raise InvalidInput("no rows were given, so not even the columns are known")
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="default")


def _whole_table(source: Any) -> pa.Table | None:
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, pa.RecordBatch):
        return pa.Table.from_batches([source])
    module = type(source).__module__.split(".")[0]
    if module == "pandas" and hasattr(source, "columns"):
        return from_pandas(source)
    if module == "polars" and hasattr(source, "collect"):
        source = source.collect()
    if module in ("duckdb", "_duckdb") and hasattr(source, "to_arrow_table"):
        return source.to_arrow_table()
    if hasattr(source, "__arrow_c_stream__"):
        return pa.table(source)
    if isinstance(source, Mapping):
        for name, column in source.items():
            if isinstance(column, (str, bytes)) or not isinstance(column, Iterable):
                raise InvalidInput(
                    f"column {name!r} must be a list of values, not {column!r}: write {{{name!r}: [...]}}"
                )
        return _from_columns({str(name): list(column) for name, column in source.items()})
    if isinstance(source, Sequence) and source and all(isinstance(row, Mapping) for row in source):
        names = dict.fromkeys(name for row in source for name in row)
        return _from_columns({str(name): [row.get(name) for row in source] for name in names})
    return None


def _from_columns(columns: Mapping[str, list[Any]]) -> pa.Table:
    arrays = {}
    for name, values in columns.items():
        plain = [str(value) if type(value).__name__ == "UUID" else value for value in values]
        arrays[name] = python_column(name, plain)
    return pa.table(arrays)


def from_pandas(frame: Any) -> pa.Table:
    """A DataFrame's columns (its index is left out). NaN in a numpy float column stays NaN; None and NA are null."""
    arrays = {}
    for name in frame.columns:
        series = frame[name]
        if getattr(series, "ndim", 1) != 1:
            raise InvalidInput(f"the table has two columns named {name!r}")
        arrays[str(name)] = _from_series(str(name), series)
    return pa.table(arrays)


def _from_series(name: str, series: Any) -> Any:
    import numpy as np

    values = series
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "fiub":
        return pa.array(series.to_numpy(), from_pandas=False)
    if series.dtype == object:
        values = [str(value) if type(value).__name__ == "UUID" else value for value in series]
        try:
            return pa.array(values, from_pandas=False)
        except REFUSALS:
            pass  # text with NaN for missing is pandas' own convention: read NaN as null there
    return python_column(name, values, from_pandas=True)


def _slices(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, max(table.num_rows, 1), rows):
        yield table.slice(start, rows)


def _read_text(text: str, batch_rows: int) -> Iterator[pa.Table]:
    if _SQL.match(text):
        yield from _read_sql(text, batch_rows)
        return
    dataset = open_dataset(text)
    for batch in dataset.to_batches(batch_size=batch_rows, batch_readahead=1, fragment_readahead=1):
        yield pa.Table.from_batches([batch])
    if dataset.count_rows() == 0:
        yield dataset.schema.empty_table()


def _read_sql(query: str, batch_rows: int) -> Iterator[pa.Table]:
    from mlfuncs.errors import MissingExtra

    try:
        import duckdb
    except ImportError as exc:
        raise MissingExtra("SQL as a table source (duckdb)", "featurestore") from exc
    try:
        reader = duckdb.connect().sql(query).to_arrow_reader(batch_rows)
    except duckdb.Error as exc:
        raise InvalidInput(f"the SQL does not run: {exc}") from exc
    yield pa.Table.from_batches([], reader.schema)
    for batch in reader:
        yield pa.Table.from_batches([batch])


def open_dataset(location: str) -> Any:
    """An Arrow dataset over "delta:<url>", a Delta directory, a Parquet file, directory or glob, by fsspec URL.

    Raises NotFound when nothing is there, StorageError when it cannot be read.
    """
    import fsspec
    import pyarrow.dataset as ds
    from deltalake import DeltaTable

    if location.lower().endswith(_OTHER_FILES):
        read = "read_json" if "json" in location else "read_csv"
        raise InvalidInput(
            f"{location!r} is no Parquet file or Delta table; write SQL: \"SELECT * FROM {read}('{location}')\""
        )
    kind, _, rest = location.partition(":")
    location = rest if kind in ("delta", "parquet") else location
    try:
        if kind == "delta" or (not _is_parquet(kind, location) and DeltaTable.is_deltatable(location)):
            return DeltaTable(location).to_pyarrow_dataset()
        filesystem, path = fsspec.core.url_to_fs(location)
        paths = sorted(filesystem.glob(path)) if "*" in path else [path]
        if not paths or not all(filesystem.exists(one) for one in paths):
            raise NotFound("table", location, hint="(no file is there)")
        return ds.dataset(paths[0] if len(paths) == 1 else paths, filesystem=filesystem, format="parquet")
    except (OSError, pa.ArrowInvalid, ValueError) as exc:
        raise StorageError(f"{location!r} cannot be read as Parquet or Delta: {exc}") from exc


def _is_parquet(kind: str, location: str) -> bool:
    return kind == "parquet" or "*" in location or location.endswith((".parquet", ".pq"))


def cast_column(name: str, column: pa.ChunkedArray | pa.Array, kind: FeatureType, stored: bool = False) -> pa.Array:
    """The column as one array of `kind` (of its form on disk when `stored`). Raises InvalidInput, saying why not."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    target = kind.stored_arrow if stored else kind.arrow
    if array.type == target and kind.kind != "vector":
        return array
    if pa.types.is_null(array.type) or not len(array):
        return pa.nulls(len(array), target)
    if kind.kind == "timestamp":
        return to_utc(name, array)
    if not _may_become(array.type, kind):
        if (wide := beyond_int64(array)) is not None:
            raise _misfit(name, f"holds {wide}, which is outside int64, and the field is {kind}", kind, array.type)
        raise _misfit(name, f"is {array.type} and the field is {kind}", kind, array.type)
    try:
        if kind.kind == "vector":
            _check_vector(name, array, kind)
        check_range(array, kind)
        between = exact_decimals(array.type, kind)
        is_exact = kind.kind != "float32" or pa.types.is_integer(array.type)  # floats are rounded, integers never
        return (array if between == array.type else array.cast(between)).cast(target, safe=is_exact)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as exc:
        raise _misfit(name, f"does not fit {kind}: {exc}", kind, array.type) from exc


def to_utc(name: str, array: pa.Array) -> pa.Array:
    """Times as microseconds UTC: other zones converted, naive ones taken as UTC (said once), finer ones cut down.

    Raises InvalidInput for what is no time, and for times so far off that microseconds cannot count them.
    """
    if not len(array):
        return pa.array([], _UTC)
    if not (pa.types.is_timestamp(array.type) or pa.types.is_date(array.type)):
        advice = "convert text with pandas.to_datetime and numbers with unit='s'"
        raise InvalidInput(f"column {name!r} is {array.type}, not a time; {advice}", [_field(name, "is not a time")])
    if pa.types.is_timestamp(array.type) and array.type.tz is None and len(array) > array.null_count:
        say_once(f"times in {name!r} have no zone and are taken as UTC")
    if array.type == pa.timestamp("ns", getattr(array.type, "tz", None)):
        nanoseconds = array.cast(pa.int64())
        remainder = pc.subtract(nanoseconds, pc.multiply(pc.divide(nanoseconds, 1000), 1000))
        down = pc.if_else(pc.less(remainder, 0), 1, 0)  # Arrow divides towards zero: times before 1970 go one down
        return pc.subtract(pc.divide(nanoseconds, 1000), down).cast(_UTC)
    try:
        if pa.types.is_date(array.type):
            return array.cast(pa.timestamp("us")).cast(_UTC)
        return array.cast(pa.timestamp(array.type.unit, "UTC")).cast(_UTC)
    except pa.ArrowInvalid as exc:
        raise InvalidInput(
            f"column {name!r} has times beyond the years that microseconds can count ({exc}); is the unit right?",
            [_field(name, "is not a time that microseconds can count")],
        ) from exc


def say_once(message: str) -> None:
    """Warn with `message`, the first time only in this process."""
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, UserWarning, stacklevel=2)


def _may_become(have: pa.DataType, kind: FeatureType) -> bool:
    """Whether a column of Arrow type `have` is of the family of `kind`; the cast itself then checks each value."""
    t = pa.types
    if t.is_null(have):  # every value is null
        return True
    if kind.kind == "bool":
        return t.is_boolean(have)
    if kind.kind in INTEGERS:
        return t.is_integer(have) or t.is_floating(have)  # a float column of whole numbers: Arrow checks exactness
    if kind.kind in FLOATS:
        return t.is_floating(have) or t.is_integer(have)
    if kind.kind == "string":
        return t.is_string(have) or t.is_large_string(have) or t.is_string_view(have)
    if kind.kind == "bytes":
        return t.is_binary(have) or t.is_large_binary(have) or t.is_fixed_size_binary(have) or t.is_binary_view(have)
    if kind.kind == "date":
        return t.is_date(have)
    if kind.kind == "decimal":
        return t.is_decimal(have) or t.is_integer(have)
    if kind.kind in ("list", "vector") and kind.element is not None:
        lists = t.is_list(have) or t.is_large_list(have) or t.is_fixed_size_list(have)
        return lists and _may_become(have.value_type, kind.element)
    if kind.kind == "struct" and t.is_struct(have):
        members = dict(kind.members)
        return all(one.name in members and _may_become(one.type, members[one.name]) for one in have)
    return kind.kind == "timestamp" and t.is_timestamp(have)


def _check_vector(name: str, array: pa.Array, kind: FeatureType) -> None:
    lengths = pc.list_value_length(array)
    if pc.any(pc.not_equal(lengths, kind.size)).as_py():
        wrong = next(length for length in lengths.to_pylist() if length not in (None, kind.size))
        raise _misfit(name, f"holds a vector of {wrong} elements and the field is {kind}", kind, array.type)
    if pc.list_flatten(array).null_count:
        raise _misfit(name, f"holds a vector with a null in it and the field is {kind}", kind, array.type)


def _misfit(name: str, reason: str, kind: FeatureType, have: pa.DataType) -> InvalidInput:
    advice = ""
    if kind.kind in INTEGERS and pa.types.is_floating(have):
        advice = "; a column of whole numbers with nulls should be Int64 in pandas"
    elif kind.kind == "string" and (pa.types.is_integer(have) or pa.types.is_floating(have)):
        advice = "; text is never made of numbers here ('007' would become '7'): convert it yourself"
    return InvalidInput(f"column {name!r} {reason}{advice}", [_field(name, f"is not {kind}")])


def _field(name: str, message: str) -> dict[str, str]:
    return {"field": name, "message": message}
