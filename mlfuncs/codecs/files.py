"""Files as they are, and directories as tar archives that hold nothing but files and folders."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mlfuncs.errors import ArtifactError, UntrustedError


def pack_directory(folder: Path, sink: BinaryIO) -> int:
    """Write `folder` as a tar whose bytes depend only on names and contents; the number of files comes back.

    Raises ArtifactError for a link or device inside: it would mean something else on another machine.
    """
    count = 0
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise ArtifactError(f"{path} is a link or device; store a directory of plain files and folders")
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            if stat.S_ISDIR(mode):
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
                continue
            member.mode = 0o755 if mode & stat.S_IXUSR else 0o644
            with path.open("rb") as file:
                member.size = os.fstat(file.fileno()).st_size
                archive.addfile(member, file)
            count += 1
    return count


def unpack_directory(archive_path: Path, folder: Path) -> None:
    """Unpack into `folder`, which must not exist. Raises UntrustedError for a member that is a link or leaves it."""
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive_path, mode="r:") as archive:
            for member in archive:
                _unpack_member(archive, member, folder)
    except tarfile.TarError as exc:
        raise ArtifactError(f"the directory cannot be unpacked: {exc}") from exc


def _unpack_member(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise UntrustedError(f"the archive has a member {member.name!r} outside its folder; it was not unpacked")
    target = folder / name
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
    elif member.isreg():
        source = archive.extractfile(member)
        assert source is not None
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        target.chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)
    else:
        raise UntrustedError(f"the archive has a link or device {member.name!r}; it was not unpacked")


class FileCodec:
    """The bytes of a file; it is read back under its own name."""

    kind = "file"
    signed = False

    def encode(self, value: Path, sink: BinaryIO) -> dict[str, Any]:
        try:
            file = value.open("rb")
        except OSError as exc:
            raise ArtifactError(f"the file {str(value)!r} cannot be read: {exc.strerror}") from exc
        with file:
            shutil.copyfileobj(file, sink, 1 << 20)
        return {"name": value.name}

    def unpack(self, source: Path, target: Path) -> None:
        """Copy the file to `target`."""
        shutil.copyfile(source, target)


class DirectoryCodec:
    """A directory of files and folders."""

    kind = "directory"
    signed = False

    def encode(self, value: Path, sink: BinaryIO) -> dict[str, Any]:
        return {"name": value.resolve().name or "directory", "files": pack_directory(value, sink)}

    def unpack(self, source: Path, target: Path) -> None:
        """Unpack the directory as `target`."""
        unpack_directory(source, target)
