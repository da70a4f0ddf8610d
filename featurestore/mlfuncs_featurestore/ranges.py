"""Numbers that do not fit a feature type, found before Arrow casts them.

Owns: `check_range`, `exact_decimals` and `beyond_int64`, for what Arrow's own casts do not do: they turn a float64
beyond float32 into inf in silence, and refuse integers for a decimal because of their type instead of their value. The
first two look into lists, vectors and structs. Pure.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from mlfuncs_featurestore.types import FeatureType

_FLOAT32_MAX = "3.4028235e+38"
_INT64_DIGITS = 20  # of uint64 too


def check_range(array: pa.Array, kind: FeatureType) -> None:
    """Raises pa.ArrowInvalid with the first number that `kind` has no place for; an inf is a float32 like any other."""
    for numbers, leaf in _leaves(array, kind):
        if leaf.kind == "float32" and pa.types.is_float64(numbers.type):
            infinite = pc.is_inf(numbers.cast(pa.float32(), safe=False))
            if pc.any(infinite).as_py():
                _refuse(numbers, pc.and_(infinite, pc.is_finite(numbers)), f"-{_FLOAT32_MAX} to {_FLOAT32_MAX}")
        elif leaf.kind == "decimal":
            _check_decimals(numbers, leaf.precision - leaf.scale)


def _check_decimals(numbers: pa.Array, digits: int) -> None:
    """Raises for a number of more than so many digits before the point; what is behind it, the cast checks."""
    if pa.types.is_integer(numbers.type):
        numbers = numbers.cast(pa.decimal128(_INT64_DIGITS, 0))
    if pa.types.is_decimal(numbers.type) and numbers.type.precision - numbers.type.scale > digits:
        limit = pa.scalar(decimal.Decimal(10**digits), pa.decimal256(digits + 1, 0))
        wide = pc.abs(numbers.cast(pa.decimal256(numbers.type.precision, numbers.type.scale)))
        most = 10**digits - 1
        _refuse(numbers, pc.greater_equal(wide, limit), f"-{most} to {most} before the decimal point")


def beyond_int64(array: pa.Array) -> int | None:
    """The first whole number of a decimal column that int64 has no place for: Python integers come so."""
    if pa.types.is_decimal(array.type) and array.type.scale == 0:
        return next((int(one) for one in array.to_pylist() if one is not None and not -(2**63) <= one < 2**63), None)
    return None


def exact_decimals(have: pa.DataType, kind: FeatureType) -> pa.DataType:
    """`have` with every integer type that is to become a decimal as a decimal wide enough for all its values."""
    if pa.types.is_null(have):
        return have
    if kind.kind == "decimal" and pa.types.is_integer(have):
        return pa.decimal256(_INT64_DIGITS + kind.scale, kind.scale)
    if kind.kind == "list" and kind.element is not None:
        inner = exact_decimals(have.value_type, kind.element)
        return have if inner == have.value_type else pa.list_(inner)
    if kind.kind == "struct":
        members = dict(kind.members)
        return pa.struct([(one.name, exact_decimals(one.type, members[one.name])) for one in have])
    return have


def _leaves(array: pa.Array, kind: FeatureType) -> Iterator[tuple[pa.Array, FeatureType]]:
    """The arrays of single values in `array`, each with its type; of null lists and structs nothing."""
    if pa.types.is_null(array.type):
        return
    if kind.kind in ("list", "vector") and kind.element is not None:
        yield from _leaves(pc.list_flatten(array), kind.element)
    elif kind.kind == "struct":
        members = dict(kind.members)
        for one, values in zip(array.type, array.flatten(), strict=True):
            yield from _leaves(values, members[one.name])
    else:
        yield array, kind


def _refuse(numbers: pa.Array, lost: pa.Array, span: str) -> None:
    if pc.any(lost).as_py():
        value = numbers[pc.index(lost, True).as_py()].as_py()
        raise pa.ArrowInvalid(f"value {value} not in range: {span}")
