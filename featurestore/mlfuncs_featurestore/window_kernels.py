"""Sliding windows over grouped events (numba); `windows` has the specification.

All kernels take the events of entity e in [starts[e], starts[e+1]), in event order, and its queries in
[q_starts[e], q_starts[e+1]), by time. `fifo[e]` says that events become known in event order and are never corrected:
windows are then a range that only moves forward; otherwise each query looks at every event of its window.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from mlfuncs_featurestore.exact_kernels import (
    EXPONENTS,
    LIMBS,
    MANTISSA,
    SQUARE_LIMBS,
    add_128,
    bit_length,
    exponent_range,
    limbs_add,
    limbs_add_square,
    limbs_normal,
    round_128,
    round_limbs,
    round_spread,
    shifted,
    split,
    subtract_128,
)

REGISTERS = 4096
FIRST, LAST = 0, 1


@njit(cache=True)
def _clear(array):
    """Zeros; an assignment to a slice takes numba seconds to compile."""
    for i in range(len(array)):
        array[i] = 0


@njit(cache=True, nogil=True)
def find_fifo(starts, known, until):
    """Per entity, whether events become known in event order and stay (uint8)."""
    fifo = np.ones(len(starts) - 1, np.uint8)
    for e in range(len(starts) - 1):
        for i in range(starts[e], starts[e + 1]):
            if until[i] != 0x7FFFFFFFFFFFFFFF or (i > starts[e] and known[i] < known[i - 1]):
                fifo[e] = 0
                break
    return fifo


@njit(cache=True)
def _after(event, first, last, moment):
    """The first of the events [first, last) that is later than `moment`."""
    while first < last:
        middle = (first + last) >> 1
        if event[middle] <= moment:
            first = middle + 1
        else:
            last = middle
    return first


@njit(cache=True, nogil=True)
def float_prefixes(starts, fifo, bits, valid):
    """Running sums of each entity's values as 128-bit integers, and running counts, for `prefix_sums`.

    Returns (high, low, count, base): the value of entity e's sum up to and with event i is (high[i], low[i]) times
    2**(base[e] - 1075). base[e] is 0 where that does not hold: the entity is not fifo, or has a NaN, an infinity or
    too wide a range of exponents.
    """
    n = len(bits)
    high, low, count = np.empty(n, np.int64), np.empty(n, np.uint64), np.empty(n, np.int64)
    base = np.zeros(len(starts) - 1, np.int64)
    for e in range(len(starts) - 1):
        if not fifo[e]:
            continue
        first, last = starts[e], starts[e + 1]
        smallest, top = exponent_range(bits, valid, first, last)
        if top - smallest + 53 + bit_length(np.uint64(last - first)) > 126:
            continue
        base[e] = smallest
        a, b, c = np.int64(0), np.uint64(0), 0
        for i in range(first, last):
            if valid[i]:
                exponent, mantissa = split(bits[i])
                if exponent == EXPONENTS:
                    base[e] = 0
                    break
                c += 1
                if mantissa:
                    more_high, more_low = shifted(mantissa, exponent - smallest)
                    if bits[i] >= 0:
                        a, b = add_128(a, b, more_high, more_low)
                    else:
                        a, b = subtract_128(a, b, more_high, more_low)
            high[i], low[i], count[i] = a, b, c
    return high, low, count, base


@njit(cache=True, nogil=True)
def prefix_sums(starts, event, known, prefixes, q_starts, q_at, window, out_sum, out_count):
    """Exact sums, rounded once, and counts, of the entities that have prefixes: each is one difference."""
    high, low, count, base = prefixes
    for e in range(len(starts) - 1):
        if base[e] == 0:
            continue
        first, last = starts[e], starts[e + 1]
        head, tail = first, first
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            while tail < last and known[tail] <= t:
                tail += 1
            while head < tail and event[head] <= t - window:
                head += 1
            if head == tail:
                out_sum[q], out_count[q] = 0.0, 0
                continue
            a, b, c = high[tail - 1], low[tail - 1], count[tail - 1]
            if head > first:
                a, b = subtract_128(a, b, high[head - 1], low[head - 1])
                c -= count[head - 1]
            out_sum[q], out_count[q] = round_128(a, b, base[e] - 1075), c


@njit(cache=True, nogil=True)
def float_sums(starts, event, known, until, bits, valid, base_of, q_starts, q_at, window, out_sum, out_count):
    """Exact sums of float64 `bits`, rounded once, and counts of valid values; entities with a `base_of` are skipped.

    Each query adds up its window anew.
    """
    limbs, scratch = np.zeros(LIMBS, np.int64), np.zeros(LIMBS, np.int64)
    for e in range(len(starts) - 1):
        first, last = starts[e], starts[e + 1]
        if base_of[e] != 0 or q_starts[e] == q_starts[e + 1]:
            continue
        base, top = exponent_range(bits, valid, first, last)
        narrow = top - base + 53 + bit_length(np.uint64(last - first)) <= 126
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            high, low, count = np.int64(0), np.uint64(0), 0
            nan, infinite, negative_infinite = False, False, False
            _clear(limbs)
            for i in range(_after(event, first, last, t - window), _after(event, first, last, t)):
                if not valid[i] or not (known[i] <= t < until[i]):
                    continue
                count += 1
                b = bits[i]
                exponent, mantissa = split(b)
                if exponent == EXPONENTS:
                    nan = nan or (b & MANTISSA) != 0
                    infinite = infinite or ((b & MANTISSA) == 0 and b > 0)
                    negative_infinite = negative_infinite or ((b & MANTISSA) == 0 and b < 0)
                elif not narrow:
                    limbs_add(limbs, mantissa, exponent - base, 1 if b >= 0 else -1)
                elif mantissa:
                    more_high, more_low = shifted(mantissa, exponent - base)
                    if b >= 0:
                        high, low = add_128(high, low, more_high, more_low)
                    else:
                        high, low = subtract_128(high, low, more_high, more_low)
            out_count[q] = count
            if nan or (infinite and negative_infinite):
                out_sum[q] = np.nan
            elif infinite or negative_infinite:
                out_sum[q] = np.inf if infinite else -np.inf
            elif narrow:
                out_sum[q] = round_128(high, low, base - 1075)
            else:
                negative = limbs_normal(limbs, scratch)
                rounded = round_limbs(scratch, base - 1075)
                out_sum[q] = -rounded if negative else rounded


@njit(cache=True, nogil=True)
def int_sums(starts, event, known, until, fifo, values, valid, q_starts, q_at, window, out_sum, out_float, out_count):
    """Exact sums of int64 values (also as the nearest float64) and counts; returns whether a sum leaves int64."""
    overflow = False
    for e in range(len(starts) - 1):
        first, last = starts[e], starts[e + 1]
        high, low, count = np.int64(0), np.uint64(0), 0
        head, tail = first, first
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            if fifo[e]:
                start = tail
                while tail < last and known[tail] <= t:
                    tail += 1
                stop = tail
            else:
                high, low, count = np.int64(0), np.uint64(0), 0
                start, stop = _after(event, first, last, t - window), _after(event, first, last, t)
            sign = 1
            while True:
                for i in range(start, stop):
                    if not valid[i] or (not fifo[e] and not (known[i] <= t < until[i])):
                        continue
                    count += sign
                    spread = np.int64(-1) if values[i] < 0 else np.int64(0)
                    if sign > 0:
                        high, low = add_128(high, low, spread, np.uint64(values[i]))
                    else:
                        high, low = subtract_128(high, low, spread, np.uint64(values[i]))
                if sign < 0 or not fifo[e]:
                    break
                start = head
                while head < tail and event[head] <= t - window:
                    head += 1
                stop, sign = head, -1
            out_count[q] = count
            out_sum[q] = np.int64(low)
            out_float[q] = round_128(high, low, 0)
            if high != (np.int64(-1) if np.int64(low) < 0 else np.int64(0)):
                overflow = True
    return overflow


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
        _clear(sums)
        _clear(squares)
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
                _clear(sums)
                _clear(squares)
                start, stop = _after(event, first, last, t - window), _after(event, first, last, t)
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


@njit(cache=True, nogil=True)
def largest(starts, event, known, until, fifo, keys, valid, q_starts, q_at, window, out_index):
    """The event with the greatest key in each query's window, the latest of equals; -1 when it is empty.

    A queue of candidates, each smaller than the one before it (the ascending minima of Knuth's sliding window).
    """
    queue = np.empty(max(1, len(keys)), np.int64)
    for e in range(len(starts) - 1):
        first, last = starts[e], starts[e + 1]
        front, back, tail = 0, 0, first
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            if fifo[e]:
                while tail < last and known[tail] <= t:
                    if valid[tail]:
                        while back > front and keys[queue[back - 1]] <= keys[tail]:
                            back -= 1
                        queue[back] = tail
                        back += 1
                    tail += 1
                while front < back and event[queue[front]] <= t - window:
                    front += 1
                out_index[q] = queue[front] if front < back else -1
                continue
            best = -1
            for i in range(_after(event, first, last, t - window), _after(event, first, last, t)):
                if valid[i] and known[i] <= t < until[i] and (best < 0 or keys[i] >= keys[best]):
                    best = i
            out_index[q] = best


@njit(cache=True, nogil=True)
def ends(starts, event, known, until, valid, q_starts, q_at, window, which, out_index):
    """The first or last valid event of each query's window; -1 when it is empty."""
    for e in range(len(starts) - 1):
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            low = _after(event, starts[e], starts[e + 1], t - window)
            high = _after(event, starts[e], starts[e + 1], t)
            found = -1
            for step in range(high - low):
                i = low + step if which == FIRST else high - 1 - step
                if valid[i] and known[i] <= t < until[i]:
                    found = i
                    break
            out_index[q] = found


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
            low = _after(event, starts[e], starts[e + 1], t - window)
            high = _after(event, starts[e], starts[e + 1], t)
            mark += 1
            count = 0
            for i in range(low, high):
                if codes[i] >= 0 and known[i] <= t < until[i] and seen[codes[i]] != mark:
                    seen[codes[i]] = mark
                    count += 1
            if count > bound:
                _clear(registers)
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
            low = _after(event, starts[e], starts[e + 1], t - window)
            for i in range(low, _after(event, starts[e], starts[e + 1], t)):
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
