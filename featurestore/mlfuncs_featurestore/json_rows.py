"""Rows as JSON has them, as rows of a view: times of ISO text, bytes of base64, decimals of text.

Owns: what the command line, the feature server and streams do with the values they are sent. Pure.
"""

from __future__ import annotations

import base64
import datetime
import decimal
from collections.abc import Mapping
from typing import Any

from mlfuncs.errors import InvalidInput
from mlfuncs_featurestore.definitions import FeatureView
from mlfuncs_featurestore.quality import stored_type
from mlfuncs_featurestore.types import FeatureType


def read_row(view: FeatureView, row: Mapping[str, Any]) -> dict[str, Any]:
    """One row with its values as the view's types have them; what needs no change stays as it is."""
    return {name: read_cell(view, name, value) for name, value in row.items()}


def read_cell(view: FeatureView, name: str, value: Any) -> Any:
    """A value of the view's column `name`; of another column, as it is. Raises InvalidInput."""
    return read_value(name, value, stored_type(view, name)) if name in view.columns else value


def read_value(name: str, value: Any, kind: FeatureType) -> Any:
    """A value of `kind` that JSON spells as text."""
    if value is None:
        return None
    if kind.kind in ("list", "vector") and isinstance(value, list) and kind.element is not None:
        return [read_value(name, one, kind.element) for one in value]
    if kind.kind == "struct" and isinstance(value, Mapping):
        members = dict(kind.members)
        return {
            key: read_value(f"{name}.{key}", one, members[key]) if key in members else one for key, one in value.items()
        }
    if kind.kind == "decimal" and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return _decimal(name, value, kind)
    if not isinstance(value, str):
        return value
    if kind.kind == "bytes":
        return unbase64(name, value)
    return read_time(name, value, kind.kind) if kind.kind in ("timestamp", "date") else value


def unbase64(name: str, text: Any) -> bytes:
    """Bytes from base64. Raises InvalidInput."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise _wrong(name, text, "is not base64") from None


def read_time(name: str, text: Any, kind: str = "timestamp") -> Any:
    """A time (without a zone: UTC), or a date, from ISO 8601 text. Raises InvalidInput."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except (ValueError, TypeError):
        raise _wrong(name, text, "is not an ISO 8601 time like '2024-05-01T12:00:00Z'") from None
    if kind == "date":
        return moment.date()
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _decimal(name: str, value: Any, kind: FeatureType) -> decimal.Decimal:
    """Exactly the number written; a float counts by its shortest spelling, as JSON wrote it."""
    try:
        exact = decimal.Decimal(str(value))
        fitted = exact.quantize(decimal.Decimal(1).scaleb(-kind.scale), context=decimal.Context(prec=kind.precision))
    except decimal.InvalidOperation:
        raise _wrong(name, value, f"does not fit {kind}") from None
    if fitted != exact:
        raise _wrong(name, value, f"has more digits than {kind}")
    return fitted


def _wrong(name: str, value: Any, message: str) -> InvalidInput:
    return InvalidInput(f"{name!r}: {value!r} {message}", [{"field": name, "message": message}])
