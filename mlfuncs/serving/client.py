"""Calls endpoints over HTTP with kept connections; deadline, trace and request id of the running request go along."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlfuncs import errors
from mlfuncs.errors import DeadlineExceeded, InvalidInput, MlfuncsError, Unavailable
from mlfuncs.serving.request_context import current_request, note_call

if TYPE_CHECKING:
    import urllib3

DEFAULT_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0
TIMEOUT_HEADER = "X-Mlfuncs-Timeout-Ms"
_HOP_HEADERS = ("connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
_POOLED_CONNECTIONS = 64  # per address; more are opened when needed and not kept

_pools: dict[int, urllib3.PoolManager] = {}  # by process: connections must not be shared with a fork
_making = threading.Lock()


def invoke(url: str, body: bytes, *, token: str = "", timeout_s: float | None = None) -> Any:
    """The decoded answer to `POST url` with a JSON body.

    Inside a handler the time allowed is what the running request has left, when that is less than `timeout_s`.
    Raises the MlfuncsError that a problem document stands for, Unavailable when nobody listens at `url`, and
    DeadlineExceeded when no answer came in time. An Unavailable with `retry_after_s` 0 was never a request.
    """
    answer = send("POST", url, body, token=token, timeout_s=timeout_s)
    kind = answer.headers.get("Content-Type", "")
    if answer.status >= 400:
        raise _failure(answer.status, kind, answer.data, answer.headers.get("Retry-After"))
    try:
        return decode(answer.data, kind)
    except ValueError as exc:
        raise MlfuncsError(f"the answer of {url} says it is {kind}, and is not: {exc}") from exc


def send(
    method: str,
    url: str,
    body: bytes | str | None,
    *,
    headers: Mapping[str, str] | None = None,
    token: str = "",
    timeout_s: float | None = None,
) -> urllib3.BaseHTTPResponse:
    """The answer as it came, whatever its status; `headers` go along, but for those that are this hop's own.

    Raises Unavailable and DeadlineExceeded as `invoke` does.
    """
    import urllib3

    allowed_s = _allowed_s(timeout_s)
    own = request_headers(allowed_s, token)
    reserved = {*_HOP_HEADERS, *(name.lower() for name in own if name != "Content-Type")}
    given = {name: value for name, value in (headers or {}).items() if name.lower() not in reserved}
    if any(name.lower() == "content-type" for name in given):
        del own["Content-Type"]
    headers = given | own
    timeout = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, allowed_s), read=allowed_s)
    # A refused connection was never a request, so it is tried again; a request that may have been read is not.
    retries = urllib3.Retry(total=None, connect=3, read=0, status=0, other=0, redirect=0, backoff_factor=0.1)
    started_s, status = time.monotonic(), 0
    try:
        answer = _pool().request(method, url, body=body, headers=headers, timeout=timeout, retries=retries)
        status = answer.status
    except urllib3.exceptions.MaxRetryError as exc:
        raise _unreachable(url, allowed_s, exc.reason or exc) from exc
    except urllib3.exceptions.HTTPError as exc:
        raise _unreachable(url, allowed_s, exc) from exc
    finally:
        note_call(url, headers.get("traceparent", ""), started_s, status)
    return answer


def encode(values: Mapping[str, Any] | Any) -> bytes:
    """`values` as the JSON an endpoint reads: arrays, tables, dataclasses, models, dates and enums included.

    >>> encode({"x": [1.0, float("nan")]})
    b'{"x":[1.0,null]}'
    """
    import orjson

    from mlfuncs.interface.frames import fallback, plain

    try:
        return orjson.dumps(plain(values), default=fallback, option=orjson.OPT_NON_STR_KEYS)
    except TypeError as exc:
        cause = exc.__cause__ or exc
        if "64-bit" in str(exc) or "Integer exceeds" in str(exc):
            return _encode_slowly(values)
        raise InvalidInput(f"the arguments cannot be sent as JSON: {cause}") from exc


def decode(body: bytes, content_type: str) -> Any:
    """An answer's body as Python values: JSON parsed, a stream of JSON lines as a list, text as str, others as bytes.

    No body is None. Raises ValueError for JSON that is none.
    """
    if not body:
        return None
    if "ndjson" in content_type:
        return [decode(line, "application/json") for line in body.splitlines() if line]
    if "json" in content_type:
        import orjson

        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            import json

            return json.loads(body)  # integers over 64 bits
    if content_type.startswith("text/"):
        return body.decode("utf-8", "replace")
    return body


def request_headers(allowed_s: float, token: str = "") -> dict[str, str]:
    """Headers of a call: what it carries, how long it may take, who calls, and the running request's id and trace."""
    headers = {"Content-Type": "application/json", TIMEOUT_HEADER: str(max(1, int(allowed_s * 1000)))}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    context = current_request()
    if context is not None:
        headers["X-Request-Id"] = context.request_id
        if context.traceparent:
            headers["traceparent"] = _child_of(context.traceparent)
    return headers


