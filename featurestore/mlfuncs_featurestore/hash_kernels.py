"""The hashes of `hashing` over whole columns, and HyperLogLog registers (numba)."""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


@njit(cache=True)
def _finish(z):
    z = z + _GOLDEN
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


@njit(cache=True, nogil=True)
def hash_ints(numbers):
    """int64 (n,) to uint64 (n,)."""
    hashes = np.empty(len(numbers), np.uint64)
    for i in range(len(numbers)):
        hashes[i] = _finish(uint64(numbers[i]))
    return hashes


@njit(cache=True, nogil=True)
def hash_spans(starts, payload):
    """Byte strings payload[starts[i]:starts[i+1]] to uint64 (n,)."""
    n = len(starts) - 1
    hashes = np.empty(n, np.uint64)
    for i in range(n):
        h = _FNV_OFFSET
        for j in range(starts[i], starts[i + 1]):
            h = (h ^ uint64(payload[j])) * _FNV_PRIME
        hashes[i] = _finish(h)
    return hashes


@njit(cache=True, nogil=True)
def combine(left, right):
    """The hashes of two key columns as the hash of the pair."""
    hashes = np.empty(len(left), np.uint64)
    for i in range(len(left)):
        hashes[i] = _finish(left[i] * np.uint64(31) + right[i])
    return hashes


@njit(cache=True, nogil=True)
def hll_add(registers, hashes):
    """Enter `hashes` into HyperLogLog `registers` (uint8, a power of two of them), in place."""
    bits = 0
    while (1 << bits) < len(registers):
        bits += 1
    for i in range(len(hashes)):
        h = hashes[i]
        index = h >> np.uint64(64 - bits)
        rest = h << np.uint64(bits)
        rank = 1
        while rank <= 64 - bits and (rest >> np.uint64(63)) == np.uint64(0):
            rest = rest << np.uint64(1)
            rank += 1
        if rank > registers[index]:
            registers[index] = rank
