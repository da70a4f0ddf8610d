"""Compiled kernels, ready before they are needed: `python -m mlfuncs_featurestore.kernels`.

Owns: the warm-up. numba keeps compiled code on disk beside the modules, or in NUMBA_CACHE_DIR, or in the user's cache
directory when the modules' folder cannot be written; whoever installs runs this once, and no later process compiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def warm_up() -> float:
    """Call every kernel once with the types it will meet; returns the CPU seconds that took."""
    started = time.process_time()
    for kernel, arguments in _calls():
        kernel(*arguments)
    return time.process_time() - started


def compiling(kernel: Any) -> Any:
    """A context that shows a progress line where `kernel` was never compiled in this installation, else nothing."""
    from mlfuncs.progress import progress

    return progress("Compiling kernels, once per installation", enabled=not is_compiled(kernel))


def is_compiled(kernel: Any) -> bool:
    """Whether compiled code of the kernel is on disk, made after the source was."""
    function = kernel.py_func
    source = Path(function.__code__.co_filename)
    found = Path(kernel.stats.cache_path).glob(f"{source.stem}.{function.__name__}-*.nbi")
    return any(index.stat().st_mtime >= source.stat().st_mtime for index in found)


def dispatchers() -> list[Any]:
    """Every kernel that Python code calls."""
    return [kernel for kernel, _ in _calls()]


def _calls() -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    from mlfuncs_featurestore import (
        asof_kernels,
        distinct_kernels,
        hash_kernels,
        spread_kernels,
        sum_kernels,
        window_kernels,
    )

    i8, u8, bits = np.zeros(2, np.int64), np.zeros(2, np.uint64), np.ones(2, np.float64).view(np.int64)
    valid, starts, count = np.ones(2, np.uint8), np.array([0, 2], np.int64), np.zeros(2, np.int64)
    base = (starts, i8, i8, np.full(2, 2**63 - 1))
    fifo = np.ones(1, np.uint8)
    at = (starts, i8, 5)
    events, moments, rows = (*base, fifo), (starts, i8), np.full((3, 1), -1)
    summands = (sum_kernels.FLOATS, bits, i8[:0], valid, 1.0)
    out = (np.zeros((1, 2)), np.zeros((1, 2), np.int64), np.zeros((1, 2, 2), np.int64))
    found = np.zeros((1, 2), np.uint8)
    _, n, slots, numbers = asof_kernels.number_ints(i8)
    best = np.full((4, 2), -1, np.int64)
    return [
        (hash_kernels.hash_ints, (i8,)),
        (hash_kernels.hash_spans, (np.array([0, 1], np.int64), np.zeros(1, np.uint8))),
        (hash_kernels.combine, (u8, u8)),
        (hash_kernels.hll_add, (np.zeros(4096, np.uint8), u8)),
        (asof_kernels.number_ints, (i8,)),
        (asof_kernels.find_ints, (i8, slots, numbers)),
        (asof_kernels.group_events, (i8, n, i8, i8, i8)),
        (asof_kernels.note, (i8, i8, i8, i8, True, 0, starts, i8, best)),
        (asof_kernels.sweep, (starts, best)),
        (window_kernels.find_fifo, (starts, i8, i8)),
        (window_kernels.window_extremes, (events, (i8, valid, True, True), moments, i8[:1], out[1], found)),
        (window_kernels.ends, (*base, valid, *at, 0, count)),
        (sum_kernels.window_sums, (events, summands, moments, i8[:1], rows, out)),
        (sum_kernels.wide_sums, (events, summands, moments, i8[:1], rows, out, fifo)),
        (spread_kernels.float_spreads, (*base, fifo, bits, valid, *at, out[0][0], count)),
        (distinct_kernels.distinct, (*base, i8, 1, u8, *at, 5, count)),
        (distinct_kernels.top_codes, (*base, i8, 1, *at, 2, np.zeros((2, 2), np.int64), count)),
    ]


if __name__ == "__main__":
    print(f"kernels are compiled ({warm_up():.1f} CPU seconds)")