def error_of(title: str, message: str, problem: Mapping[str, Any] | None = None) -> MlfuncsError:
    """The error of the class named `title`, with what a problem document says beside the message."""
    problem = problem or {}
    kind = getattr(errors, title, None)
    if not (isinstance(kind, type) and issubclass(kind, MlfuncsError)):
        kind = _BY_STATUS.get(int(problem.get("status", 500)), MlfuncsError)
    extras = {"fields": problem.get("errors", []), "near": problem.get("near", []), "kind": "", "name": ""}
    extras |= {"retry_after_s": problem.get("retry_after_s", 1.0), "run_id": "", "extra": ""}
    extras["answered"] = problem.get("status")  # the HTTP status that came, when one did
    return errors.rebuild(kind, (message,), extras)


_BY_STATUS: dict[int, type[MlfuncsError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    409: errors.Conflict,
    413: errors.TooLarge,
    422: errors.InvalidInput,
    429: errors.Overloaded,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
}


def _failure(status: int, content_type: str, body: bytes, retry_after: str | None) -> MlfuncsError:
    problem = None
    if "json" in content_type:
        with contextlib.suppress(ValueError):  # whatever stands between says JSON, and sends something else
            problem = decode(body, content_type)
    if not isinstance(problem, dict) or "title" not in problem:
        text = body[:500].decode("utf-8", "replace").strip()
        return error_of("", f"the endpoint answered {status}: {text or 'nothing'}", {"status": status})
    message = str(problem.get("detail") or problem["title"])
    fields = [item for item in problem.get("errors") or () if str(item.get("message")) not in message]
    missing = [f"{item.get('field')}: {item.get('message')}" for item in fields]
    if missing:
        message += " (" + "; ".join(missing) + ")"
    if problem.get("request_id"):
        message += f" [request {problem['request_id']}]"
    if retry_after and retry_after.isdigit():
        problem = {**problem, "retry_after_s": float(retry_after)}
    problem = {**problem, "status": status}
    return error_of(str(problem["title"]), message, problem)


def _unreachable(url: str, allowed_s: float, reason: BaseException) -> MlfuncsError:
    import urllib3

    if isinstance(reason, urllib3.exceptions.ReadTimeoutError):
        return DeadlineExceeded(f"no answer from {url} within {allowed_s:g} s; give invoke a larger timeout_s")
    if isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError):
        return Unavailable(f"nobody listens at {url}; start the endpoints with 'mlfuncs up'", retry_after_s=0.0)
    return Unavailable(f"the connection to {url} broke before the answer was complete ({reason})")


def _allowed_s(timeout_s: float | None) -> float:
    allowed_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
    context = current_request()
    if context is not None:
        allowed_s = min(allowed_s, context.remaining_s()) if timeout_s is not None else context.remaining_s()
    if allowed_s <= 0:
        raise DeadlineExceeded("the time allowed for the running request is over; no further endpoint was called")
    return allowed_s


def _child_of(traceparent: str) -> str:
    """The same trace with a new span id, as W3C Trace Context asks of whoever calls on."""
    parts = traceparent.split("-")
    return "-".join([*parts[:2], secrets.token_hex(8), *parts[3:]]) if len(parts) >= 4 else traceparent


def _encode_slowly(values: Any) -> bytes:
    """For integers over 64 bits, which orjson refuses; everything else goes through it value by value."""
    import json

    import orjson

    from mlfuncs.interface.frames import fallback, plain

    def encode_one(value: Any) -> Any:
        return orjson.loads(orjson.dumps(value, default=fallback, option=orjson.OPT_NON_STR_KEYS))

    return json.dumps(_without_nan(plain(values)), default=encode_one, allow_nan=False).encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def _pool() -> urllib3.PoolManager:
    pool = _pools.get(os.getpid())
    if pool is None:
        from mlfuncs.serving.unix_http import pool_manager

        with _making:
            pool = _pools.setdefault(os.getpid(), pool_manager(num_pools=16, maxsize=_POOLED_CONNECTIONS))
    return pool


def _after_fork() -> None:
    global _making
    _making = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_after_fork)
