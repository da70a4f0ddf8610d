"""64-bit hashes of key and feature values, equal in Python and in the numba kernels, on every machine.

Owns: the hash that assigns entities to buckets and values to HyperLogLog registers. Whole numbers go through the
finaliser of SplitMix64 (Steele, Lea, Flood 2014), bytes through FNV-1a and then the same finaliser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_MASK = 2**64 - 1
FNV_OFFSET, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
COMBINE = 0x9E3779B97F4A7C15


def hash_int(value: int) -> int:
    """The hash of a whole number in the range of int64 or uint64."""
    z = (value + COMBINE) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def hash_bytes(value: bytes) -> int:
    """The hash of a byte string; text is hashed as UTF-8."""
    h = FNV_OFFSET
    for byte in value:
        h = ((h ^ byte) * FNV_PRIME) & _MASK
    return hash_int(h)


def hash_array(array: pa.Array) -> np.ndarray:
    """The hashes of an array's values as uint64; nulls have hash 0. Floats are hashed by their bits, -0.0 as 0.0."""
    import numpy as np
    import pyarrow as pa

    from mlfuncs_featurestore import hash_kernels
    from mlfuncs_featurestore.arrays import float64s, for_kernel, int64s, validity

    if pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        _, offsets, data = array.buffers()
        starts = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
        payload = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(1, np.uint8)
        hashes = hash_kernels.hash_spans(starts, for_kernel(payload))
    elif pa.types.is_floating(array.type):
        hashes = hash_kernels.hash_ints((float64s(array) + 0.0).view(np.int64))
    else:
        hashes = hash_kernels.hash_ints(int64s(array))
    if array.null_count:
        hashes[validity(array) == 0] = 0
    return hashes


def hash_entities(columns: Iterable[pa.Array]) -> np.ndarray:
    """One uint64 hash per row over its key columns, in order."""
    from mlfuncs_featurestore import hash_kernels

    combined: np.ndarray | None = None
    for column in columns:
        hashes = hash_array(column)
        combined = hashes if combined is None else hash_kernels.combine(combined, hashes)
    assert combined is not None
    return combined


def hash_entity(values: Mapping[str, int | str | bytes]) -> int:
    """The hash of one entity given by its canonical key values: what `hash_entities` gives for its row."""
    combined: int | None = None
    for value in values.values():
        plain = value.encode() if isinstance(value, str) else value
        one = hash_int(plain) if isinstance(plain, int) else hash_bytes(plain)
        combined = one if combined is None else hash_int((combined * 31 + one) & _MASK)
    assert combined is not None
    return combined
