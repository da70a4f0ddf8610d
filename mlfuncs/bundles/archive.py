"""Bundle archives: the same members give the same bytes; nothing that leaves its folder is ever unpacked."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mlfuncs.errors import BundleError

_MOMENT = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can hold
_MAX_BYTES = 2 * 2**30  # of all members unpacked: a guess, far above any bundle of code


def write_archive(members: Mapping[str, bytes]) -> bytes:
    """A zip archive of the members, sorted, without times, owners or other traces of where it was made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(members):
            entry = zipfile.ZipInfo(check_member(name), _MOMENT)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, members[name])
    return buffer.getvalue()


def read_archive(content: bytes) -> dict[str, bytes]:
    """The members of an archive by name. Raises BundleError for links, absolute paths, `..`, or too much data."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            for entry in entries:
                check_member(entry.filename)
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG):
                    raise BundleError(f"archive member {entry.filename!r} is a link or a device; it was not unpacked")
            if sum(entry.file_size for entry in entries) > _MAX_BYTES:
                raise BundleError(f"the archive unpacks to more than {_MAX_BYTES} bytes; it was not unpacked")
            return {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as exc:
        raise BundleError(f"the archive is damaged: {exc}") from exc


def check_member(name: str) -> str:
    """`name`, when it is a plain relative path below the archive's root. Raises BundleError."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or name.endswith("/") or ".." in parts or "\\" in name or ":" in parts[0]:
        raise BundleError(f"archive member {name!r} would leave its folder; it was not unpacked")
    return name


def unpack_archive(content: bytes, folder: Path) -> None:
    """Write an archive's members below `folder`, which is made."""
    for name, data in read_archive(content).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
