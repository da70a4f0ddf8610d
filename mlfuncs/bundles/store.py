"""Where bundles are kept: `home/bundles/<digest>/<project>/`, and the same below the artifact URL when that is remote.

A stored bundle is two files: the archive, and a signature of the archive's hash together with the bundle's digest. Each
project signs its own copy, so that projects which share a home or a bucket do not overwrite each other's. A folder
appears whole, by one rename.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlfuncs.errors import NotFound, StorageError, UntrustedError
from mlfuncs.files import locked, sync_folder, write_synced
from mlfuncs.objects import files_at
from mlfuncs.settings import Settings, ensure_home
from mlfuncs.signing import KeyRing, key_ring, project_key, sha256_hex

ARCHIVE, SIGNATURE = "bundle.zip", "bundle.sig"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredBundle:
    """A bundle whose signature was checked: its folder here and its archive's bytes."""

    digest: str
    folder: Path
    content: bytes


def keep(digest: str, content: bytes, settings: Settings) -> StoredBundle:
    """Sign an archive and store it, here and at the artifact URL. Raises StorageError."""
    signature = project_key(settings).sign(_statement(digest, content))
    folder = _folder(digest, settings)
    with locked(settings.home / "bundles" / ".lock"):
        known = find_own(digest, settings)  # another builder may have been first: a good copy is never moved away
        if known is None:
            _place(folder, {ARCHIVE: content, SIGNATURE: signature.encode()})
        else:
            content, signature = known.content, (folder / SIGNATURE).read_text()
    push(digest, content, signature.encode(), settings)
    return StoredBundle(digest, folder, content)


def find(digest: str, settings: Settings) -> StoredBundle:
    """The bundle with this digest, its signature checked against the keys trusted under `settings`.

    Fetched from the artifact URL when it is not here. Raises NotFound, or UntrustedError with nothing loaded.
    """
    check_digest(digest)
    ring = key_ring(settings)
    refused: UntrustedError | None = None
    for folder in _local_folders(digest, settings):
        try:
            return _checked(digest, folder, ring)
        except UntrustedError as exc:
            if folder.name == settings.project:
                raise
            refused = refused or exc
    for project, content, signature in _remote_copies(digest, settings):
        try:
            ring.verify(_statement(digest, content), signature.decode("ascii", "replace"), f"bundle {digest[:12]}")
        except UntrustedError as exc:
            refused = refused or exc
            continue
        folder = settings.home / "bundles" / digest / project
        _place(folder, {ARCHIVE: content, SIGNATURE: signature})
        return StoredBundle(digest, folder, content)
    if refused is not None:
        raise refused
    raise NotFound("bundle", digest, hint="; build it again, or set MLFUNCS_ARTIFACTS_URL to where it was pushed")


def find_own(digest: str, settings: Settings) -> StoredBundle | None:
    """This project's own copy in `home`, or None when there is none or it was changed."""
    folder = _folder(digest, settings)
    if not (folder / ARCHIVE).exists():
        return None
    try:
        return _checked(digest, folder, key_ring(settings))
    except UntrustedError:
        return None


def check_digest(digest: str) -> str:
    """`digest`, when it is 64 lower-case hex digits. Raises NotFound: nothing else names a bundle."""
    if not _DIGEST.fullmatch(digest):
        raise NotFound("bundle", digest)
    return digest


def push(digest: str, content: bytes, signature: bytes, settings: Settings) -> None:
    """Copy a bundle to the artifact URL, when that is not below `home`. Raises StorageError."""
    if not settings.artifacts_url:
        return
    with files_at(settings.artifacts_url, "take the bundle") as (files, root):
        folder = f"{root}/bundles/{digest}/{settings.project}"
        files.makedirs(folder, exist_ok=True)
        for name, data in ((ARCHIVE, content), (SIGNATURE, signature)):
            files.pipe_file(f"{folder}/{name}", data)


def unpack_files(digest: str, files: Mapping[str, str], settings: Settings) -> None:
    """Put a bundle that came along with a task (file name to base64) where bundles are found.

    Its signature is checked when it is opened. Raises NotFound for what is no digest, StorageError.
    """
    folder = _folder(check_digest(digest), settings)
    if not (folder / ARCHIVE).exists():
        ensure_home(settings)
        _place(folder, {Path(name).name: base64.b64decode(content) for name, content in files.items()})


def _statement(digest: str, content: bytes) -> bytes:
    return f"mlfuncs-bundle-1\n{digest}\n{sha256_hex(content)}\n".encode()


def _folder(digest: str, settings: Settings) -> Path:
    return settings.home / "bundles" / digest / settings.project


def _local_folders(digest: str, settings: Settings) -> list[Path]:
    own = _folder(digest, settings)
    others = sorted(path for path in own.parent.glob("*") if path != own and not path.name.startswith("."))
    return [path for path in (own, *others) if (path / ARCHIVE).exists()]


def _checked(digest: str, folder: Path, ring: KeyRing) -> StoredBundle:
    content = (folder / ARCHIVE).read_bytes()
    signature = folder / SIGNATURE
    text = signature.read_bytes().decode("ascii", "replace") if signature.exists() else None
    ring.verify(_statement(digest, content), text, f"bundle {digest[:12]} in {folder}")
    return StoredBundle(digest, folder, content)


def _remote_copies(digest: str, settings: Settings) -> list[tuple[str, bytes, bytes]]:
    """(project, archive, signature) of each copy at the artifact URL, this project's own first."""
    if not settings.artifacts_url:
        return []
    copies = []
    with files_at(settings.artifacts_url, "give the bundle") as (files, root):
        folder = f"{root}/bundles/{digest}"
        try:
            found = sorted(path.rstrip("/").rpartition("/")[2] for path in files.ls(folder, detail=False))
        except FileNotFoundError:
            return []
        for project in sorted(found, key=lambda name: name != settings.project):
            with contextlib.suppress(FileNotFoundError):  # half of a copy that is being written
                content = files.cat_file(f"{folder}/{project}/{ARCHIVE}")
                signed = files.exists(f"{folder}/{project}/{SIGNATURE}")
                copies.append((project, content, files.cat_file(f"{folder}/{project}/{SIGNATURE}") if signed else b""))
    return copies


def _place(folder: Path, members: dict[str, bytes]) -> None:
    """Make `folder` with the members in one rename; it is on disk then, and what was there before goes away whole."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        try:
            for name, data in members.items():
                with open(aside / name, "wb") as file:
                    write_synced(file, data)
            if folder.exists():
                os.rename(folder, aside / "before")
            try:
                os.rename(aside, folder)
            except OSError:
                if not (folder / ARCHIVE).exists():  # else another builder was first, with the same digest
                    raise
            sync_folder(folder.parent)
            shutil.rmtree(folder / "before", ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as exc:
        raise StorageError(f"the bundle cannot be stored in {folder}: {exc.strerror or exc}") from exc


def prepare(settings: Settings) -> None:
    """Check that bundles can be written before anything is built. Raises StorageError."""
    ensure_home(settings)
