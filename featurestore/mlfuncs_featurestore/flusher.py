"""A thread that commits pushed rows now and then, for processes that live long: the feature server, stream readers.

Owns: Flusher. When it runs is one of the moments at which the log is committed; `push` has them all.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlfuncs.errors import MlfuncsError
from mlfuncs_featurestore.push import FLUSH_AGE_S, flush_waiting

if TYPE_CHECKING:
    from mlfuncs_featurestore.store import FeatureStore

log = logging.getLogger("mlfuncs.features")


class Flusher:
    """Commits what waits in the push logs of a store's home every `every_s` seconds, and once more at the end.

    Use it in a `with` block. A commit that fails is logged and tried again next time: the rows stay in the log.
    """

    def __init__(self, store: FeatureStore, every_s: float = FLUSH_AGE_S) -> None:
        self._store, self._every_s = store, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlfuncs-flusher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._flush()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._flush()

    def _flush(self) -> None:
        try:
            flush_waiting(self._store)
        except MlfuncsError as exc:
            log.warning("pushed rows stay in the log for now: %s", exc)
