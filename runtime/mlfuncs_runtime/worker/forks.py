"""What becomes of a fork of this process that the user's code makes: it may do its own work, and must never serve."""

from __future__ import annotations

import os

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


def forbid_forks() -> None:
    """From now on a fork of this process that comes back from the user's code ends there: it must not serve too."""
    os.register_at_fork(after_in_child=_note_fork)


def end_fork() -> None:
    """End this process when it is a fork that came back from the user's code."""
    if _forked:
        os._exit(0)
