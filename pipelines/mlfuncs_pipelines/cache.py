"""The step cache: outputs by the digest of code, environment and the contents of the inputs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs_pipelines.inputs import Values
from mlfuncs_pipelines.placeholders import local_path
from mlfuncs_pipelines.run_log import from_json, to_json

_KNOWN_FILES = 4096
State = tuple[str, int, int, int]  # path, size, time of change, inode
_known: dict[State, str] = {}  # SHA-256 of files in that state


@dataclass(frozen=True)
class Key:
    """What decides a step's result: `parts` by name (code, environment, input x, ...), each as a digest."""

    parts: Mapping[str, str]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over all parts."""
        return digest_of(dict(self.parts))


class StepCache:
    """Entries and locks below `folder`; safe for any number of processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._locks: set[int] = set()

    def get(self, key: Key) -> Values | None:
        """The outputs stored for `key`, when every artifact among them is still there and unchanged."""
        entry = _read(self._entry(key))
        if entry is None or not are_intact(entry["stamps"]):
            return None
        remember_digests(entry["digests"])
        return from_json(entry["outputs"])

    def put(self, key: Key, outputs: Values, origin: Mapping[str, str], journal: str = "") -> None:
        """Store `outputs`; `origin` names the pipeline, run and step they came from, `journal` what it logged."""
        body = {
            "outputs": to_json(outputs),
            "stamps": stamps_of(outputs),
            "digests": _known_digests(outputs),
            "parts": dict(key.parts),
            "origin": dict(origin),
        }
        self._keep_journal(key, journal)
        _write(self._entry(key), body)
        _write(self._last(origin["pipeline"], origin["step"]), {"parts": dict(key.parts), "digest": key.digest})

    def journal(self, key: Key) -> Path:
        """The file of what the stored step logged, metrics above all; there is none when it logged nothing."""
        return self._entry(key).with_suffix(".journal.jsonl")

    def lock(self, key: Key) -> int | None:
        """A lock on `key`, to be released, or None while another step holds it."""
        path = self._entry(key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        self._locks.add(descriptor)
        return descriptor

    def release(self, lock: int | None = None) -> None:
        """Give a lock back; without one, all that are held here."""
        for descriptor in [lock] if lock is not None else list(self._locks):
            self._locks.discard(descriptor)
            os.close(descriptor)

    def explain(self, key: Key, pipeline: str, step: str) -> str:
        """Why the step hits or misses: "hit", or what differs from the last time it ran."""
        entry = _read(self._entry(key))
        if entry is not None:
            gone = [stamp["path"] for stamp in entry["stamps"] if not _is_intact(stamp)]
            return f"miss: the stored output {gone[0]} was deleted or changed" if gone else "hit"
        last = _read(self._last(pipeline, step))
        if last is None:
            return "miss: the step has not run before"
        changed = [name for name, part in key.parts.items() if last["parts"].get(name) != part]
        changed += [f"{name} (removed)" for name in last["parts"] if name not in key.parts]
        if not changed:
            return "miss: the stored entry was deleted"
        return f"miss: changed since the last run: {', '.join(changed)}"

    def _keep_journal(self, key: Key, journal: str) -> None:
        """Have the journal under the entry's name as well, so that it stays when the run is deleted."""
        kept = self.journal(key)
        if os.path.isfile(journal):
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = f"{kept}.{os.getpid()}.tmp"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            os.link(journal, temporary)
            os.replace(temporary, kept)
        else:
            kept.unlink(missing_ok=True)

    def _entry(self, key: Key) -> Path:
        return self._folder / key.digest[:2] / f"{key.digest}.json"

    def _last(self, pipeline: str, step: str) -> Path:
        return self._folder / "last" / f"{digest_of([pipeline, step])}.json"


def stamps_of(outputs: Values) -> list[dict[str, Any]]:
    """What shows later, at little cost, whether the local artifacts among `outputs` are still as they were written."""
    return [stamp_of(path) for path in _local_paths(outputs)]


def are_intact(stamps: list[dict[str, Any]]) -> bool:
    """Whether everything that `stamps_of` saw is still as it was."""
    return all(_is_intact(stamp) for stamp in stamps)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def artifact_digest(artifact: Mapping[str, Any]) -> str:
    """The digest of an artifact's type, metadata and content; of its URI in place of content that is remote."""
    path = local_path(artifact["uri"])
    content = f"uri {artifact['uri']}" if "://" in artifact["uri"] and path == artifact["uri"] else content_digest(path)
    return digest_of([artifact["type"]["schemaTitle"], artifact.get("metadata", {}), content])


def content_digest(path: str) -> str:
    """SHA-256 of a file, or of the names and contents in a folder; "missing" when there is nothing.

    A file that keeps its size, times and inode is read once per process.
    """
    if os.path.isdir(path):
        names = sorted(
            os.path.relpath(os.path.join(folder, name), path) for folder, _, files in os.walk(path) for name in files
        )
        return digest_of([[name, content_digest(os.path.join(path, name))] for name in names])
    state = _state(path)
    if state is None:
        return "missing"
    if state not in _known:
        with open(path, "rb") as file:
            _remember(state, hashlib.file_digest(file, "sha256").hexdigest())
    return _known[state]


def remember_digests(digests: Mapping[str, str]) -> None:
    """Take over the SHA-256 of files that the step which wrote them has computed."""
    for path, digest in digests.items():
        state = _state(path)
        if state is not None:
            _remember(state, digest)


def _known_digests(outputs: Values) -> dict[str, str]:
    """The digests of the files among `outputs` that were computed already."""
    states = {path: _state(path) for path in _local_paths(outputs)}
    return {path: _known[state] for path, state in states.items() if state in _known}


def _local_paths(outputs: Values) -> list[str]:
    paths = [local_path(artifact["uri"]) for items in outputs.artifacts.values() for artifact in items]
    return [path for path in paths if "://" not in path]


def _state(path: str) -> State | None:
    """What changes when the file does; None when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return path, status.st_size, status.st_mtime_ns, status.st_ino


def _remember(state: State, digest: str) -> None:
    if len(_known) >= _KNOWN_FILES:
        _known.pop(next(iter(_known)))
    _known[state] = digest


def stamp_of(path: str) -> dict[str, Any]:
    """The path with a mark of its state: size and time of a file, names and sizes in a folder, "missing" for none."""
    if os.path.isdir(path):
        entries = [os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files]
        marks = sorted([os.path.relpath(entry, path), os.stat(entry).st_size] for entry in entries)
        return {"path": path, "mark": digest_of(marks)}
    try:
        status = os.stat(path)
    except OSError:
        return {"path": path, "mark": "missing"}
    return {"path": path, "mark": f"{status.st_size}-{status.st_mtime_ns}"}


def _is_intact(stamp: Mapping[str, Any]) -> bool:
    return stamp_of(stamp["path"])["mark"] == stamp["mark"]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write(path: Path, body: Mapping[str, Any]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(body, file)
    os.replace(temporary, path)
