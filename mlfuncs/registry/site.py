"""Which home a process belongs to: several homes may share one registry."""

from __future__ import annotations

import os
import uuid

from mlfuncs.errors import StorageError
from mlfuncs.settings import Settings, ensure_home


def site_id(settings: Settings) -> str:
    """The random id of this home, 16 hex digits, made once and kept in `home/site`."""
    path = ensure_home(settings) / "site"
    try:
        if found := _read(path):
            return found
        temporary = path.with_name(f"site.{uuid.uuid4().hex}")
        temporary.write_text(uuid.uuid4().hex[:16])
        try:
            os.link(temporary, path)  # whole or not at all; the first process wins
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        return _read(path)
    except OSError as exc:
        raise StorageError(f"{str(path)!r} cannot be written ({exc.strerror}); set MLFUNCS_HOME") from exc


def _read(path: os.PathLike[str]) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
