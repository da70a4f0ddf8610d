"""Tables as Parquet: pandas with its index and dtypes, polars and pyarrow as themselves.

A pandas column of mixed Python objects has no Parquet type that gives the same objects back; such a table is refused
here and takes another format when it is written. Nothing is guessed when it is read.

Parquet names columns by text. Labels of another kind (0, a tuple) are kept beside the file as tagged JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, BinaryIO

from mlfuncs.codecs.tagged import NotEncodable
from mlfuncs.errors import ArtifactError

_MAX_COLUMNS = 500  # columns described in the metadata
# kinds of `pandas.api.types.infer_dtype` that Parquet gives back as the same Python objects
_SAFE_OBJECTS = {"string", "bytes", "date", "decimal", "empty"}


def library_of(cls: Any) -> str | None:
    """ "pandas", "series", "polars" or "pyarrow" for exactly their table classes; None for anything else."""
    pandas, polars, arrow = (sys.modules.get(name) for name in ("pandas", "polars", "pyarrow"))
    if pandas is not None and cls in (pandas.DataFrame, pandas.Series):
        return "pandas" if cls is pandas.DataFrame else "series"
    if polars is not None and cls is polars.DataFrame:
        return "polars"
    return "pyarrow" if arrow is not None and cls is arrow.Table else None


def is_table(value: Any) -> bool:
    """Whether `value` is a pandas DataFrame or Series, a polars DataFrame or a pyarrow Table (no subclass)."""
    return library_of(type(value)) is not None


def write(value: Any, sink: BinaryIO) -> dict[str, Any]:
    """Write a table as Parquet; rows, columns and schema come back. Raises NotEncodable when it would change."""
    import pyarrow
    import pyarrow.parquet

    library = library_of(type(value))
    metadata: dict[str, Any] = {"library": library}
    if library == "polars":
        table = value.to_arrow()
    elif library == "pyarrow":
        table = value
    else:
        table = _from_pandas(value, metadata)
    floats = [f.name for f in table.schema if pyarrow.types.is_floating(f.type)]
    dictionary = [f.name for f in table.schema if f.name not in floats]
    try:
        # measured on floats: decoding is 3x cheaper without a dictionary, and with snappy 1.4 to 9x cheaper than zstd
        pyarrow.parquet.write_table(table, sink, compression="snappy", use_dictionary=dictionary, version="2.6")
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as exc:
        raise NotEncodable(f"a table that Parquet cannot hold: {exc}") from exc
    metadata.update(rows=table.num_rows, columns=table.num_columns)
    metadata["schema"] = {f.name: str(f.type) for f in list(table.schema)[:_MAX_COLUMNS]}
    return metadata


def read(source: BinaryIO | Path, metadata: dict[str, Any], library: str | None = None) -> Any:
    """The table, of the library that wrote it or of `library`. Raises ArtifactError when it is not a table."""
    import pyarrow
    import pyarrow.parquet

    library = library or metadata.get("library") or "pyarrow"
    try:
        if isinstance(source, Path):
            table = pyarrow.parquet.ParquetFile(str(source), memory_map=True).read()
        else:
            table = pyarrow.parquet.ParquetFile(source).read()
    except (pyarrow.ArrowInvalid, OSError) as exc:
        raise ArtifactError(f"the table cannot be read: {exc}") from exc
    if library == "pyarrow":
        return table
    if library == "polars":
        import polars

        return polars.from_arrow(table)
    return _to_pandas(table, metadata, library)


def _from_pandas(value: Any, metadata: dict[str, Any]) -> Any:
    import pandas
    import pyarrow

    frame = value
    if isinstance(value, pandas.Series):
        metadata["name"] = _kept(value.name)
        frame = value.to_frame("value")
    if not frame.columns.is_unique:
        raise NotEncodable("a table with two columns of one name")
    _refuse_changing(frame)
    try:
        table = pyarrow.Table.from_pandas(_labelled_in_text(frame, metadata))
    except (pyarrow.ArrowException, TypeError, ValueError) as exc:
        raise NotEncodable(f"a table that Arrow cannot hold: {exc}") from exc
    metadata["freq"] = getattr(frame.index, "freqstr", None)
    metadata["objects"] = [i for i in range(frame.shape[1]) if frame.iloc[:, i].dtype == object]
    metadata["object_labels"] = [axis for axis in ("index", "columns") if getattr(frame, axis).dtype == object]
    return table


def _labelled_in_text(frame: Any, metadata: dict[str, Any]) -> Any:
    """`frame` with text for each label and name that is none; what they were goes into `metadata`.

    Raises NotEncodable for labels that have no tagged form, or that are the same as text (1 and "1").
    """
    import pandas

    labels = list(frame.columns)
    if frame.columns.dtype == object and not all(type(label) is str for label in labels):
        metadata["labels"] = _kept(labels)
        text = [str(label) for label in labels]
        if len(set(text)) < len(text):
            raise NotEncodable("a table with two columns whose names are the same as text")
        frame = frame.set_axis(pandas.Index(text, dtype=object, name=frame.columns.name), axis=1)
    for axis in ("index", "columns"):
        names = list(getattr(frame, axis).names)
        if any(name is not None and type(name) is not str for name in names):
            metadata[f"{axis}_names"] = _kept(names)
            frame = frame.rename_axis(**{axis: [None if name is None else str(name) for name in names]})
    return frame


def _kept(label: Any) -> str:
    """A label as tagged JSON. Raises NotEncodable, also for one of a class, which reading would have to import."""
    from mlfuncs.codecs import tagged

    text = tagged.dumps(label)
    if classes := tagged.classes_named(text):
        raise NotEncodable(f"a table with a label of {', '.join(sorted(classes))}")
    return text.decode()


def _refuse_changing(frame: Any) -> None:
    """Raise NotEncodable when a column or index of `frame` would come back as other objects or another dtype."""
    import pandas

    if frame.attrs:
        raise NotEncodable("a table with attrs")
    if frame.shape[1] == 0 and len(frame):
        raise NotEncodable("a table with rows and no columns")
    if frame.columns.nlevels > 1 or (frame.columns.dtype.kind not in "OiUT" and str(frame.columns.dtype) != "str"):
        raise NotEncodable(f"a table whose column names are {frame.columns.dtype}")
    columns = [frame.iloc[:, i] for i in range(frame.shape[1])]
    levels = [frame.index.get_level_values(i) for i in range(frame.index.nlevels)]
    for column in (*columns, *levels):
        if isinstance(column.dtype, pandas.SparseDtype):
            raise NotEncodable("a sparse column")
        if column.dtype != object:
            continue
        if len(levels) > 1 and any(column is level for level in levels):
            raise NotEncodable("an index of several levels that holds objects")
        found = pandas.api.types.infer_dtype(column, skipna=True)
        if found not in _SAFE_OBJECTS or any(item is not None for item in column[column.isna()]):
            raise NotEncodable(f"a column of {found} objects")


def _to_pandas(table: Any, metadata: dict[str, Any], library: str) -> Any:
    import pandas

    frame = _restore_labels(_restore_objects(table.to_pandas(), metadata), metadata)
    if metadata.get("freq") and isinstance(frame.index, pandas.DatetimeIndex):
        frame.index.freq = pandas.tseries.frequencies.to_offset(metadata["freq"])
    if library != "series":
        return frame
    if frame.shape[1] != 1:
        raise ArtifactError(f"a table of {frame.shape[1]} columns is not a Series; ask for a DataFrame")
    from mlfuncs.codecs import untagged

    series = frame.iloc[:, 0]
    return series.rename(untagged.loads(metadata["name"].encode()) if "name" in metadata else series.name)


def _restore_objects(frame: Any, metadata: dict[str, Any]) -> Any:
    """`frame` with text that was held as Python objects held so again: pandas reads text as its own str dtype."""
    for position in metadata.get("objects", ()):
        column = frame.iloc[:, position]
        if column.dtype != object:
            objects = column.astype(object)
            frame.isetitem(position, objects.where(column.notna(), None))
    for axis in metadata.get("object_labels", ()):
        labels = getattr(frame, axis)
        if labels.nlevels == 1 and labels.dtype != object:
            setattr(frame, axis, labels.astype(object))
    return frame


def _restore_labels(frame: Any, metadata: dict[str, Any]) -> Any:
    """`frame` with the labels and names that were written as text as they were."""
    import pandas

    from mlfuncs.codecs import untagged

    if "labels" in metadata:
        labels = untagged.loads(metadata["labels"].encode())
        frame.columns = pandas.Index(labels, dtype=object, tupleize_cols=False, name=frame.columns.name)
    for axis in ("index", "columns"):
        if f"{axis}_names" in metadata:
            getattr(frame, axis).names = untagged.loads(metadata[f"{axis}_names"].encode())
    return frame


class ParquetCodec:
    """Tables. The hint's library wins over the one that wrote, so that a step may take another's table."""

    kind = "parquet"
    signed = False

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        return write(value, sink)

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> Any:
        return read(source, metadata, library_of(hint))
