"""Exact sums of float64 values: fixed-point accumulators that can also take back what they added (numba).

Owns: the arithmetic under window sums. A finite float is m * 2**(e - 1075) with m < 2**53 (IEEE 754). With `base` the
smallest e of a group, every value is an integer multiple of 2**(base - 1075), so sums are integers: 128 bits when the
group's exponents span little (nearly always), else limbs of 32 bits (the small superaccumulator of Neal 2015). An
integer sum is rounded once, half to even, so the result is the float nearest to the true sum: it does not depend on
the order of the values, and equals `math.fsum`.
"""

from __future__ import annotations

import numpy as np
from llvmlite.ir import Constant, IntType
from numba import njit, types
from numba.extending import intrinsic

LIMBS = 72  # 32 bits each: 2046 exponents + 53 bits + 2**31 values
SQUARE_LIMBS = 2 * LIMBS
MANTISSA = np.int64((1 << 52) - 1)
IMPLICIT = np.int64(1 << 52)
EXPONENTS = np.int64(0x7FF)
LOW32 = np.int64(0xFFFFFFFF)
# 2.0**k for k from -1074 to 1023
POWERS = np.array([2.0**k for k in range(-1074, 1024)])


@njit(cache=True)
def split(bits):
    """Exponent field (1 for subnormals) and mantissa of the float with these bits."""
    exponent = (bits >> 52) & EXPONENTS
    mantissa = bits & MANTISSA
    if exponent == 0:
        return np.int64(1), mantissa
    return exponent, mantissa | IMPLICIT


@intrinsic
def _leading_zeros(_context, value):
    """Bits of a uint64 above its highest set one; 64 for 0. One instruction where a loop would guess branches."""

    def generate(_context, builder, _signature, arguments):
        return builder.ctlz(arguments[0], Constant(IntType(1), 0))

    return types.uint64(types.uint64), generate


@njit(cache=True)
def bit_length(value):
    """Bits of a uint64 up to its highest set one."""
    return 64 - np.int64(_leading_zeros(np.uint64(value)))  # type: ignore[call-arg]


@njit(cache=True)
def scale(whole, power):
    """whole * 2**power as float64 for whole < 2**54 that is exact or overflows to infinity."""
    if power > 1023:
        return np.float64(whole) * np.inf if whole else 0.0
    return np.float64(whole) * POWERS[power + 1074]


@njit(cache=True)
def round_128(high, low, power):
    """The float64 nearest to the signed 128-bit integer (high, low) times 2**power; power >= -1074.

    The processor rounds 64 bits to 53; whatever lies below the highest 64 is folded into the last of them, where it
    only tells "more than half" from "half".
    """
    a, b = np.uint64(high), low
    if high < 0:
        b = ~b + np.uint64(1)
        a = ~a + (np.uint64(1) if b == np.uint64(0) else np.uint64(0))
    if a == np.uint64(0):
        value = _times_power(np.float64(b), power)
    else:
        up = np.uint64(64 - bit_length(a))
        rest = b << up
        top = (a << up) | ((b >> np.uint64(1)) >> (np.uint64(63) - up))
        if rest != np.uint64(0):
            top |= np.uint64(1)
        value = _times_power(np.float64(top), power + 64 - np.int64(up))
    return -value if high < 0 else value


@njit(cache=True)
def _times_power(whole, power):
    """whole * 2**power for a float64 that is whole (beyond 1023: not 0): exact, as power >= -1074, or infinite."""
    return whole * POWERS[power + 1074] if power <= 1023 else np.inf


@njit(cache=True)
def shifted(mantissa, shift):
    """mantissa << shift as a 128-bit (high, low); the result stays below 2**127."""
    m, s = np.uint64(mantissa), np.uint64(shift)
    if shift == 0:
        return np.int64(0), m
    if shift < 64:
        return np.int64(m >> (np.uint64(64) - s)), m << s
    return np.int64(m << (s - np.uint64(64))), np.uint64(0)


@njit(cache=True)
def add_128(high, low, other_high, other_low):
    """The sum of two 128-bit integers."""
    total = low + other_low
    return high + other_high + (np.int64(1) if total < low else np.int64(0)), total


@njit(cache=True)
def subtract_128(high, low, other_high, other_low):
    """The difference of two 128-bit integers."""
    return high - other_high - (np.int64(1) if low < other_low else np.int64(0)), low - other_low


@njit(cache=True)
def exponent_range(bits, valid, first, last):
    """Smallest and largest exponent field of the finite values other than 0 in [first, last); (1, 1) when none."""
    low, high = np.int64(0x7FF), np.int64(0)
    for i in range(first, last):
        if valid[i] and (bits[i] << 1) != 0:
            exponent = (bits[i] >> 52) & EXPONENTS
            if exponent != EXPONENTS:
                exponent = max(exponent, np.int64(1))
                low, high = min(low, exponent), max(high, exponent)
    if high == 0:
        return np.int64(1), np.int64(1)
    return low, high


