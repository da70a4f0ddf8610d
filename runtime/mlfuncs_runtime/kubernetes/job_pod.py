"""Inside the pod of a run's Job: execute the one run that a directory orders, and tell through standard output.

The directory, a mounted ConfigMap, has `order.json`; with no shared artifact store also `bundle.zip`, `bundle.sig`, and
an `object-<digest>` for each stored argument. See `mlfuncs.runs.relay` for what is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from mlfuncs.bundles import store as bundle_store
from mlfuncs.errors import MlfuncsError, StorageError
from mlfuncs.objects import key_of
from mlfuncs.runs.journal import ARTIFACT, FINISH, Entry, failed, read_entries
from mlfuncs.runs.relay import KEY, Relay
from mlfuncs.runs.worker_process import Child, ChildDied
from mlfuncs.secrets import Redactor, available_secrets
from mlfuncs.settings import Settings, ensure_home, read_settings
from mlfuncs.signing import project_key

FAILED, HOPELESS, STOPPED = 1, 78, 143  # 78: EX_CONFIG of sysexits.h; another attempt would end the same way
TOLD_BYTES = 8 << 20  # kubelets keep at least the last 10 MiB of a container's log
GRACE_S = 5.0
_TELL_S = 0.5
_HOPELESS_ERRORS = ("UntrustedError", "BundleError", "NotFound", "InvalidInput", "SecretMissing")


def run_order(directory: str) -> int:
    """Execute the order; 0 when the run succeeded, else what tells the Job whether to try again."""
    folder, settings = Path(directory), read_settings()
    try:
        order = json.loads((folder / "order.json").read_text(encoding="utf-8"))
        unpack_order(order, folder, settings)
    except (MlfuncsError, OSError, ValueError) as exc:
        print(f"the order of this run cannot be read: {exc}", flush=True)
        return HOPELESS
    secrets = available_secrets(order["secrets"], settings)
    relay = Relay(_write)
    relay.record(KEY, project_key(settings).public)
    with contextlib.closing(Redactor(secrets.values()).wrap(cast(TextIO, _Text(relay)))) as output:
        final = PodRun(order, relay, output.write, settings).execute()
    relay.record(FINISH, final)
    if final["status"] == "succeeded":
        return 0
    if final["status"] == "cancelled":
        return STOPPED
    before_it_began = "started_at" not in final  # else the function itself raised something of that name
    return HOPELESS if before_it_began and final["error"]["type"] in _HOPELESS_ERRORS else FAILED


def unpack_order(order: Mapping[str, Any], folder: Path, settings: Settings) -> None:
    """Put what came with the order where a home has it. Signatures and digests are checked when it is read."""
    home = ensure_home(settings)
    if (folder / bundle_store.ARCHIVE).exists():
        place = home / "bundles" / bundle_store.check_digest(order["bundle"]) / settings.project
        place.mkdir(parents=True, exist_ok=True)
        for name in (bundle_store.ARCHIVE, bundle_store.SIGNATURE):
            (place / name).write_bytes((folder / name).read_bytes())
    for path in folder.glob("object-*"):
        target = home / "artifacts" / key_of(path.name.removeprefix("object-"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())


class _Text:
    """The stream of what the function prints, before the relay and behind the masking of secrets."""

    def __init__(self, relay: Relay) -> None:
        self.write, self.flush = relay.text, lambda: None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class PodRun:
    """One attempt: a child interpreter that executes, its output and its journal told as they come."""

    def __init__(
        self, order: Mapping[str, Any], relay: Relay, show: Callable[[str], object], settings: Settings
    ) -> None:
        self._order, self._relay, self._show, self._settings = order, relay, show, settings
        self._journal = settings.home / "run.jsonl"
        self._offset = self._told_bytes = 0
        self._told: set[str] = set(order["inputs"])
        self._stop = threading.Event()
        self._final: dict[str, Any] | None = None

    def execute(self) -> dict[str, Any]:
        """The run's end; everything before it has been told."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        environ = {**os.environ, **self._settings.to_environ(), **self._order["env"]}
        child = Child(sys.executable, environ)
        try:
            stopped = self._see_through(child)
        except ChildDied as died:
            stopped = failed("ProcessDied", f"its process died: {died}")
        finally:
            child.close()
        self._tell_journal()
        return self._with_outputs(stopped or self._final or failed("ProcessDied", "its process ended without a result"))

    def _see_through(self, child: Child) -> dict[str, Any] | None:
        """None when the child came to an end by itself, else why it was stopped."""
        task = {"run": self._order["run"], "bundle": self._order["bundle"], "values": self._order["values"]}
        child.start({**task, "journal": str(self._journal)}, self._show)
        limit = self._order["timeout_s"]
        deadline = None if limit is None else time.monotonic() + limit
        while not child.wait(_TELL_S if deadline is None else min(_TELL_S, max(0.01, deadline - time.monotonic()))):
            self._tell_journal()
            late = deadline is not None and time.monotonic() >= deadline
            if late or self._stop.is_set():
                child.interrupt()
                if not child.wait(GRACE_S):
                    child.kill()
                if late:
                    return failed("DeadlineExceeded", f"it ran longer than {limit:g} s")
                return {**failed("Cancelled", "it was cancelled"), "status": "cancelled"}
        return None

    def _tell_journal(self) -> None:
        for entries, offset in read_entries(self._journal, self._offset):
            for entry in entries:
                self._tell(entry)
            self._offset = offset

    def _tell(self, entry: Entry) -> None:
        if entry.kind == FINISH:
            self._final = entry.fields[0]  # told last, after what it names
            return
        if entry.kind == ARTIFACT:
            try:
                self._tell_object(entry.fields[2])
            except MlfuncsError as exc:
                self._relay.text(f"mlfuncs: the artifact {entry.fields[1]!r} stays in the pod: {exc}\n")
                return
        self._relay.record(entry.kind, *entry.fields)

    def _with_outputs(self, final: dict[str, Any]) -> dict[str, Any]:
        """The end once its outputs are told; that of a failed run when they cannot be."""
        try:
            for document in (final.get("outputs") or {}).values():
                self._tell_object(document)
        except MlfuncsError as exc:
            return {**final, **failed(type(exc).__name__, str(exc)), "outputs": {}}
        return final

    def _tell_object(self, document: Mapping[str, Any]) -> None:
        """Send a stored object along, unless whoever listens has it. Raises StorageError when it is too large."""
        if "artifact" not in document or self._order["shared"] or document["artifact"]["digest"] in self._told:
            return
        digest, size = document["artifact"]["digest"], document["artifact"]["size_bytes"]
        self._told_bytes += size
        if self._told_bytes > TOLD_BYTES:
            raise StorageError(
                f"outputs of more than {TOLD_BYTES >> 20} MiB do not go through a pod's log (this one has {size} "
                "bytes): set MLFUNCS_ARTIFACTS_URL to a store that the cluster reaches too, e.g. s3://bucket/path"
            )
        path = self._settings.home / "artifacts" / key_of(digest)
        self._relay.object(digest, path.read_bytes())
        self._told.add(digest)
