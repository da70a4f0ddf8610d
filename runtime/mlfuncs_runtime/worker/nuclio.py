"""Nuclio's handler interface: the event, the context with its logger and platform, and responses.

Names and meanings are those of Nuclio's Python runtime (docs.nuclio.io, "Event" and "Context" of the handler's
reference), so that a handler written for it runs here unmodified.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

from mlfuncs.errors import Unavailable
from mlfuncs.serving import client
from mlfuncs.settings import read_settings

_log = logging.getLogger("mlfuncs.nuclio")


class Headers(dict[str, str]):
    """HTTP headers: names as Go writes them ("Content-Type"), found in any case."""

    @staticmethod
    def _canonical(name: Any) -> str:
        return "-".join(part.capitalize() for part in str(name).split("-"))

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(self._canonical(name), value)

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(self._canonical(name))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._canonical(name))

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a header, or `default`."""
        return super().get(self._canonical(name), default)


@dataclass(frozen=True)
class Trigger:
    """What made the event: `kind` like "http", and the trigger's name."""

    kind: str = "http"
    name: str = "default-http"
    klass: str = "sync"


@dataclass
class Event:
    """One request. `body` is parsed JSON for application/json, else bytes; `fields` are the query's arguments."""

    body: Any = b""
    content_type: str = ""
    headers: Headers = field(default_factory=Headers)
    fields: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    path: str = "/"
    url: str = ""
    id: str = ""
    size: int = 0
    timestamp: datetime.datetime = datetime.datetime(1970, 1, 1)  # UTC without a zone, as Nuclio gives it
    trigger: Trigger = field(default_factory=Trigger)
    shard_id: int = -1
    num_shards: int = 0
    type: str = ""
    type_version: str = ""
    version: str = ""
    offset: int = 0
    topic: str | None = None
    last_in_batch: bool = False

    def get_header(self, name: str) -> str | None:
        """A header by its name in any case, or None."""
        value: str | None = self.headers.get(name)
        return value

    def to_json(self) -> str:
        """The event as JSON text; bytes are decoded as UTF-8 with replacements."""
        values = {**vars(self), "trigger": {"kind": self.trigger.kind, "name": self.trigger.name}}
        return json.dumps(values, default=_plain)


