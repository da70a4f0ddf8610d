"""Layers: tar files that depend on names, modes and contents alone.

Entries are sorted, owned by root, dated 1980-01-01 (the earliest that a zip archive can also say), and world-readable,
so the same files give the same bytes, and with them the same layer digest, on every machine and on every day.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

EPOCH_S = 315_532_800  # 1980-01-01T00:00:00Z
_EXECUTABLE, _PLAIN, _FOLDER = 0o755, 0o644, 0o755


@dataclass(frozen=True)
class Layer:
    """An uncompressed layer: `digest` is the SHA-256 of the tar, its `diff_id` in an image's config."""

    path: Path
    digest: str
    size_bytes: int
    note: str = ""  # what it holds, for the image's history

    @property
    def diff_id(self) -> str:
        """The digest as image configs write it."""
        return f"sha256:{self.digest}"


@dataclass(frozen=True)
class Entry:
    """One file of a layer, from a path on this machine or from bytes."""

    name: str  # absolute in the image, e.g. "/opt/function/functions/churn.json"
    source: Path | bytes
    executable: bool = False


def write_layer(entries: Iterable[Entry], folder: Path, note: str = "") -> Layer:
    """Write the layer of these files to `folder/<digest>.tar`; one that is there already is left as it is."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            _write_tar(sorted(entries, key=lambda entry: entry.name), file)
        return keep_layer(Path(temporary), folder, note)
    finally:
        Path(temporary).unlink(missing_ok=True)


def keep_layer(temporary: Path, folder: Path, note: str) -> Layer:
    """Give a finished tar its name."""
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = folder / f"{digest}.tar"
    os.replace(temporary, path)
    return Layer(path, digest, path.stat().st_size, note)


def undated_layer(path: Path, folder: Path, note: str = "") -> Layer:
    """A layer that a builder made, without the times at which it did: the same files give the same layer."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with (
            os.fdopen(handle, "wb") as file,
            tarfile.open(path) as made,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for member in sorted(made.getmembers(), key=lambda one: (one.islnk(), one.name)):  # links after files
                member.mtime, member.uname, member.gname = EPOCH_S, "", ""
                member.pax_headers = {k: v for k, v in member.pax_headers.items() if not k.endswith("time")}
                archive.addfile(member, made.extractfile(member) if member.isreg() else None)
        return keep_layer(Path(temporary), folder, note)
    finally:
        Path(temporary).unlink(missing_ok=True)


def find_layer(digest: str, folder: Path, note: str = "") -> Layer | None:
    """The layer of that digest, when it was written here before."""
    path = folder / f"{digest}.tar"
    return Layer(path, digest, path.stat().st_size, note) if path.is_file() else None


def entries_of(folder: Path, prefix: str) -> list[Entry]:
    """Every regular file below `folder`, as it appears below `prefix` in the image. Links are left out."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            found.append(Entry(name, path, bool(path.stat().st_mode & stat.S_IXUSR)))
    return found


def _write_tar(entries: list[Entry], file: io.BufferedIOBase | object) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for folder in _folders(entries):
            made = _member(folder, _FOLDER)
            made.type = tarfile.DIRTYPE
            archive.addfile(made)
        for entry in entries:
            made = _member(entry.name, _EXECUTABLE if entry.executable else _PLAIN)
            if isinstance(entry.source, bytes):
                made.size = len(entry.source)
                archive.addfile(made, io.BytesIO(entry.source))
            else:
                with entry.source.open("rb") as content:
                    made.size = os.fstat(content.fileno()).st_size
                    archive.addfile(made, content)


def _member(name: str, mode: int) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name.lstrip("/"))
    made.mode, made.mtime = mode, EPOCH_S
    return made


def _folders(entries: list[Entry]) -> list[str]:
    folders = {str(folder) for entry in entries for folder in PurePosixPath(entry.name).parents}
    return sorted(folders - {"/", "/opt"})  # those are the base's
