"""What a Nuclio handler returned, as HTTP: the forms of output that Nuclio's Python runtime knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """A handler's output as HTTP: `body` is bytes, or a generator of chunks."""

    status: int
    content_type: str
    body: Any
    headers: tuple[tuple[str, str], ...] = ()


_HOP_BY_HOP = {"content-length", "transfer-encoding", "connection", "content-type", "keep-alive"}


def to_answer(output: Any) -> Answer:
    """What a handler returned, as HTTP: text, bytes, JSON for dict and list, (status, body), a Response, or nothing.

    >>> to_answer((201, {"made": 1}))
    Answer(status=201, content_type='application/json', body=b'{"made": 1}', headers=())
    """
    status, content_type = 200, ""
    headers: Mapping[Any, Any] = {}
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], int):
        status, output = output
        if not isinstance(output, str):
            content_type = "application/json"
    elif all(hasattr(output, name) for name in ("body", "status_code", "content_type", "headers")):
        status, headers, content_type = output.status_code, output.headers or {}, output.content_type
        output = output.body
        if isinstance(output, dict | list) and content_type == "text/plain":
            content_type = "application/json"
    body, natural = _encode(output)
    kept = tuple((str(k), str(v)) for k, v in headers.items() if str(k).lower() not in _HOP_BY_HOP)
    return Answer(int(status), content_type or natural, body, kept)


def _encode(output: Any) -> tuple[Any, str]:
    if output is None:
        return b"", "text/plain"
    if isinstance(output, str):
        return output.encode(), "text/plain"
    if isinstance(output, bytes | bytearray | memoryview):
        return bytes(output), "application/octet-stream"
    if isinstance(output, Iterator) or hasattr(output, "__anext__"):
        return output, "text/plain"
    if isinstance(output, dict | list | tuple):
        return json.dumps(output, default=_jsonable).encode(), "application/json"
    return str(output).encode(), "text/plain"


def _jsonable(value: Any) -> Any:
    for method in ("tolist", "isoformat", "to_dict"):
        if hasattr(value, method):
            return getattr(value, method)()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
