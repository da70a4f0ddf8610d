"""Names of everything the feature store keeps in Redis.

Owns: key layout. Pure. A row of an entity is at

    mlfuncs:{<project>:<group>}:<view>:<form>:<entity key>

The braces are Redis Cluster's hash tag: `group` is the CRC-32 of the entity key modulo 256, so the rows of one entity
in all views share a slot, and batched scripts over one group stay within one slot. `form` is "r" for the latest packed
row and "e" for packed events (views with aggregations or an event_id).
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

GROUPS = 256


class ViewKeys:
    """The Redis keys of one view's entities.

    >>> ViewKeys("shop", "spend", "r").of([b"i7"])
    [b'mlfuncs:{shop:1e}:spend:r:i7']
    """

    def __init__(self, project: str, view: str, form: str) -> None:
        self.project, self.view, self.form = project, view, form
        self._prefixes = [f"mlfuncs:{{{project}:{group:02x}}}:{view}:{form}:".encode() for group in range(GROUPS)]
        self._skip = len(self._prefixes[0])

    def of(self, entities: Sequence[bytes]) -> list[bytes]:
        """The Redis key of each encoded entity key."""
        prefixes = self._prefixes
        return [prefixes[crc32(entity) & 255] + entity for entity in entities]

    def entity(self, key: bytes) -> bytes:
        """The encoded entity key in a Redis key."""
        return key[self._skip :]

    def pattern(self) -> str:
        """What SCAN matches for all rows of the view."""
        return f"mlfuncs:{{{self.project}:??}}:{self.view}:{self.form}:*"


def group_of(key: bytes) -> bytes:
    """The hash tag of a Redis key: keys of one tag may go into one command on a cluster."""
    start = key.index(b"{")
    return key[start : key.index(b"}", start)]


def document_key(project: str, kind: str, name: str) -> str:
    """Where a small document is kept, such as how far a view was materialized."""
    return f"mlfuncs:{{{project}}}:{kind}:{name}"
