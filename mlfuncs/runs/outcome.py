"""What came of a run that another machine executed: carried back as JSON, and put into the run's own record here.

    {"entries": [[kind, ...], ...],    what the run's journal says, its end last; see `mlfuncs.runs.journal`
     "log": "what it printed"}

On a cluster nothing comes back but files, so an outcome lies at the artifact URL until its sweep has read it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs.errors import InvalidInput
from mlfuncs.objects import files_at
from mlfuncs.runs.journal import FINISH, failed, read_entries
from mlfuncs.runs.recorder import recorder
from mlfuncs.runs.starting import Started
from mlfuncs.settings import Settings

_SWEEP = re.compile(r"[0-9a-z-]{1,64}")  # it becomes part of a path


def outcome_of(journal: Path, final: Mapping[str, Any] | None = None, log: str = "") -> dict[str, Any]:
    """The outcome that a journal holds; `final` is the run's end when the journal does not have the last word."""
    entries = [[entry.kind, *entry.fields] for chunk, _ in read_entries(journal) for entry in chunk]
    if final is not None:
        entries = [*(entry for entry in entries if entry[0] != FINISH), [FINISH, dict(final)]]
    return {"entries": entries, "log": log}


@dataclass(frozen=True)
class Left:
    """What a run that was cut short left behind: its journal and its log, files that need not be there."""

    journal: Path
    log: Path

    @classmethod
    def under(cls, folder: Path) -> Left:
        """Where a point of a sweep keeps them while it runs in `folder`."""
        return cls(folder / "point.jsonl", folder / "point.txt")

    def ended(self, final: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The outcome: what was logged and printed, and then `final`, unless the journal has the last word."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return outcome_of(self.journal, final, text)


NOTHING = Left(Path(os.devnull), Path(os.devnull))


def final_of(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The run's end: status, error, times, outputs."""
    ends = [entry[1] for entry in outcome["entries"] if entry[0] == FINISH]
    return dict(ends[-1]) if ends else failed("ProcessDied", "it ended without a result")


def keep_outcome(started: Started, outcome: Mapping[str, Any]) -> None:
    """Bring an outcome into the run that was begun here for it, and end the run."""
    for entry in outcome["entries"]:
        if entry[0] != FINISH:
            started.record.journal.append(*entry)
    if outcome["log"]:
        started.log.write(outcome["log"])
    started.end(final_of(outcome))
    recorder().release(started.record)


def store_outcome(settings: Settings, sweep: str, number: int, outcome: Mapping[str, Any]) -> None:
    """Leave the outcome of a sweep's point where the sweep looks for it. Raises StorageError."""
    with _outcomes(settings, sweep) as (files, folder):
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(f"{folder}/{int(number)}.json", json.dumps(outcome).encode())


def stored_outcomes(settings: Settings, sweep: str) -> set[int]:
    """The points of a sweep that have left an outcome. Raises StorageError."""
    with _outcomes(settings, sweep) as (files, folder):
        files.invalidate_cache()
        try:
            names = [path.rpartition("/")[2] for path in files.ls(folder, detail=False)]
        except FileNotFoundError:
            return set()
    return {int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()}


def read_outcome(settings: Settings, sweep: str, number: int) -> dict[str, Any] | None:
    """The outcome of a sweep's point; None when there is none, or not all of it yet. Raises StorageError."""
    with _outcomes(settings, sweep) as (files, folder):
        try:
            return dict(json.loads(files.cat_file(f"{folder}/{int(number)}.json")))
        except (FileNotFoundError, json.JSONDecodeError):
            return None


def forget_outcomes(settings: Settings, sweep: str) -> None:
    """Remove a sweep's outcomes, once they are in the registry. Raises StorageError."""
    with _outcomes(settings, sweep) as (files, folder):
        if files.exists(folder):
            files.rm(folder, recursive=True)


@contextmanager
def _outcomes(settings: Settings, sweep: str) -> Iterator[tuple[Any, str]]:
    """The file system of the artifact URL, and the sweep's folder there."""
    if not _SWEEP.fullmatch(sweep):
        raise InvalidInput(f"{sweep!r} is no id of a sweep")
    with files_at(settings.resolved_artifacts_url, "take or give a sweep's results") as (files, root):
        yield files, f"{root}/sweeps/{settings.project}/{sweep}"
