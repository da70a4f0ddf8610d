"""The files of Delta tables: where they are, how they are written, what the log says of them.

Owns: addresses, data files and their statistics. Nothing here is seen by readers before `delta_tables` commits it.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq

from mlfuncs.errors import StorageError

if TYPE_CHECKING:
    from deltalake.transaction import AddAction

BUCKET = "__bucket"
ROW_GROUP_ROWS = 131_072


def table_uri(base: str, *parts: str) -> str:
    """The address of a table below `base` (a path or URL); "file://" is dropped.

    >>> table_uri("s3://bucket/warehouse/", "shop", "spend")
    's3://bucket/warehouse/shop/spend'
    """
    return "/".join([base.removeprefix("file://").rstrip("/"), *parts])


def is_local(uri: str) -> bool:
    """Whether the table lies in this machine's file system."""
    return "://" not in uri


def filesystem(uri: str) -> pa_fs.FileSystem:
    """An Arrow file system whose root is the table, with the credentials that Delta itself uses."""
    if is_local(uri):
        return pa_fs.SubTreeFileSystem(uri, pa_fs.LocalFileSystem())
    from deltalake.fs import DeltaStorageHandler

    return pa_fs.PyFileSystem(DeltaStorageHandler(uri))


def write_file(uri: str, rows: pa.Table, bucket: int, *, data_change: bool = True) -> AddAction:
    """Write `rows` (without the bucket column) as one Parquet file of `bucket` and return its entry for a commit.

    Float columns carry no dictionary: they then decode three times cheaper. Snappy, because zstd made random floats 8 %
    smaller and four times dearer to read (measured).
    """
    from deltalake.transaction import AddAction

    path = f"{BUCKET}={bucket}/{uuid.uuid4().hex}.parquet"
    if is_local(uri):
        os.makedirs(f"{uri}/{BUCKET}={bucket}", exist_ok=True)
    plain = [one.name for one in rows.schema if not _is_float(one.type)]
    try:
        with filesystem(uri).open_output_stream(path) as sink:
            pq.write_table(
                rows,
                sink,
                compression="snappy",
                use_dictionary=[name for name in plain if not name.startswith("__")],
                row_group_size=ROW_GROUP_ROWS,
                write_statistics=True,
                store_schema=False,
            )
        size = filesystem(uri).get_file_info(path).size
    except OSError as exc:
        raise StorageError(f"a data file of {uri} cannot be written: {exc}") from exc
    if is_local(uri):
        sync_file(f"{uri}/{path}")
    now_ms = int(time.time() * 1000)
    return AddAction(path, size, {BUCKET: str(bucket)}, now_ms, data_change, json.dumps(file_statistics(rows)))


def write_bytes(uri: str, path: str, content: pa.Buffer) -> None:
    """Write a small file below the table."""
    part = 2**20  # Delta's streams take what fits Arrow's own buffer, not Arrow buffers
    with filesystem(uri).open_output_stream(path, buffer_size=4 * part) as sink:
        for start in range(0, content.size, part):
            sink.write(content[start : start + part])


def _is_float(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _is_float(kind.value_type)
    return pa.types.is_floating(kind)


def file_statistics(rows: pa.Table) -> dict[str, Any]:
    """Delta's statistics of a file: rows, and extremes of integer and time columns for skipping files."""
    import pyarrow.compute as pc

    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    nulls = {one.name: rows[one.name].null_count for one in rows.schema if not pa.types.is_struct(one.type)}
    for one in rows.schema:
        times = pa.types.is_timestamp(one.type)
        if (times or pa.types.is_integer(one.type)) and nulls[one.name] < rows.num_rows:
            extremes = pc.min_max(rows[one.name].cast(pa.int64()))
            spell: Callable[[int], Any] = iso_time if times else int
            low[one.name], high[one.name] = spell(extremes["min"].as_py()), spell(extremes["max"].as_py())
    return {"numRecords": rows.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls}


def iso_time(microseconds: int) -> str:
    """A time as Delta's log spells it."""
    return str(pa.scalar(microseconds, pa.timestamp("us")).cast(pa.string()).as_py()).replace(" ", "T") + "Z"


def sync_file(path: str) -> None:
    """Make a file's content survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete_files(uri: str, actions: Sequence[AddAction]) -> None:
    """Delete data files that no commit names; what cannot be deleted is left for vacuum."""
    files = filesystem(uri)
    for action in actions:
        try:
            files.delete_file(action.path)
        except OSError:
            continue
