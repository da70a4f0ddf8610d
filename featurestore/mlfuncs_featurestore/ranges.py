"""Numbers that do not fit a feature type, found before Arrow casts them.

Owns: `check_range` and `exact_decimals`, for what Arrow's own casts do not do: they turn a float64 beyond float32 into
inf in silence, and refuse integers for a decimal because of their type instead of their value. Both look into lists,
vectors and structs. Pure.
"""

from __future__ import annotations

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
            lost = pc.and_(pc.is_inf(numbers.cast(pa.float32(), safe=False)), pc.is_finite(numbers))
            _refuse(numbers, lost, f"-{_FLOAT32_MAX} to {_FLOAT32_MAX}")
        elif leaf.kind == "decimal" and pa.types.is_integer(numbers.type):
            bound = 10 ** (leaf.precision - leaf.scale) - 1
            if bound < 2**63:
                wide = numbers.cast(pa.decimal128(_INT64_DIGITS, 0))
                limit = pa.scalar(bound, pa.decimal128(_INT64_DIGITS, 0))
                _refuse(numbers, pc.greater(pc.abs(wide), limit), f"-{bound} to {bound} before the decimal point")


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
        raise pa.ArrowInvalid(f"value {value!r} not in range: {span}")
