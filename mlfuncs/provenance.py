"""Which code, environment and commit a run was of.

Collected beside the run, not before it: hashing a closure, reading the installed packages and asking git take longer
than a small run itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec

_GIT_TIMEOUT_S = 5.0
_GIT_MEMORY_S = 10.0  # how long an answer about uncommitted changes is good for
_dirty: dict[Path, tuple[float, bool | None]] = {}
_lock = threading.Lock()


def collect_versions(target: Any, spec: FunctionSpec, settings: Settings) -> dict[str, Any]:
    """`code` (digest of source, closure and spec), `environment` (digest of what is installed), git commit and state.

    `code` is None for a function whose closure has no digest; git's are left out outside a checkout.
    """
    return {
        "code": code_digest(target, spec, settings),
        "environment": environment_digest(),
        **git_state(folder_of(target)),
    }


def code_digest(target: Any, spec: FunctionSpec, settings: Settings) -> str | None:
    """A digest that changes when the function, a helper, a closure value or the spec does."""
    from mlfuncs.closure import walk_closure
    from mlfuncs.secrets import available_secrets

    try:
        closure = walk_closure(target, tuple(available_secrets(spec.secrets, settings).items()))
    except MlfuncsError:
        return None  # it can run here, though it cannot be packed
    text = json.dumps([closure.digest, spec.to_dict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def environment_digest() -> str:
    """A digest of this interpreter's version and of the name and version of every installed distribution."""
    found = {
        entry.name.lower()
        for folder in dict.fromkeys(sys.path)
        if os.path.isdir(folder)
        for entry in os.scandir(folder)
        if entry.name.endswith((".dist-info", ".egg-info"))
    }
    return hashlib.sha256("\n".join([sys.version, *sorted(found)]).encode()).hexdigest()


def git_state(folder: Path) -> dict[str, Any]:
    """`git_commit` and `git_dirty` of the checkout around `folder`: tracked files changed; None: git did not say."""
    from mlfuncs.source import git_commit

    commit = git_commit(folder)
    return {"git_commit": commit, "git_dirty": _is_dirty(folder)} if commit else {}


def _is_dirty(folder: Path) -> bool | None:
    with _lock:
        found = _dirty.get(folder)
        if found is not None and time.monotonic() - found[0] < _GIT_MEMORY_S:
            return found[1]
        answer = _ask_git(folder)
        _dirty[folder] = time.monotonic(), answer
        return answer


def _ask_git(folder: Path) -> bool | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, timeout=_GIT_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    return bool(done.stdout.strip()) if done.returncode == 0 else None


def folder_of(target: Any) -> Path:
    """The folder of the file that defines `target`, else the working directory."""
    code = getattr(target, "__code__", None)
    file = Path(getattr(code, "co_filename", "") or "")
    return file.parent.absolute() if file.is_file() else Path.cwd()
