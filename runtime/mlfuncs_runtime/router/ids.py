"""Numbers for requests and spans, none of them twice, made many at once so that each costs little."""

from __future__ import annotations

import itertools
import os

_TAILS = [b"%02x" % (number * 151 & 0xFF) for number in range(256)]  # each once, neighbours far apart
_MASK = 2**56 - 1


class Ids:
    """The ids that one router gives: `prefix` begins its request ids, `trace` its trace ids ("00-" and 8 bytes)."""

    __slots__ = ("_count", "prefix", "spare", "trace")

    def __init__(self) -> None:
        self.prefix = os.urandom(6).hex().encode() + b"-"
        self.trace = b"00-" + os.urandom(8).hex().encode()
        self.spare: list[bytes] = []  # numbers that are ready; the fast path takes them from here
        self._count = itertools.count(int.from_bytes(os.urandom(4)) + 1)

    def request_id(self) -> bytes:
        """An id for a request that is refused before its head is understood."""
        return self.prefix + self.number()

    def number(self) -> bytes:
        """16 hexadecimal digits, not all of them 0 and never given before.

        >>> ids = Ids()
        >>> len({ids.number() for _ in range(1000)})
        1000
        """
        if not self.spare:
            # Fibonacci hashing: a multiplier without a common factor with 2**56 spreads the counter, repeats no value.
            block = b"%014x" % (next(self._count) * 0x9E3779B97F4A7C15 & _MASK)
            self.spare = [tail + block for tail in _TAILS]
        return self.spare.pop()
