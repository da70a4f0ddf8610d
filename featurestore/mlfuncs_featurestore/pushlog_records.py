"""Records of the push log as bytes: checksummed, so that a torn one is seen.

Owns: the layout: u32 length and u32 CRC-32 of the payload; the payload is u32 length of the JSON head, the head, then
each table as u32 length and an Arrow IPC stream. All little-endian.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

_FRAME = struct.Struct("<II")
_PART = struct.Struct("<I")
Record = tuple[dict[str, Any], list[pa.Table], int]


def framed(head: dict[str, Any], tables: Sequence[pa.Table]) -> bytes:
    """One record."""
    parts = [json.dumps(head).encode(), *map(_to_bytes, tables)]
    payload = b"".join(_PART.pack(len(part)) + part for part in parts)
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def read_records(path: Path, start: int = 0) -> Iterator[Record]:
    """Each whole record from byte `start` on: its head, its tables, and where it ends. Stops at a torn one."""
    with open(path, "rb") as file:
        file.seek(start)
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            length, checksum = _FRAME.unpack(frame)
            payload = file.read(length)
            if len(payload) != length or zlib.crc32(payload) != checksum:
                return
            yield *_opened(payload), file.tell()


def unframed(record: bytes) -> tuple[dict[str, Any], list[pa.Table]]:
    """The head and the tables of one whole record."""
    return _opened(record[_FRAME.size :])


def _opened(payload: bytes) -> tuple[dict[str, Any], list[pa.Table]]:
    head, *tables = _parts(payload)
    return json.loads(head), [_from_bytes(one) for one in tables]


def _parts(payload: bytes) -> list[bytes]:
    parts, position = [], 0
    while position < len(payload):
        (length,) = _PART.unpack_from(payload, position)
        parts.append(payload[position + 4 : position + 4 + length])
        position += 4 + length
    return parts


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_bytes(stream: bytes) -> pa.Table:
    return pa.ipc.open_stream(stream).read_all()


def sync_file(file: IO[Any]) -> None:
    """Have the file's bytes on disk."""
    file.flush()
    os.fsync(file.fileno())
