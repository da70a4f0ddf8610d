"""Where artifact bytes lie: objects named by their SHA-256, written whole or not at all.

The port is `ObjectStore`; LocalObjects keeps files (with links and renames), RemoteObjects anything that fsspec reaches
("memory://" is the fake that the tests share with users). tests/contracts/ holds the suite that both pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mlfuncs.errors import ArtifactError, StorageError, UntrustedError
from mlfuncs.files import sync_folder

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STALE_S = 24 * 3600.0  # a staged file this old belongs to a process that died (guess: no write takes a day)
_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}  # protocols without folders
# module and root error of the clients behind fsspec's s3, gs, az and http
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("aiohttp.client_exceptions", "ClientError"),
)


class ObjectStore(Protocol):
    """Content-addressed bytes. Digests are SHA-256 in lower-case hex."""

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        """A new empty file to write to; gone afterwards unless it was committed."""

    def commit(self, staged: Path, digest: str) -> None:
        """Make the staged file the object `digest`. The object is durable when this returns."""

    def size(self, digest: str) -> int | None:
        """Bytes of an object; None when there is none."""

    def path(self, digest: str) -> Path:
        """A local file with the object's bytes. Raises ArtifactError when there is no such object."""


def check_digest(digest: str) -> str:
    """`digest`, when it is a SHA-256 in hex: it becomes part of a path. Raises ArtifactError."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ArtifactError(f"{digest!r} is not an artifact's digest: 64 hex digits")
    return digest


def key_of(digest: str) -> str:
    """The object's place under the store's root: objects/<aa>/<digest>."""
    return f"objects/{check_digest(digest)[:2]}/{digest}"


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LocalObjects:
    """Objects as read-only files under `root`; a rename makes each appear whole."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / "staging"
        self._swept = False

    @contextlib.contextmanager
    def stage(self) -> Iterator[Path]:
        with _writable(self._root):
            if not self._staging.is_dir():
                self._staging.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._swept:
                self._swept = True
                self.sweep_staging()
            handle, name = tempfile.mkstemp(dir=self._staging)
            os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def commit(self, staged: Path, digest: str) -> None:
        target = self._root / key_of(digest)
        size = staged.stat().st_size
        with contextlib.suppress(FileNotFoundError):
            if target.stat().st_size == size:  # the same name is the same content; a torn file has another size
                return
        with _writable(self._root):
            target.parent.mkdir(parents=True, exist_ok=True)
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.chmod(0o444)
            os.replace(staged, target)
            sync_folder(target.parent)

    def size(self, digest: str) -> int | None:
        try:
            return (self._root / key_of(digest)).stat().st_size
        except FileNotFoundError:
            return None

    def path(self, digest: str) -> Path:
        path = self._root / key_of(digest)
        if not path.is_file():
            raise ArtifactError(f"no artifact {digest} is in {self._root}; was it stored under other settings?")
        return path

    def sweep_staging(self, now: float | None = None) -> int:
        """Delete what processes that died left behind; the number of files comes back. `now` is in epoch seconds."""
        now, count = time.time() if now is None else now, 0
        for path in self._staging.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if now - path.stat().st_mtime > _STALE_S:
                    path.unlink()
                    count += 1
        return count


class RemoteObjects:
    """Objects at an fsspec URL (s3://, gs://, az://, memory://); one put each. Reads are kept in `cache`."""

    def __init__(self, url: str, cache: Path) -> None:
        try:
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as exc:
            raise StorageError(f"the artifact store {url!r} cannot be opened: {exc}") from exc
        self._url, self._root = url, str(root).rstrip("/")
        self._cache = LocalObjects(cache)

    def stage(self) -> contextlib.AbstractContextManager[Path]:
        return self._cache.stage()

    def commit(self, staged: Path, digest: str) -> None:
        size = staged.stat().st_size
        if self.size(digest) != size:
            with self._reachable():
                self._put(staged, self._at(digest))
        self._cache.commit(staged, digest)

    def size(self, digest: str) -> int | None:
        with self._reachable():
            try:
                return int(self._fs.info(self._at(digest))["size"])
            except FileNotFoundError:
                return None

    def path(self, digest: str) -> Path:
        if self._cache.size(digest) is None:
            with self.stage() as staged:
                self._download(digest, staged)
                self._cache.commit(staged, digest)
        return self._cache.path(digest)

    def _put(self, staged: Path, target: str) -> None:
        try:
            self._fs.put_file(str(staged), target)
        except FileNotFoundError as exc:
            protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple | list) else (self._fs.protocol,)
            if _BUCKETS & set(protocols):  # there are no folders to make, and a bucket is not made by a typo
                raise StorageError(f"the artifact store {self._url!r} has no such bucket: {exc}") from exc
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(staged), target)

    def _download(self, digest: str, staged: Path) -> None:
        with self._reachable():
            try:
                self._fs.get_file(self._at(digest), str(staged))
            except FileNotFoundError as exc:
                raise ArtifactError(f"no artifact {digest} is at {self._url}") from exc
        if file_digest(staged) != digest:
            raise UntrustedError(f"artifact {digest} at {self._url} does not match its digest; it was not loaded")

    def _at(self, digest: str) -> str:
        return f"{self._root}/{key_of(digest)}"

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except client_errors() as exc:
            raise StorageError(
                f"the artifact store {self._url!r} cannot be used: {exc}; "
                "check MLFUNCS_ARTIFACTS_URL and its credentials"
            ) from exc


def client_errors() -> tuple[type[Exception], ...]:
    """What reading and writing may raise: OSError, and the errors of the storage clients that are loaded."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _CLIENT_ERRORS)
    return (OSError, ValueError, *(error for error in found if error is not None))


@contextlib.contextmanager
def files_at(url: str, lack: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of `url`, and its root there, for a block that reads or writes files of its own.

    What goes wrong in the block becomes a StorageError: the store "does not ..." as `lack` says.
    """
    try:
        import fsspec

        files, root = fsspec.core.url_to_fs(url)
        yield files, root.rstrip("/")
    except Exception as exc:
        if not isinstance(exc, (*client_errors(), ImportError)):  # asked now: the clients are loaded by the first use
            raise
        raise StorageError(
            f"the artifact store {url!r} does not {lack}: {exc}; check MLFUNCS_ARTIFACTS_URL and its credentials"
        ) from exc


@contextlib.contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise StorageError(
            f"the artifact store {str(root)!r} cannot be written ({reason}); make room, or set MLFUNCS_ARTIFACTS_URL"
        ) from exc


def open_objects(url: str, cache: Path) -> Any:
    """The object store at an fsspec URL or a path."""
    path = url.removeprefix("file://") if url.startswith("file://") else url
    return RemoteObjects(url, cache) if "://" in path or path.startswith("memory:") else LocalObjects(Path(path))