@njit(cache=True)
def limbs_add(limbs, mantissa, shift, sign):
    """Add sign * (mantissa << shift) to limbs of 32 bits whose carries are left for `limbs_normal`."""
    at, offset = shift >> 5, np.uint64(shift & 31)
    m = np.uint64(mantissa)
    low = m << offset
    high = m >> (np.uint64(64) - offset) if offset else np.uint64(0)
    limbs[at] += sign * np.int64(low & np.uint64(0xFFFFFFFF))
    limbs[at + 1] += sign * np.int64(low >> np.uint64(32))
    limbs[at + 2] += sign * np.int64(high)


@njit(cache=True)
def limbs_add_square(limbs, mantissa, shift, sign):
    """Add sign * (mantissa << shift)**2."""
    m = np.uint64(mantissa)
    high, low = m >> np.uint64(32), m & np.uint64(0xFFFFFFFF)
    middle = high * low * np.uint64(2)  # below 2**54
    limbs_add(limbs, np.int64((low * low) & np.uint64(0xFFFFFFFF)), 2 * shift, sign)
    limbs_add(limbs, np.int64((low * low) >> np.uint64(32)), 2 * shift + 32, sign)
    limbs_add(limbs, np.int64(middle), 2 * shift + 32, sign)
    limbs_add(limbs, np.int64(high * high), 2 * shift + 64, sign)


@njit(cache=True)
def limbs_normal(limbs, normal):
    """Write the magnitude of `limbs` into `normal`, each limb in [0, 2**32); returns whether it was negative."""
    carry = np.int64(0)
    for i in range(len(limbs)):
        total = limbs[i] + carry
        normal[i] = total & LOW32
        carry = total >> 32
    if carry >= 0:
        return False
    borrow = np.int64(1)
    for i in range(len(limbs)):
        total = (LOW32 - normal[i]) + borrow
        normal[i] = total & LOW32
        borrow = total >> 32
    return True


@njit(cache=True)
def round_limbs(normal, power):
    """The float64 nearest to the magnitude in `normal` times 2**power; power may lie far below -1074."""
    top = len(normal) - 1
    while top >= 0 and normal[top] == 0:
        top -= 1
    if top < 0:
        return 0.0
    length = 32 * top + bit_length(np.uint64(normal[top]))
    drop = max(length - 53, -1074 - power, 0)  # bits below the result's last one
    if drop > length:
        return 0.0
    whole = np.uint64(0)
    for i in range(top, (drop >> 5) - 1, -1):
        if i > (drop >> 5):
            whole |= np.uint64(normal[i]) << np.uint64(32 * i - drop)
        else:
            whole |= np.uint64(normal[i]) >> np.uint64(drop & 31)
    if drop > 0:
        at, bit = (drop - 1) >> 5, np.uint64((drop - 1) & 31)
        half = (np.uint64(normal[at]) >> bit) & np.uint64(1)
        sticky = (np.uint64(normal[at]) & ((np.uint64(1) << bit) - np.uint64(1))) != 0
        i = at - 1
        while not sticky and i >= 0:
            sticky = normal[i] != 0
            i -= 1
        if half and (sticky or (whole & np.uint64(1))):
            whole += np.uint64(1)
    return scale(np.int64(whole), power + drop)


@njit(cache=True)
def round_spread(count, sums, squares, power, scratch, wide):
    """count * squares - sums**2 (exact integers times 2**(2 * power)), rounded once; never below 0.

    `scratch` has LIMBS and `wide` SQUARE_LIMBS entries; both are overwritten.
    """
    limbs_normal(sums, scratch)
    used = len(scratch)
    while used > 0 and scratch[used - 1] == 0:
        used -= 1
    carry = np.int64(0)
    for i in range(len(wide)):  # count * squares, normalised; count < 2**31
        total = squares[i] + carry
        wide[i] = total & LOW32
        carry = total >> 32
    left = np.uint64(0)
    for i in range(len(wide)):
        total = np.uint64(wide[i]) * np.uint64(count) + left
        wide[i] = np.int64(total & np.uint64(0xFFFFFFFF))
        left = total >> np.uint64(32)
    for i in range(used):  # minus the square, product by product
        if scratch[i] == 0:
            continue
        borrow = np.int64(0)
        for j in range(used):
            product = np.uint64(scratch[i]) * np.uint64(scratch[j])
            total = wide[i + j] - np.int64(product & np.uint64(0xFFFFFFFF)) + borrow
            wide[i + j] = total & LOW32
            borrow = (total >> 32) - np.int64(product >> np.uint64(32))
        k = i + used
        while borrow != 0 and k < len(wide):
            total = wide[k] + borrow
            wide[k] = total & LOW32
            borrow = total >> 32
            k += 1
    return round_limbs(wide, 2 * power)
