"""Sliding windows over grouped events (numba): extremes, ends, and what all need; `windows` has the specification.

All kernels take the events of entity e in [starts[e], starts[e+1]), in event order, and its queries in
[q_starts[e], q_starts[e+1]), by time. `fifo[e]` says that events become known in event order and are never corrected:
windows are then a range that only moves forward; otherwise each query looks at every event of its window.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FIRST, LAST = 0, 1
NAN_FROM = 0x7FF0000000000000  # the bits of a NaN without its sign are above those of inf
LARGEST = 0x7FFFFFFFFFFFFFFF


@njit(cache=True)
def clear(array):
    """Zeros; an assignment to a slice takes numba seconds to compile."""
    for i in range(len(array)):
        array[i] = 0


@njit(cache=True, nogil=True)
def find_fifo(starts, known, until):
    """Per entity, whether events become known in event order and stay (uint8); `until` may be empty: all stay."""
    fifo = np.ones(len(starts) - 1, np.uint8)
    for e in range(len(starts) - 1):
        for i in range(starts[e], starts[e + 1]):
            replaced = len(until) > 0 and until[i] != LARGEST
            if replaced or (i > starts[e] and known[i] < known[i - 1]):
                fifo[e] = 0
                break
    return fifo


@njit(cache=True)
def after(event, first, last, moment):
    """The first of the events [first, last) that is later than `moment`."""
    while first < last:
        middle = (first + last) >> 1
        if event[middle] <= moment:
            first = middle + 1
        else:
            last = middle
    return first


@njit(cache=True)
def largest_group(starts):
    """How many events the entity with the most has."""
    size = 0
    for e in range(len(starts) - 1):
        size = max(size, starts[e + 1] - starts[e])
    return size


@njit(cache=True)
def _rank(value, is_float, greatest):
    """A number that grows with the value (int64 or the bits of a float64), or falls; NaN is on top either way."""
    if is_float:
        if value & LARGEST > NAN_FROM:
            return LARGEST
        value ^= (value >> 63) & LARGEST
    return value if greatest else ~value


@njit(cache=True, nogil=True)
def window_extremes(events, column, moments, windows, out, found):
    """The greatest or smallest value of every window, the latest of equals, to out[w, q]; found[w, q]: there is one.

    events: (starts, event, known, until, fifo); moments: (starts, at). column: (values, valid, is_float, greatest),
    with `values` int64 or the bits of float64.
    """
    starts, fifo, q_starts = events[0], events[4], moments[0]
    size = largest_group(starts)
    queue, ranks, fronts = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(len(windows), np.int64)
    for e in range(len(starts) - 1):
        if q_starts[e] == q_starts[e + 1]:
            continue
        if fifo[e]:
            _sliding_extremes(events, column, e, moments, windows, out, found, queue, ranks, fronts)
        else:
            for w in range(len(windows)):
                _scattered_extremes(events, column, e, moments, windows[w], out[w], found[w])


@njit(cache=True)
def _sliding_extremes(events, column, e, moments, windows, out, found, queue, ranks, fronts):
    """Candidates are a queue, each beaten only by those before it (the ascending minima of Knuth's sliding window).

    It is the same queue for every window; each has its own first candidate.
    """
    starts, event, known, _, _ = events
    values, valid, is_float, greatest = column
    q_starts, q_at = moments
    last, tail, back = starts[e + 1], starts[e], 0
    clear(fronts)
    for q in range(q_starts[e], q_starts[e + 1]):
        t, kept = q_at[q], back
        while tail < last and known[tail] <= t:
            if valid[tail]:
                rank = _rank(values[tail], is_float, greatest)
                while back > 0 and ranks[back - 1] <= rank:
                    back -= 1
                kept = min(kept, back)
                queue[back], ranks[back] = tail, rank
                back += 1
            tail += 1
        for w in range(len(windows)):
            front = min(fronts[w], kept)
            while front < back and event[queue[front]] <= t - windows[w]:
                front += 1
            fronts[w] = front
            out[w, q] = values[queue[front]] if front < back else 0
            found[w, q] = front < back


@njit(cache=True)
def _scattered_extremes(events, column, e, moments, window, out, found):
    """Of events that become known late or are replaced: each window looks at all of its events."""
    starts, event, known, until, _ = events
    values, valid, is_float, greatest = column
    q_starts, q_at = moments
    first, last = starts[e], starts[e + 1]
    for q in range(q_starts[e], q_starts[e + 1]):
        t = q_at[q]
        best, best_rank = -1, np.int64(0)
        for i in range(after(event, first, last, t - window), after(event, first, last, t)):
            if valid[i] and known[i] <= t < until[i]:
                rank = _rank(values[i], is_float, greatest)
                if best < 0 or rank >= best_rank:
                    best, best_rank = i, rank
        out[q] = values[best] if best >= 0 else 0
        found[q] = best >= 0


@njit(cache=True, nogil=True)
def ends(starts, event, known, until, valid, q_starts, q_at, window, which, out_index):
    """The first or last valid event of each query's window; -1 when it is empty."""
    for e in range(len(starts) - 1):
        for q in range(q_starts[e], q_starts[e + 1]):
            t = q_at[q]
            low = after(event, starts[e], starts[e + 1], t - window)
            high = after(event, starts[e], starts[e + 1], t)
            found = -1
            for step in range(high - low):
                i = low + step if which == FIRST else high - 1 - step
                if valid[i] and known[i] <= t < until[i]:
                    found = i
                    break
            out_index[q] = found
