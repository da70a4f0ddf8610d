"""A typed client of the feature server.

Owns: FeatureClient and the answers it gives.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import urllib3

from mlfuncs import errors
from mlfuncs.errors import InvalidInput, MlfuncsError, Unavailable

_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclass(frozen=True)
class FeatureVectors:
    """What the server answered: columns by name, and per feature the status of each row."""

    columns: Mapping[str, list[Any]]
    statuses: Mapping[str, list[str]]

    def to_dict(self) -> dict[str, list[Any]]:
        """The columns, entity keys first; None where a value is not PRESENT."""
        return dict(self.columns)


class FeatureClient:
    """Asks a feature server; connections are kept. Raises the server's own errors, and Unavailable when it is away."""

    def __init__(self, url: str = "http://127.0.0.1:6566", token: str = "", timeout_s: float = 5.0) -> None:
        self.url, self._token = url.rstrip("/"), token
        self._pool = urllib3.PoolManager(timeout=timeout_s, retries=urllib3.Retry(2, allowed_methods=None, redirect=0))

    def get_online_features(
        self, features: str | Sequence[str], entities: Mapping[str, Sequence[Any]], full_feature_names: bool = False
    ) -> FeatureVectors:
        """The features (references, or the name of a service) of columns of entity keys."""
        wanted = {"feature_service": features} if isinstance(features, str) else {"features": list(features)}
        body = {**wanted, "entities": {name: _sendable(column) for name, column in entities.items()}}
        answer = self._post("/get-online-features", {**body, "full_feature_names": full_feature_names})
        names = answer["metadata"]["feature_names"]
        results = dict(zip(names, answer["results"], strict=True))
        floats = {name for name, kind in answer["metadata"]["feature_types"].items() if "float" in kind}
        columns = {
            name: [_number(one) for one in result["values"]] if name in floats else result["values"]
            for name, result in results.items()
        }
        return FeatureVectors(columns, {name: one["statuses"] for name, one in results.items() if name not in entities})

    def push(self, view: str, rows: Mapping[str, Sequence[Any]], push_id: str | None = None) -> dict[str, Any]:
        """Push columns of rows into `view`. Without a `push_id` the push gets one of its own: it may be sent twice."""
        columns = {name: _sendable(column) for name, column in rows.items()}
        body = {"push_source_name": view, "df": columns, "push_id": push_id or uuid.uuid4().hex}
        return self._post("/push", body)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        sent = json.dumps(body, default=_json_value).encode()
        try:
            response = self._pool.request("POST", self.url + path, body=sent, headers=headers)
        except urllib3.exceptions.HTTPError as exc:
            raise Unavailable(f"the feature server {self.url} does not answer: {exc}") from exc
        try:
            answer: dict[str, Any] = json.loads(response.data)
        except ValueError as exc:
            raise Unavailable(
                f"{self.url} answered HTTP {response.status} without JSON: is it a feature server?"
            ) from exc
        if response.status != 200:
            raise _error(answer, response.status)
        return answer


def _sendable(column: Sequence[Any]) -> list[Any]:
    return list(column.tolist() if hasattr(column, "tolist") else column)


def _json_value(value: Any) -> Any:
    """What JSON has no type for, as the server reads it."""
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date):  # and datetimes
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, uuid.UUID)):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return value.tolist()
    raise InvalidInput(f"{value!r} ({type(value).__name__}) cannot be sent as JSON")


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(one) for one in value]
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def _error(problem: Mapping[str, Any], status: int) -> MlfuncsError:
    """The error that the problem document names."""
    kind = getattr(errors, str(problem.get("title")), MlfuncsError)
    detail = str(problem.get("detail", f"HTTP {status}"))
    found = kind.__new__(kind) if isinstance(kind, type) and issubclass(kind, MlfuncsError) else MlfuncsError()
    Exception.__init__(found, detail)
    for name, value in (
        ("fields", problem.get("errors", [])),
        ("near", problem.get("near", [])),
        ("retry_after_s", 1.0),
    ):
        setattr(found, name, value)
    return found
