"""HyperLogLog: how many different values there are, from a fixed 4 KiB of state.

Owns: the estimate. Flajolet, Fusy, Gandouet, Meunier 2007, with linear counting below 2.5 m (Heule, Nunkesser, Hall
2013 keep it there too). With p = 12 the standard error is 1.04 / sqrt(4096) = 1.6 %. The registers depend only on the
set of values, never on their order or number, so batch and stream agree exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

PRECISION = 12
REGISTERS = 1 << PRECISION


def empty_registers() -> bytearray:
    """The state of no values."""
    return bytearray(REGISTERS)


def add_hash(registers: bytearray, hashed: int) -> None:
    """Enter one 64-bit hash, in place."""
    index = hashed >> (64 - PRECISION)
    rest = (hashed << PRECISION) & (2**64 - 1)
    rank = min(64 - rest.bit_length(), 64 - PRECISION) + 1
    registers[index] = max(registers[index], rank)


def estimate(registers: Iterable[int]) -> int:
    """The number of different values, rounded.

    >>> estimate(empty_registers())
    0
    """
    counts = [0] * 66
    for register in registers:
        counts[register] += 1
    total, weight, m = 0.0, 1.0, float(REGISTERS)
    for count in counts:  # this very order of operations is also that of the kernel
        total += count * weight
        weight *= 0.5
    raw = 0.7213 / (1.0 + 1.079 / m) * m * m / total
    if raw <= 2.5 * m and counts[0]:
        return int(m * math.log(m / counts[0]) + 0.5)
    return int(raw + 0.5)
