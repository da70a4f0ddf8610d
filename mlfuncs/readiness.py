"""Waiting for descriptors of any number: `select.select` takes none above 1023, and a notebook may have many open."""

from __future__ import annotations

import select
from collections.abc import Iterable

_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


def readable(descriptors: Iterable[int], timeout_s: float | None = None) -> list[int]:
    """Those of the open `descriptors` that have something to read or have ended; [] when `timeout_s` was over first.

    >>> import os
    >>> reader, writer = os.pipe()
    >>> readable([reader], 0)
    []
    >>> os.close(writer)
    >>> readable([reader]) == [reader]
    True
    >>> os.close(reader)
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [one for one, event in poll.poll(None if timeout_s is None else timeout_s * 1000) if event & _READABLE]
