"""Exact sums over sliding windows (numba); `windows` has the specification, `exact_kernels` the arithmetic.

An entity's values become 128-bit integers times one power of two, and those running sums: a window over events that
become known in order is one subtraction, whatever its length, and all windows share the running sums. Floats that are
not finite, or whose exponents span too much for 128 bits, are added up as limbs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mlfuncs_featurestore.exact_kernels import (
    EXPONENTS,
    LIMBS,
    MANTISSA,
    add_128,
    bit_length,
    exponent_range,
    limbs_add,
    limbs_normal,
    round_128,
    round_limbs,
    shifted,
    split,
    subtract_128,
)
from mlfuncs_featurestore.window_kernels import after, clear, largest_group

NOTHING, FLOATS, INTS, DECIMALS = range(4)  # what there is to add up
BLOCK = 256  # moments between adding up and rounding: their sums stay in the fastest cache
WIDE = -(2**62)  # instead of a power of two: a value is not finite, or the exponents span too much


@njit(cache=True, nogil=True)
def window_sums(events, column, moments, windows, rows, out):
    """The sum, mean and count of every window of length windows[w] at every moment q.

    events: (starts, event, known, until, fifo) as `window_kernels` has them. column: (kind, low, high, valid, unit);
    `low` holds the bits of FLOATS, INTS, or the low words of DECIMALS in `unit`ths, whose high words are `high`.
    moments: (starts, at). out: (floats, wholes, decimals); rows (3, windows) has the rows of it that take a window's
    sum, mean and count, -1: none. Sums of FLOATS and means go to floats[row, q], counts and sums of INTS to
    wholes[row, q], sums of DECIMALS to decimals[row, q] as low and high word. A mean is the exact sum rounded to
    float64 and then divided; NaN when there is nothing to divide by.

    Returns per entity whether it is left to `wide_sums`, per window whether all its sums of INTS are in int64 (uint8).
    """
    starts, q_starts = events[0], moments[0]
    size = largest_group(starts) + 1
    running = np.empty((size, 2), np.int64), np.empty(size, np.int64)
    block = np.empty((BLOCK, 2), np.int64), np.empty(BLOCK, np.int64)
    wide, fits = np.zeros(len(starts) - 1, np.uint8), np.ones(len(windows), np.uint8)
    for e in range(len(starts) - 1):
        if q_starts[e] == q_starts[e + 1]:
            continue
        power = _run_up(column, starts[e], starts[e + 1], running)
        if power == WIDE:
            wide[e] = 1
            continue
        for w in range(len(windows)):
            places = (rows[0, w], rows[1, w], rows[2, w])
            fits[w] &= _narrow_window(events, column, e, moments, windows[w], places, out, power, running, block)
    return wide, fits


@njit(cache=True, nogil=True)
def wide_sums(events, column, moments, windows, rows, out, wide):
    """As `window_sums`, for the entities of FLOATS that are `wide`."""
    for e in range(len(wide)):
        for w in range(len(windows)):
            if wide[e]:
                _wide_window(events, column, e, moments, windows[w], (rows[0, w], rows[1, w], rows[2, w]), out)


@njit(cache=True)
def _run_up(column, first, last, running):
    """Running sums of events [first, last): sums[j] and counts[j] are those of the first j, a sum as (high, low) word.

    Returns the power of two that the sums are to be multiplied by, or WIDE.
    """
    kind, low, high, valid, _ = column
    sums, counts = running
    base, power = np.int64(0), np.int64(0)
    if kind == FLOATS:
        base, top = exponent_range(low, valid, first, last)
        if top - base + 53 + bit_length(np.uint64(last - first)) > 126:
            return np.int64(WIDE)
        power = base - 1075
    a, b, count = np.int64(0), np.uint64(0), np.int64(0)
    sums[0, 0], sums[0, 1], counts[0] = 0, 0, 0
    for i in range(first, last):
        if valid[i]:
            count += 1
            if kind == FLOATS:
                exponent, mantissa = split(low[i])
                if exponent == EXPONENTS:
                    return np.int64(WIDE)
                if mantissa:
                    more_high, more_low = shifted(mantissa, exponent - base)
                    if low[i] >= 0:
                        a, b = add_128(a, b, more_high, more_low)
                    else:
                        a, b = subtract_128(a, b, more_high, more_low)
            elif kind != NOTHING:
                a, b = add_128(a, b, high[i] if kind == DECIMALS else low[i] >> 63, np.uint64(low[i]))
        j = i - first + 1
        sums[j, 0], sums[j, 1], counts[j] = a, np.int64(b), count
    return power


@njit(cache=True)
def _narrow_window(events, column, e, moments, window, places, out, power, running, block):
    """Windows by running sums. Of events that become known in order each is a range, which only moves forward; else
    each looks at all of its events.
    """
    starts, event, known, until, fifo = events
    q_starts, q_at = moments
    sums, counts = running
    block_sums, block_counts = block
    first, last, fits = starts[e], starts[e + 1], True
    head, tail = first, first
    for q in range(q_starts[e], q_starts[e + 1], BLOCK):
        n = min(BLOCK, q_starts[e + 1] - q)
        for k in range(n):
            t = q_at[q + k]
            if fifo[e]:
                while tail < last and known[tail] <= t:
                    tail += 1
                while head < tail and event[head] <= t - window:
                    head += 1
                i, j = head - first, tail - first
                count = counts[j] - counts[i]
                a, b = subtract_128(sums[j, 0], np.uint64(sums[j, 1]), sums[i, 0], np.uint64(sums[i, 1]))
            else:
                a, b, count = np.int64(0), np.uint64(0), np.int64(0)
                for i in range(after(event, first, last, t - window) - first, after(event, first, last, t) - first):
                    if known[first + i] <= t < until[first + i]:
                        count += counts[i + 1] - counts[i]
                        a, b = add_128(a, b, sums[i + 1, 0], np.uint64(sums[i + 1, 1]))
                        a, b = subtract_128(a, b, sums[i, 0], np.uint64(sums[i, 1]))
            block_sums[k, 0], block_sums[k, 1], block_counts[k] = a, np.int64(b), count
        fits &= _write(column, power, block, q, n, places, out)
    return fits


@njit(cache=True)
def _write(column, power, block, q, n, places, out):
    """Round and write the sums, means and counts of moments q to q + n; returns whether all sums of INTS fit."""
    kind, unit = column[0], column[4]
    (sums, counts), (to_sum, to_mean, to_count), (floats, wholes, decimals) = block, places, out
    fits = True
    if to_count >= 0:
        for k in range(n):
            wholes[to_count, q + k] = counts[k]
    if kind == INTS and to_sum >= 0:
        for k in range(n):
            wholes[to_sum, q + k] = sums[k, 1]
            fits &= sums[k, 0] == sums[k, 1] >> 63
    elif kind == DECIMALS and to_sum >= 0:
        for k in range(n):
            decimals[to_sum, q + k, 0], decimals[to_sum, q + k, 1] = sums[k, 1], sums[k, 0]
    if kind == FLOATS and to_sum >= 0:
        for k in range(n):
            floats[to_sum, q + k] = round_128(sums[k, 0], np.uint64(sums[k, 1]), power)
        if to_mean >= 0:
            for k in range(n):
                floats[to_mean, q + k] = floats[to_sum, q + k] / counts[k] if counts[k] else np.nan
    elif to_mean >= 0:
        for k in range(n):
            total = round_128(sums[k, 0], np.uint64(sums[k, 1]), power)
            floats[to_mean, q + k] = total / (counts[k] * unit) if counts[k] else np.nan
    return fits


@njit(cache=True)
def _wide_window(events, column, e, moments, window, places, out):
    """Any FLOATS: limbs take events in and, where windows only move forward, out again."""
    starts, event, known, until, fifo = events
    low, valid = column[1], column[3]
    q_starts, q_at = moments
    first, last = starts[e], starts[e + 1]
    base, top = exponent_range(low, valid, first, last)
    used = min(LIMBS, (top - base + 53 + bit_length(np.uint64(last - first))) // 32 + 3)
    limbs, scratch, state = np.zeros(used, np.int64), np.zeros(used, np.int64), np.zeros(4, np.int64)
    head, tail, enters, leaves = first, first, np.int64(1), np.int64(-1)
    for q in range(q_starts[e], q_starts[e + 1]):
        t = q_at[q]
        if fifo[e]:
            while tail < last and known[tail] <= t:
                _enter(low, valid, tail, base, enters, limbs, state)
                tail += 1
            while head < tail and event[head] <= t - window:
                _enter(low, valid, head, base, leaves, limbs, state)
                head += 1
        else:
            clear(limbs)
            clear(state)
            for i in range(after(event, first, last, t - window), after(event, first, last, t)):
                if known[i] <= t < until[i]:
                    _enter(low, valid, i, base, enters, limbs, state)
        total, count = _wide_total(limbs, state, base, scratch), state[0]
        if places[0] >= 0:
            out[0][places[0], q] = total
        if places[1] >= 0:
            out[0][places[1], q] = total / count if count else np.nan
        if places[2] >= 0:
            out[1][places[2], q] = count


@njit(cache=True)
def _enter(bits, valid, i, base, sign, limbs, state):
    """Add event i's value, or take it away; state counts the values, and of them NaN, inf and -inf."""
    if not valid[i]:
        return
    state[0] += sign
    exponent, mantissa = split(bits[i])
    if exponent != EXPONENTS:
        limbs_add(limbs, mantissa, exponent - base if mantissa else np.int64(0), sign if bits[i] >= 0 else -sign)
    elif bits[i] & MANTISSA:
        state[1] += sign
    else:
        state[2 if bits[i] > 0 else 3] += sign


@njit(cache=True)
def _wide_total(limbs, state, base, scratch):
    """The sum in `limbs`, rounded once; NaN and infinities as `state` counts them."""
    if state[1] or (state[2] and state[3]):
        return np.nan
    if state[2] or state[3]:
        return np.inf if state[2] else -np.inf
    negative = limbs_normal(limbs, scratch)
    rounded = round_limbs(scratch, base - 1075)
    return -rounded if negative else rounded
