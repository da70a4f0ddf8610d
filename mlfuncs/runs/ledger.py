"""What a run elsewhere says of itself, kept as if it had run here: its log, its journal, and what it stored."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

from mlfuncs.artifacts import ArtifactRef
from mlfuncs.codecs import codec_named
from mlfuncs.codecs.pickled import seal, unseal
from mlfuncs.errors import ArtifactError, MlfuncsError, UntrustedError
from mlfuncs.runs.capture import RunLog
from mlfuncs.runs.journal import ARTIFACT, ATTEMPT, FINISH, METRIC, PARAMS, Journal, failed
from mlfuncs.runs.relay import KEY, OBJECT, Listener
from mlfuncs.runs.values import open_store
from mlfuncs.settings import Settings
from mlfuncs.signing import KeyRing, key_ring, project_key

_SIZES = {METRIC: 4, PARAMS: 1, ARTIFACT: 3, FINISH: 1}


class Ledger:
    """Takes the log of each attempt line by line; `final` is the last attempt's end, None while it has none.

    What the run pickled is signed with a key of its own, that it tells and forgets. The log comes from a job that we
    made, over the cluster's API, so that key is believed for this run: its pickles are signed anew with the project's.
    """

    def __init__(
        self, journal: Journal, log: RunLog, settings: Settings, show: Callable[[str], None] | None = None
    ) -> None:
        self.final: dict[str, Any] | None = None
        self._journal, self._log, self._settings, self._show = journal, log, settings, show
        self._listener = Listener()
        self._parts: dict[str, list[bytes]] = {}
        self._key = ""

    def attempt(self, number: int) -> None:
        """Another attempt begins; the one before it counts no more."""
        self.end()
        self._listener, self._parts, self._key, self.final = Listener(), {}, "", None
        self._journal.append(ATTEMPT, number)

    def line(self, line: str) -> None:
        """Take one line of the attempt's log."""
        for said in self._listener.line(line):
            if isinstance(said, str):
                self.text(said)
            else:
                self._take(said)

    def end(self) -> None:
        """The attempt's log has ended."""
        for text in self._listener.end():
            self.text(text)

    def text(self, text: str) -> None:
        """Add to the run's log."""
        self._log.write(text)
        if self._show is not None:
            self._show(text)

    def _take(self, record: Any) -> None:
        kind, fields = (record[0], record[1:]) if isinstance(record, list) and record else ("", [])
        if kind == KEY and len(fields) == 1:
            self._key = str(fields[0])
        elif kind == OBJECT and len(fields) == 3:
            self._take_piece(*fields)
        elif _SIZES.get(kind) == len(fields):
            self._keep(kind, fields)

    def _take_piece(self, digest: str, content: str, more: bool) -> None:
        self._parts.setdefault(digest, []).append(base64.b64decode(content))
        if not more:
            open_store(self._settings).put_bytes(b"".join(self._parts.pop(digest)))

    def _keep(self, kind: str, fields: list[Any]) -> None:
        try:
            if kind == ARTIFACT:
                fields = [*fields[:2], self._adopted(fields[2])]
            elif kind == FINISH:
                outputs = {name: self._adopted(document) for name, document in fields[0].get("outputs", {}).items()}
                fields = [{**fields[0], "outputs": outputs}]
        except MlfuncsError as exc:
            if kind == FINISH:
                fields = [{**fields[0], **failed(type(exc).__name__, str(exc)), "outputs": {}}]
            else:
                self.text(f"mlfuncs: the artifact {fields[1]!r} was lost: {exc}\n")
                return
        if kind == FINISH:
            self.final = fields[0]
        self._journal.append(kind, *fields)

    def _adopted(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document with what it names in our store, under our signature. Raises ArtifactError, UntrustedError."""
        if "artifact" not in document:
            return document
        ref, store = ArtifactRef.from_dict(document["artifact"]), open_store(self._settings)
        what = f"artifact {ref.digest[:12]} ({ref.kind})"
        if not codec_named(ref.kind).signed:
            if not store.exists(ref.digest):
                raise ArtifactError(f"{what} did not arrive: the log of its pod was cut; set MLFUNCS_ARTIFACTS_URL")
            return document
        sealed = store.read_bytes(ref.digest)
        try:
            unseal(ref.kind, sealed, key_ring(self._settings), what)
            return document  # it was given to the run, and is ours already
        except UntrustedError:
            payload = unseal(ref.kind, sealed, KeyRing(frozenset(filter(None, [self._key]))), what)
        mark = seal(ref.kind, hashlib.sha256(payload).hexdigest(), project_key(self._settings))
        again = store.put_bytes(bytes(payload) + mark, ref.kind)
        return {"artifact": {**document["artifact"], "digest": again.digest, "size_bytes": again.size_bytes}}
