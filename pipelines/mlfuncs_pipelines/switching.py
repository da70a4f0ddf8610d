"""How often this process's threads take turns, while a pipeline runs."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

_SWITCH_S = 0.0005  # the thread that keeps the rows must not hold up the next step
_lock = threading.Lock()
_users = 0
_before = 0.0


@contextlib.contextmanager
def quick_switching() -> Iterator[None]:
    """Threads take turns often inside; the last of several users at once puts back what there was."""
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                sys.setswitchinterval(_before)