def _plain(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def make_event(scope: Mapping[str, Any], body: bytes, request_id: str, now_s: float) -> Event:
    """The event of an ASGI request; `now_s` is Unix time."""
    headers = Headers()
    for name, value in scope["headers"]:
        headers[name.decode("latin-1")] = value.decode("latin-1")
    query = scope.get("query_string", b"").decode("latin-1")
    content_type = headers.get("Content-Type", "")
    return Event(
        body=_parse(body, content_type),
        content_type=content_type,
        headers=headers,
        fields=dict(parse_qsl(query, keep_blank_values=True)),
        method=scope["method"],
        path=scope["path"],
        url=f"http://{headers.get('Host', 'localhost')}{scope['path']}" + (f"?{query}" if query else ""),
        id=request_id,
        size=len(body),
        timestamp=datetime.datetime.fromtimestamp(now_s, datetime.UTC).replace(tzinfo=None),
    )


def _parse(body: bytes, content_type: str) -> Any:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        return body
    try:
        return json.loads(body)
    except ValueError as exc:
        _log.warning("the body is not the JSON that its content type says: %s", exc)
        return body


class Response:
    """What a handler may return to choose status, headers and content type."""

    def __init__(
        self,
        headers: Mapping[str, Any] | None = None,
        body: Any = None,
        content_type: str | None = None,
        status_code: int = 200,
        event_id: str | None = None,
    ) -> None:
        self.headers = dict(headers or {})
        self.body = body
        self.content_type = content_type or "text/plain"
        self.status_code = status_code
        self.event_id = event_id  # in a batch: which event this answers

    def ensure_no_ack(self) -> None:
        """Ask a stream trigger not to mark this event as done."""
        self.headers["x-nuclio-stream-no-ack"] = True


class Logger:
    """Levels as methods; the `_with` forms take named values. Lines carry the request id like all log lines."""

    def __init__(self, bound: Mapping[str, Any] | None = None) -> None:
        self._bound = dict(bound or {})

    def bind(self, **values: Any) -> None:
        """Add values to every later line."""
        self._bound.update(values)

    def debug(self, message: Any, *args: Any) -> None:
        """Log at level debug, with %-arguments."""
        self._write(logging.DEBUG, message, args, {})

    def info(self, message: Any, *args: Any) -> None:
        """Log at level info, with %-arguments."""
        self._write(logging.INFO, message, args, {})

    def warn(self, message: Any, *args: Any) -> None:
        """Log at level warning, with %-arguments."""
        self._write(logging.WARNING, message, args, {})

    warning = warn

    def error(self, message: Any, *args: Any) -> None:
        """Log at level error, with %-arguments."""
        self._write(logging.ERROR, message, args, {})

    def debug_with(self, message: Any, *args: Any, **values: Any) -> None:
        """Log at level debug, with named values."""
        self._write(logging.DEBUG, message, args, values)

    def info_with(self, message: Any, *args: Any, **values: Any) -> None:
        """Log at level info, with named values."""
        self._write(logging.INFO, message, args, values)

    def warn_with(self, message: Any, *args: Any, **values: Any) -> None:
        """Log at level warning, with named values."""
        self._write(logging.WARNING, message, args, values)

    def error_with(self, message: Any, *args: Any, **values: Any) -> None:
        """Log at level error, with named values."""
        self._write(logging.ERROR, message, args, values)

    def _write(self, level: int, message: Any, args: tuple[Any, ...], values: Mapping[str, Any]) -> None:
        text = str(message)
        if args and "%" in text:
            with contextlib.suppress(TypeError, ValueError):
                text, args = text % args, ()
        pairs = dict(zip(args[::2], args[1::2], strict=False))  # "name", value, ... as Go's logger takes them
        named = {**self._bound, **{str(key): value for key, value in pairs.items()}, **values}
        shown = " ".join(f"{name}={value!r}" for name, value in named.items())
        _log.log(level, "%s", f"{text.rstrip()} {shown}" if shown else text)


class Platform:
    """What a handler may ask of the platform: calling another function by name, and callbacks at the end."""

    def __init__(self, kind: str = "local", namespace: str = "default") -> None:
        self.kind, self.namespace = kind, namespace
        self._callbacks: dict[str, Callable[[], Any]] = {}

    def call_function(
        self, function_name: str, event: Any, node: Any = None, timeout: float | None = None, **_: Any
    ) -> Response:
        """The response of the endpoint `function_name` to `event`; deadline, trace and request id go along.

        Raises Unavailable when it cannot be reached, DeadlineExceeded when the time allowed is over.
        """
        pattern = os.environ.get("MLFUNCS_CALL_URL")
        if not pattern:
            raise Unavailable(f"cannot call {function_name!r}: MLFUNCS_CALL_URL is not set; deploy this function first")
        body = event.body if isinstance(event.body, str | bytes) or event.body is None else json.dumps(event.body)
        kind = event.content_type or ("application/json" if isinstance(event.body, dict | list) else "text/plain")
        given = {str(name): str(value) for name, value in (event.headers or {}).items()}
        headers = {name: value for name, value in given.items() if name.lower() != "content-type"}
        headers["Content-Type"] = kind
        url = pattern.replace("{name}", function_name) + ("" if event.path in (None, "", "/") else event.path)
        token = "" if "authorization" in (name.lower() for name in headers) else read_settings().token
        method = event.method or "POST"
        answer = client.send(method, url, body, headers=headers, token=token, timeout_s=timeout or None)
        content_type = answer.headers.get("Content-Type", "text/plain")
        return Response(dict(answer.headers), _parse(answer.data, content_type), content_type, answer.status)

    def set_termination_callback(self, callback: Callable[[], Any]) -> None:
        """Have `callback()` called when the worker ends."""
        self._callbacks["termination"] = callback

    def set_drain_callback(self, callback: Callable[[], Any]) -> None:
        """Have `callback()` called when the worker begins to drain."""
        self._callbacks["drain"] = callback

    async def explicit_ack(self, qualified_offset: Any) -> None:
        """Raises Unavailable: an event over HTTP has no offset to acknowledge."""
        raise Unavailable("explicit_ack is for stream triggers that acknowledge by hand; this event has no offset")

    def on_drain(self) -> None:
        """Call what the handler registered; each callback runs once."""
        for name in ("drain", "termination"):
            callback = self._callbacks.pop(name, None)
            if callback is not None:
                callback()


class Context:
    """What a handler keeps between events and may use: `user_data`, `logger`, `Response`, `platform`, `worker_id`."""

    Response = Response

    def __init__(self, worker_id: int = 0, trigger: Trigger | None = None) -> None:
        self.logger = Logger()
        self.platform = Platform()
        self.user_data = SimpleNamespace()
        self.worker_id = worker_id
        self.trigger = trigger or Trigger()
        self.trigger_name = self.trigger.name
