"""Python values as an Arrow column, or which of them cannot be in it and why.

Owns: `python_column`. Arrow infers the type; what it refuses is said here with the value and its row.
"""

from __future__ import annotations

import decimal
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mlfuncs.errors import InvalidInput

# UnicodeEncodeError, a ValueError as pa.ArrowInvalid is, comes of text with a lone surrogate
REFUSALS = (ValueError, TypeError, OverflowError, pa.ArrowException)
_INT64 = range(-(2**63), 2**63)
_WIDEST = 10**38  # of decimal128


def python_column(name: str, values: Sequence[Any], from_pandas: bool = False) -> pa.Array | pa.ChunkedArray:
    """`values` as Arrow infers them; whole numbers beyond int64 as decimals, which only decimals can take.

    `from_pandas`: NaN is null. Raises InvalidInput, naming the first value that does not go with the others.
    """
    try:
        return pa.array(values, from_pandas=from_pandas)
    except REFUSALS as exc:
        plain = list(values)
        if (wide := _wide_integers(plain)) is not None:
            return wide
        message = _reason(plain, from_pandas, exc)
        raise InvalidInput(f"column {name!r} {message}", [{"field": name, "message": message}]) from exc


def _wide_integers(values: list[Any]) -> pa.Array | None:
    """Whole numbers, decimals and None of which some are beyond int64, or None when that is not what they are."""
    if not all(value is None or type(value) in (int, decimal.Decimal) for value in values):
        return None
    numbers = [decimal.Decimal(value) for value in values if value is not None]
    if not all(one.is_finite() and abs(one) < _WIDEST for one in numbers):
        return None
    try:
        scale = max(0, 0, *(-int(one.as_tuple().exponent) for one in numbers))
        return pa.array([None if one is None else decimal.Decimal(one) for one in values], pa.decimal128(38, scale))
    except REFUSALS:
        return None


def _reason(values: list[Any], from_pandas: bool, refusal: Exception) -> str:
    """What is wrong: a value that fits no column, else the first that does not go with the first one."""
    for row, value in enumerate(values):
        if not _fits([value], from_pandas):
            culprit = _innermost(value, from_pandas)
            return f"holds {_shown(culprit)} in row {row}, which {_why(culprit)}"
    given = [(row, value) for row, value in enumerate(values) if value is not None]
    for row, value in given[1:]:
        first_row, first = given[0]
        if not _fits([first, value], from_pandas):
            return f"holds values of different types: {_shown(first)} in row {first_row}, {_shown(value)} in row {row}"
    return f"holds values that do not go together: {refusal}"


def _fits(values: list[Any], from_pandas: bool) -> bool:
    try:
        pa.array(values, from_pandas=from_pandas)
    except REFUSALS:
        return False
    return True


def _innermost(value: Any, from_pandas: bool) -> Any:
    """The part of a list or struct that fits no column by itself, or the value when its parts do."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((_innermost(part, from_pandas) for part in parts if not _fits([part], from_pandas)), value)


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _why(value: Any) -> str:
    if isinstance(value, int):
        return f"is outside int64 ({_INT64[0]} to {_INT64[-1]})"
    if isinstance(value, decimal.Decimal):
        return "has more than 38 digits" if value.is_finite() else "is no number that a decimal can be; write None"
    if isinstance(value, str):
        return "is not valid Unicode text: half of a surrogate pair stands alone; take bytes for what is no text"
    return "is of no type that a column can have"
