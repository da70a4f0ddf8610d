"""Runs whose process is gone: found by whoever reads, marked failed, with all that they had acknowledged."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from mlfuncs.errors import NotFound
from mlfuncs.registry import Registry, RunRow
from mlfuncs.runs.journal import failed, read_entries
from mlfuncs.runs.liveness import is_alive
from mlfuncs.runs.records import Batch, journal_path, keep_final
from mlfuncs.settings import Settings

log = logging.getLogger(__name__)
_UNREADABLE = (ValueError, TypeError, KeyError, OverflowError)


def reconcile(registry: Registry, settings: Settings) -> None:
    """Give every run whose process died its end, and bring journals that were left behind into the registry."""
    rows, now = registry.runs.active()
    alive = set()
    for row in rows:
        age_s = None if row.heartbeat_at is None else now - row.heartbeat_at
        if is_alive(row.owner, age_s):
            alive.add(row.id)
        elif "job" in row.details:  # a cluster executes it, whatever became of the process that asked for it
            alive.add(row.id)
            _collect(registry, settings, row)
        else:
            _bury(registry, settings, row)
    for path in journal_path(settings, "x").parent.glob("*.jsonl"):
        if path.stem not in alive:
            _replay(registry, path)


def _collect(registry: Registry, settings: Settings, row: RunRow) -> None:
    from mlfuncs.runs.elsewhere import collect

    collect(registry, settings, row)


def _bury(registry: Registry, settings: Settings, row: RunRow) -> None:
    path = journal_path(settings, row.id)
    owner = row.owner or {}
    lost = failed(
        "ProcessDied",
        f"its process died (pid {owner.get('pid')} on {owner.get('host')}): it was killed, ran out of memory, or the "
        "machine went down; its log has what it printed",
    )
    try:
        batch = _read(path)
        keep_final(registry, row.id, batch, batch.final or lost, only_active=True)
    except _UNREADABLE as exc:
        _set_aside(path, exc)
        keep_final(registry, row.id, Batch(), lost, only_active=True)
    path.unlink(missing_ok=True)


def _replay(registry: Registry, path: Path) -> None:
    """Bring in the journal of a run that ended in the registry before its journal was read whole."""
    try:
        row = registry.runs.get(path.stem)
    except NotFound:
        return  # being made right now, or of a registry that this home used before
    if is_alive(row.owner, None):
        return  # its owner will do it
    try:
        batch = _read(path)
        ours = row.error is None or row.error.get("type") == "ProcessDied"
        values: dict[str, Any] = batch.final if batch.final and ours else {"status": row.status}
        keep_final(registry, row.id, batch, values)
    except _UNREADABLE as exc:
        _set_aside(path, exc)
    path.unlink(missing_ok=True)


def _set_aside(path: Path, exc: Exception) -> None:
    """Keep a journal that no database takes (a foreign or damaged file), so that the other runs can be read."""
    aside = path.with_suffix(".unreadable")
    log.warning(
        "the journal of run %s cannot be read (%s: %s); it is kept as %s", path.stem, type(exc).__name__, exc, aside
    )
    with contextlib.suppress(FileNotFoundError):  # another reader was first
        path.rename(aside)


def _read(path: Path) -> Batch:
    batch = Batch()
    for entries, _offset in read_entries(path):
        batch.add(entries)
    return batch
