"""The sums under standard deviations over sliding windows (numba), exact; `windows` has the specification."""

from __future__ import annotations

import numpy as np
from numba import njit

from mlfuncs_featurestore.exact_kernels import (
    EXPONENTS,
    LIMBS,
    SQUARE_LIMBS,
    exponent_range,
    limbs_add,
    limbs_add_square,
    round_spread,
    split,
)
from mlfuncs_featurestore.window_kernels import after, clear


@njit(cache=True, nogil=True)
def float_spreads(starts, event, known, until, fifo, bits, valid, q_starts, q_at, window, out_spread, out_count):
    """count * sum(x**2) - sum(x)**2, exact and rounded once (NaN with a NaN or an infinity), and counts."""
    sums, squares = np.zeros(LIMBS, np.int64), np.zeros(SQUARE_LIMBS, np.int64)
    scratch, wide = np.zeros(LIMBS, np.int64), np.zeros(SQUARE_LIMBS, np.int64)
    for e in range(len(starts) - 1):
        first, last = starts[e], starts[e + 1]
        if q_starts[e] == q_starts[e + 1]:
            continue
        base, _ = exponent_range(bits, valid, first, last)
        count, odd = 0, 0
        clear(sums)
        clear(squares)
        head, tail = first, first
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            if fifo[e]:
                start = tail
                while tail < last and known[tail] <= t:
                    tail += 1
                stop = tail
            else:
                count, odd = 0, 0
                clear(sums)
                clear(squares)
                start, stop = after(event, first, last, t - window), after(event, first, last, t)
            sign = 1
            while True:
                for i in range(start, stop):
                    if not valid[i] or (not fifo[e] and not (known[i] <= t < until[i])):
                        continue
                    count += sign
                    exponent, mantissa = split(bits[i])
                    if exponent == EXPONENTS:
                        odd += sign
                    elif mantissa:
                        limbs_add(sums, mantissa, exponent - base, sign if bits[i] >= 0 else -sign)
                        limbs_add_square(squares, mantissa, exponent - base, sign)
                if sign < 0 or not fifo[e]:
                    break
                start = head
                while head < tail and event[head] <= t - window:
                    head += 1
                stop, sign = head, -1
            out_count[q] = count
            if odd:
                out_spread[q] = np.nan
            else:
                out_spread[q] = round_spread(count, sums, squares, base - 1075, scratch, wide)
