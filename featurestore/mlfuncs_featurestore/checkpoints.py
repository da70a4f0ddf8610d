"""Named moments between the steps of apply, push and materialize, where a test can make the process fail.

Owns: `reached`. In a running program it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None  # set by tests: called with each moment's name; may raise


def reached(moment: str) -> None:
    """Say that `moment` has come."""
    if hook is not None:
        hook(moment)
