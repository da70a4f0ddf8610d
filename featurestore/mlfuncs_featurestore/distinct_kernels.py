"""How many different values a sliding window has, and which are frequent (numba); `windows` has the specification."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from mlfuncs_featurestore.exact_kernels import bit_length
from mlfuncs_featurestore.window_kernels import after, clear

REGISTERS = 4096


@njit(cache=True)
def _estimate(registers):
    """As `hyperloglog.estimate`, operation by operation."""
    counts = np.zeros(66, np.int64)
    for register in registers:
        counts[register] += 1
    total, weight = 0.0, 1.0
    for rank in range(66):
        total += counts[rank] * weight
        weight *= 0.5
    m = float(len(registers))
    raw = 0.7213 / (1.0 + 1.079 / m) * m * m / total
    if raw <= 2.5 * m and counts[0] > 0:
        return int(m * math.log(m / counts[0]) + 0.5)
    return int(raw + 0.5)


@njit(cache=True, nogil=True)
def distinct(starts, event, known, until, codes, n_codes, hashes, q_starts, q_at, window, bound, out_count):
    """How many different codes (>= 0) each window has; above `bound`, the HyperLogLog estimate over their hashes."""
    seen = np.zeros(n_codes, np.int64)
    registers = np.zeros(REGISTERS, np.uint8)
    mark = 0
    for e in range(len(starts) - 1):
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            low = after(event, starts[e], starts[e + 1], t - window)
            high = after(event, starts[e], starts[e + 1], t)
            mark += 1
            count = 0
            for i in range(low, high):
                if codes[i] >= 0 and known[i] <= t < until[i] and seen[codes[i]] != mark:
                    seen[codes[i]] = mark
                    count += 1
            if count > bound:
                clear(registers)
                for i in range(low, high):
                    if codes[i] >= 0 and known[i] <= t < until[i]:
                        h = hashes[codes[i]]
                        rest = h << np.uint64(12)
                        rank = 53 if rest == np.uint64(0) else 65 - bit_length(rest)
                        index = h >> np.uint64(52)
                        if rank > registers[index]:
                            registers[index] = rank
                count = _estimate(registers)
            out_count[q] = count


@njit(cache=True, nogil=True)
def top_codes(starts, event, known, until, codes, n_codes, q_starts, q_at, window, k, out_codes, out_count):
    """The `k` most frequent codes of each window, most frequent first, the smaller code first among equals."""
    counts, marks = np.zeros(n_codes, np.int64), np.zeros(n_codes, np.int64)
    for e in range(len(starts) - 1):
        found = np.empty(starts[e + 1] - starts[e], np.int64)
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            n = 0
            low = after(event, starts[e], starts[e + 1], t - window)
            for i in range(low, after(event, starts[e], starts[e + 1], t)):
                c = codes[i]
                if c >= 0 and known[i] <= t < until[i]:
                    if marks[c] != q + 1:
                        marks[c] = q + 1
                        counts[c] = 0
                        found[n] = c
                        n += 1
                    counts[c] += 1
            for place in range(min(k, n)):
                best = place
                for j in range(place + 1, n):
                    more, fewer = counts[found[j]], counts[found[best]]
                    if more > fewer or (more == fewer and found[j] < found[best]):
                        best = j
                found[place], found[best] = found[best], found[place]
                out_codes[q, place] = found[place]
            out_count[q] = min(k, n)
