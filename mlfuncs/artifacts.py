"""Artifacts: values stored by content, read back equal.

    store = ArtifactStore.open(read_settings())
    ref = store.put(frame)          # an ArtifactRef: digest, kind, size, description; goes into a registry row
    store.get(ref)                  # the frame

An artifact's id is the SHA-256 of its bytes; equal bytes are stored once. Bytes are checked against the digest each
time they are read, and what could run code when read ("model", "pickle") also against a signature by a key of the
reader's settings, before anything is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import html
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mlfuncs.codecs import NotEncodable, codec_named, codecs_for
from mlfuncs.errors import ArtifactError, StorageError, UntrustedError
from mlfuncs.objects import ObjectStore, check_digest, file_digest, open_objects
from mlfuncs.settings import Settings, ensure_home
from mlfuncs.signing import key_ring, project_key


@dataclass(frozen=True)
class ArtifactRef:
    """What is known of a stored value. `metadata` is JSON-ready: rows and schema of a table, shape of an array, ..."""

    digest: str
    kind: str
    type_name: str = ""
    size_bytes: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_digest(self.digest)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal ref back."""
        return {
            "digest": self.digest,
            "kind": self.kind,
            "type_name": self.type_name,
            "size_bytes": self.size_bytes,
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ArtifactRef:
        """The ref that `to_dict` wrote. Raises ArtifactError when `values` are not of one."""
        try:
            return cls(**values)
        except TypeError as exc:
            raise ArtifactError(f"{dict(values)!r} does not describe an artifact: {exc}") from exc

    def _repr_html_(self) -> str:
        facts = {"kind": self.kind, "type": self.type_name, "bytes": f"{self.size_bytes:,}", "digest": self.digest[:12]}
        shown = {key: value for key, value in self.metadata.items() if isinstance(value, str | int | float)}
        cells = {**facts, **shown}.items()
        rows = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in cells)
        return f"<table><tbody>{rows}</tbody></table>"


class ArtifactStore:
    """The artifacts of one store, read and written under one project's keys. Safe to use from many processes."""

    def __init__(self, objects: ObjectStore, settings: Settings) -> None:
        self._objects = objects
        self._settings = settings

    @classmethod
    def open(cls, settings: Settings) -> ArtifactStore:
        """The store at the settings' artifact URL. Raises StorageError when it cannot be reached."""
        cache = settings.home / "cache" / "artifacts"
        return cls(open_objects(settings.resolved_artifacts_url, cache), settings)

    def put(self, value: Any, hint: Any = None, *, kind: str | None = None) -> ArtifactRef:
        """Store `value` in its type's format, or as `kind`.

        Raises ArtifactError when it cannot be, StorageError on a full disk.
        """
        reasons = []
        for codec in codecs_for(value, hint) if kind is None else [codec_named(kind)]:
            with self._objects.stage() as staged:
                try:
                    return self._write(codec, value, staged)
                except NotEncodable as exc:
                    reasons.append(str(exc))
        raise ArtifactError(f"a {_type_name(value)} cannot be stored: {'; '.join(reasons)}")

    def get(self, ref: ArtifactRef, hint: Any = None) -> Any:
        """The stored value. `hint` is the type wanted: a table library, or the classes of a stored dataclass or Enum.

        Files and directories come back as a read-only copy, a Path. Raises ArtifactError when the object is missing
        or needs a class that is not loaded, UntrustedError when its digest or signature does not check out.
        """
        codec = codec_named(ref.kind)
        what = f"artifact {ref.digest[:12]} ({ref.kind})"
        if codec.signed:
            from mlfuncs.codecs.pickled import unseal

            sealed = self.read_bytes(ref.digest)
            payload = unseal(ref.kind, sealed, key_ring(self._settings), what)
            return codec.decode(payload, dict(ref.metadata), hint)
        if hasattr(codec, "unpack"):
            return self._unpack(codec, ref)
        path = self.local_path(ref)
        if file_digest(path) != ref.digest:
            raise UntrustedError(f"{what} does not match its digest: its bytes were changed; it was not loaded")
        return codec.decode(path, dict(ref.metadata), hint)

    def put_bytes(self, content: bytes, kind: str = "bytes") -> ArtifactRef:
        """Store bytes under any name of a kind, e.g. "log"."""
        digest = hashlib.sha256(content).hexdigest()
        with self._objects.stage() as staged:
            staged.write_bytes(content)
            self._objects.commit(staged, digest)
        return ArtifactRef(digest, kind, "builtins.bytes", len(content))

    def read_bytes(self, digest: str) -> bytes:
        """An object's bytes. Raises ArtifactError when it is missing, UntrustedError when it is not what was stored."""
        content = self._objects.path(digest).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise UntrustedError(f"artifact {digest} does not match its digest: its bytes were changed; not loaded")
        return content

    def exists(self, digest: str) -> bool:
        """Whether an object is in the store."""
        return self._objects.size(digest) is not None

    def local_path(self, ref: ArtifactRef) -> Path:
        """A local, read-only file with the object as stored (Parquet, .npy, PNG, a tar); its digest is not checked.

        For a store on this machine it is the object itself, so that a large table is memory-mapped and never copied.
        """
        return self._objects.path(ref.digest)

    def _write(self, codec: Any, value: Any, staged: Path) -> ArtifactRef:
        with _full_disk_said(), staged.open("wb") as file:
            sink = _HashingSink(file)
            metadata = codec.encode(value, sink)
            if codec.signed:
                from mlfuncs.codecs.pickled import seal

                sink.write(seal(codec.kind, sink.hexdigest(), project_key(self._settings)))
        digest, size = sink.hexdigest(), staged.stat().st_size
        self._objects.commit(staged, digest)
        return ArtifactRef(digest, codec.kind, _type_name(value), size, metadata)

    def _unpack(self, codec: Any, ref: ArtifactRef) -> Path:
        """The file or directory under its own name, unpacked once per digest into the cache."""
        name = _file_name(str(ref.metadata.get("name", ""))) or codec.kind
        variant = hashlib.sha256(f"{codec.kind}/{name}".encode()).hexdigest()[:16]
        folder = ensure_home(self._settings) / "cache" / "files" / f"{ref.digest}-{variant}"
        if not folder.exists():
            source = self.local_path(ref)
            if file_digest(source) != ref.digest:
                raise UntrustedError(f"artifact {ref.digest} does not match its digest; it was not unpacked")
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                codec.unpack(source, aside / name)
                _make_read_only(aside)
                os.rename(aside, folder)
            except FileExistsError:
                pass  # another process was first; its copy is the same
            except OSError as exc:
                if exc.errno != errno.ENOTEMPTY:
                    raise StorageError(f"{ref.kind} {name!r} cannot be unpacked into {folder.parent}: {exc}") from exc
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return folder / name


class _HashingSink:
    """A binary file that knows the SHA-256 of what was written to it, so that large values are read once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def write(self, chunk: Any) -> int:
        self._sha256.update(chunk)
        self._file.write(chunk)
        return memoryview(chunk).nbytes

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        """Leave the file open: its owner closes it."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


@contextlib.contextmanager
def _full_disk_said() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise  # the user's own, from the value that is being written
        raise StorageError(
            f"an artifact cannot be written: {exc.strerror or exc}; free some disk space, or set MLFUNCS_HOME or "
            "MLFUNCS_ARTIFACTS_URL to a place that has room"
        ) from exc


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _file_name(name: str) -> str:
    """`name` when it is one part of a path; else empty."""
    return name if name == PurePosixPath(name).name and name != ".." and "\0" not in name and len(name) < 256 else ""


def _make_read_only(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o555)
