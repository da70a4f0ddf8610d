"""Which code, environment and commit a run was of.

What is cheap is found before the run. What is not (git's word on uncommitted changes, a closure that took long to hash
the last time) is found beside it, so that a small run is not slowed by its own description.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec

_QUICK_S = 0.01
_GIT_TIMEOUT_S = 5.0
_GIT_MEMORY_S = 10.0  # how long an answer about uncommitted changes is good for
_dirty: dict[Path, tuple[float, bool | None]] = {}
_slow: dict[Any, bool] = {}  # code object or class -> whether its closure takes long to hash


def quick_versions(target: Any, spec: FunctionSpec, settings: Settings) -> dict[str, Any]:
    """What `collect_versions` gives, as far as it is known within milliseconds."""
    slow = _slow.get(_key(target), False)
    code = {} if slow else {"code": code_digest(target, spec, settings)}
    return {**code, "environment": environment_digest(), **git_state(folder_of(target), ask=False)}


def is_complete(versions: Mapping[str, Any]) -> bool:
    """Whether nothing is left for `collect_versions` to find."""
    return "code" in versions and ("git_commit" not in versions or "git_dirty" in versions)


def collect_versions(target: Any, spec: FunctionSpec, settings: Settings) -> dict[str, Any]:
    """`code` (digest of source, closure and spec), `environment` (digest of what is installed), git commit and state.

    `code` is None for a function whose closure has no digest; git's are left out outside a checkout.
    """
    code = {"code": code_digest(target, spec, settings)}
    return {**code, "environment": environment_digest(), **git_state(folder_of(target))}


def code_digest(target: Any, spec: FunctionSpec, settings: Settings) -> str | None:
    """A digest that changes when the function, a helper, a closure value or the spec does."""
    from mlfuncs.bundles.closure import walk_closure
    from mlfuncs.secrets import available_secrets

    started = time.perf_counter()
    try:
        closure = walk_closure(target, tuple(available_secrets(spec.secrets, settings).items()))
    except MlfuncsError:
        return None  # it can run here, though it cannot be packed
    _slow[_key(target)] = time.perf_counter() - started > _QUICK_S
    text = json.dumps([closure.digest, spec.to_dict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def environment_digest() -> str:
    """A digest of this interpreter's version and of the name and version of every installed distribution."""
    stamps = []
    for folder in dict.fromkeys(sys.path):
        with contextlib.suppress(OSError):
            stamps.append((folder, os.stat(folder).st_mtime_ns))
    return _environment_digest(tuple(stamps))


@functools.lru_cache(maxsize=4)
def _environment_digest(stamps: tuple[tuple[str, int], ...]) -> str:
    found = {
        entry.name.lower()
        for folder, _changed_ns in stamps
        if os.path.isdir(folder)
        for entry in os.scandir(folder)
        if entry.name.endswith((".dist-info", ".egg-info"))
    }
    return hashlib.sha256("\n".join([sys.version, *sorted(found)]).encode()).hexdigest()


def git_state(folder: Path, *, ask: bool = True) -> dict[str, Any]:
    """`git_commit` and `git_dirty` of the checkout around `folder`: tracked files changed; None: git did not say.

    With `ask` False git is not started, and `git_dirty` is there only when an earlier answer is still fresh.
    """
    from mlfuncs.bundles.source import git_commit

    commit = git_commit(folder)
    if not commit:
        return {}
    known = _dirty.get(folder)
    if known is None or time.monotonic() - known[0] >= _GIT_MEMORY_S:
        if not ask:
            return {"git_commit": commit}
        known = _dirty[folder] = time.monotonic(), _ask_git(folder)
    return {"git_commit": commit, "git_dirty": known[1]}


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


def _key(target: Any) -> Any:
    return getattr(target, "__code__", target)
