"""The point-in-time join on dense entity ids (numba); `asof` has the meaning.

Spine moments are grouped by entity and ascending: those of entity e are [starts[e], starts[e + 1]) of `at`. History
comes in any order, in as many pieces as one likes: each row is noted at the first moment that may see it, and a sweep
carries the best row forward. So nothing is sorted but the spine, and the state is as large as the spine.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@njit(cache=True)
def _slot(value, mask):
    z = uint64(value)
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return np.int64((z ^ (z >> np.uint64(31))) & mask)


@njit(cache=True)
def _enlarged(slots, numbers):
    """The hash table with four times the places."""
    size = 4 * len(slots)
    mask = np.uint64(size - 1)
    more_slots, more_numbers = np.zeros(size, np.int64), np.full(size, -1, np.int64)
    for i in range(len(slots)):
        if numbers[i] >= 0:
            at = _slot(slots[i], mask)
            while more_numbers[at] >= 0:
                at = (at + 1) & (size - 1)
            more_slots[at], more_numbers[at] = slots[i], numbers[i]
    return more_slots, more_numbers


@njit(cache=True, nogil=True)
def number_ints(values):
    """Dense ids of int64 values in order of appearance, and the hash table (values, ids) that `find_ints` takes.

    The table grows with the different values, at most half full: that of few entities stays in the cache.
    """
    slots, numbers = np.zeros(1024, np.int64), np.full(1024, -1, np.int64)
    ids = np.empty(len(values), np.int64)
    n = 0
    for i in range(len(values)):
        size = len(slots)
        at = _slot(values[i], np.uint64(size - 1))
        while numbers[at] >= 0 and slots[at] != values[i]:
            at = (at + 1) & (size - 1)
        if numbers[at] < 0:
            slots[at], numbers[at] = values[i], n
            n += 1
            ids[i] = n - 1
            if 2 * n > size:
                slots, numbers = _enlarged(slots, numbers)
        else:
            ids[i] = numbers[at]
    return ids, n, slots, numbers


@njit(cache=True, nogil=True)
def find_ints(values, slots, numbers):
    """The ids of int64 values under a table of `number_ints`; -1 for others."""
    size = len(slots)
    mask = np.uint64(size - 1)
    ids = np.empty(len(values), np.int64)
    previous, last = np.int64(0), np.int64(-2)
    for i in range(len(values)):
        if last != -2 and values[i] == previous:  # files are sorted by entity: runs of one value
            ids[i] = last
            continue
        at = _slot(values[i], mask)
        while numbers[at] >= 0 and slots[at] != values[i]:
            at = (at + 1) & (size - 1)
        ids[i] = numbers[at]
        previous, last = values[i], ids[i]
    return ids


def group(ids, n, at):
    """Rows ordered by id and then time (stable): the order, and where each id starts."""
    return group_events(ids, n, at, at, at)


@njit(cache=True, nogil=True)
def group_events(ids, n, event, created, ingest):
    """Rows with an id >= 0 ordered by id and then event order (stable): the order, and where each id starts."""
    starts = np.zeros(n + 1, np.int64)
    for i in range(len(ids)):
        if ids[i] >= 0:
            starts[ids[i] + 1] += 1
    size = 0
    for e in range(n):
        size = max(size, starts[e + 1])
        starts[e + 1] += starts[e]
    place, order = starts[:-1].copy(), np.empty(starts[n], np.int64)
    latest, is_sorted = np.empty(n, np.int64), np.ones(n, np.uint8)
    for i in range(len(ids)):
        e = ids[i]
        if e >= 0:
            if place[e] > starts[e] and event[i] <= latest[e]:
                is_sorted[e] = 0  # or of one time: `_sort` looks closer
            latest[e] = event[i]
            order[place[e]] = i
            place[e] += 1
    spare = np.empty(size, np.int64)
    for e in range(n):
        if not is_sorted[e]:
            _sort(order, spare, starts[e], starts[e + 1], event, created, ingest)
    return order, starts


@njit(cache=True)
def _greater(i, j, event, created, ingest):
    if event[i] != event[j]:
        return event[i] > event[j]
    if created[i] != created[j]:
        return created[i] > created[j]
    return ingest[i] > ingest[j]


@njit(cache=True)
def _sort(order, spare, first, last, event, created, ingest):
    """Merge sort of order[first:last], stable; what is sorted already costs one look. `spare` is as long as that."""
    is_sorted = True
    for i in range(first + 1, last):
        if _greater(order[i - 1], order[i], event, created, ingest):
            is_sorted = False
            break
    if is_sorted:
        return
    width = 1
    while width < last - first:
        for low in range(first, last, 2 * width):
            middle, high = min(low + width, last), min(low + 2 * width, last)
            i, j = low, middle
            for k in range(low, high):
                if i < middle and (j >= high or not _greater(order[i], order[j], event, created, ingest)):
                    spare[k - first] = order[i]
                    i += 1
                else:
                    spare[k - first] = order[j]
                    j += 1
        for k in range(first, last):
            order[k] = spare[k - first]
        width *= 2


@njit(cache=True, nogil=True)
def note(ids, event, created, ingest, aware, first_ref, starts, at, best):
    """Enter history rows into `best` (4, moments): event time, created time, ingest number, row number (-1: none).

    A row may be seen from the later of its event and created time on (`aware`), else from its event time on. Of the
    rows noted at one moment the greatest by (event, created, ingest) stays.
    """
    for i in range(len(ids)):
        e = ids[i]
        if e < 0:
            continue
        known = max(event[i], created[i]) if aware else event[i]
        low, high = starts[e], starts[e + 1]
        end = high
        while low < high:
            middle = (low + high) >> 1
            if at[middle] < known:
                low = middle + 1
            else:
                high = middle
        if low == end:
            continue
        if best[3, low] >= 0:
            if event[i] < best[0, low]:
                continue
            if event[i] == best[0, low]:
                if created[i] < best[1, low]:
                    continue
                if created[i] == best[1, low] and ingest[i] < best[2, low]:
                    continue
        best[0, low], best[1, low], best[2, low], best[3, low] = event[i], created[i], ingest[i], first_ref + i


@njit(cache=True, nogil=True)
def sweep(starts, best):
    """Carry each entity's best row forward in time, in place."""
    for e in range(len(starts) - 1):
        for p in range(starts[e] + 1, starts[e + 1]):
            q = p - 1
            if best[3, q] < 0:
                continue
            if best[3, p] >= 0:
                if best[0, p] > best[0, q]:
                    continue
                if best[0, p] == best[0, q]:
                    if best[1, p] > best[1, q]:
                        continue
                    if best[1, p] == best[1, q] and best[2, p] >= best[2, q]:
                        continue
            for k in range(4):
                best[k, p] = best[k, q]
