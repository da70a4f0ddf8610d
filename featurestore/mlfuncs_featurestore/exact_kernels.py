"""Exact sums of float64 values: fixed-point accumulators that can also take back what they added (numba).

Owns: the arithmetic under window sums. A finite float is m * 2**(e - 1075) with m < 2**53 (IEEE 754). With `base` the
smallest e of a group, every value is an integer multiple of 2**(base - 1075), so sums are integers: 128 bits when the
group's exponents span little (nearly always), else limbs of 32 bits (the small superaccumulator of Neal 2015). An
integer sum is rounded once, half to even, so the result is the float nearest to the true sum: it does not depend on
the order of the values, and equals `math.fsum`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

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


@njit(cache=True)
def bit_length(value):
    """Bits of a uint64 up to its highest set one."""
    n = 0
    if value >> np.uint64(32):
        n += 32
        value >>= np.uint64(32)
    if value >> np.uint64(16):
        n += 16
        value >>= np.uint64(16)
    if value >> np.uint64(8):
        n += 8
        value >>= np.uint64(8)
    if value >> np.uint64(4):
        n += 4
        value >>= np.uint64(4)
    if value >> np.uint64(2):
        n += 2
        value >>= np.uint64(2)
    if value >> np.uint64(1):
        n += 1
        value >>= np.uint64(1)
    return n + int(value)


@njit(cache=True)
def scale(whole, power):
    """whole * 2**power as float64 for whole < 2**54 that is exact or overflows to infinity."""
    if power > 1023:
        return np.float64(whole) * np.inf if whole else 0.0
    return np.float64(whole) * POWERS[power + 1074]


@njit(cache=True)
def round_128(high, low, power):
    """The float64 nearest to the signed 128-bit integer (high, low) times 2**power; power >= -1074."""
    negative = high < 0
    a, b = np.uint64(high), low
    if negative:
        b = ~b + np.uint64(1)
        a = ~a + (np.uint64(1) if b == np.uint64(0) else np.uint64(0))
    length = 64 + bit_length(a) if a else bit_length(b)
    if length <= 53:
        value = scale(np.int64(b), power)
        return -value if negative else value
    drop = length - 53
    if drop < 64:
        d = np.uint64(drop)
        whole = (b >> d) | (a << (np.uint64(64) - d))
        rest = b & ((np.uint64(1) << d) - np.uint64(1))
        half = np.uint64(1) << (d - np.uint64(1))
        above, tie = rest > half, rest == half
    else:
        d = np.uint64(drop - 64)
        whole = a >> d
        rest = a & ((np.uint64(1) << d) - np.uint64(1))
        if drop == 64:
            half = np.uint64(1) << np.uint64(63)
            above, tie = b > half, b == half
        else:
            half = np.uint64(1) << (d - np.uint64(1))
            above = rest > half or (rest == half and b > np.uint64(0))
            tie = rest == half and b == np.uint64(0)
    if above or (tie and (whole & np.uint64(1))):
        whole += np.uint64(1)
    value = scale(np.int64(whole), power + drop)
    return -value if negative else value


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
