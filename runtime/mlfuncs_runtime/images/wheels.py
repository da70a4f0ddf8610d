"""The layer of a function's locked distributions, installed on this machine and compiled, never in the image.

Because uv resolves, downloads and unpacks here, an index, its password, a proxy and a company's certificates are this
machine's own and cannot get into an image; an image of the same lock needs no network the second time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlfuncs.environments import uv_commands
from mlfuncs.errors import EnvironmentFailed
from mlfuncs.files import locked, write_atomically
from mlfuncs.settings import Settings
from mlfuncs_runtime.images.layers import Layer, entries_of, find_layer, write_layer

SITE_PACKAGES = "/opt/function/site-packages"
_FORMAT = 1
_GLIBC = "2_36"  # Debian 12's, that of python:3.11-slim
_MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_DROPPED = ("direct_url.json", "uv_cache.json", "REQUESTED", "INSTALLER")  # say where and how, not what
_COMPILE_S = 900.0


def wheels_layer(lock: Sequence[str], python: str, settings: Settings) -> Layer | None:
    """The layer with these pins for Python `python` (e.g. "3.11"); None for no pins. Raises EnvironmentFailed."""
    if not lock:
        return None
    folder = settings.home / "images" / "layers"
    target = f"{machine()}-manylinux_{_GLIBC}"
    key = hashlib.sha256(json.dumps([_FORMAT, sorted(lock), python, target]).encode()).hexdigest()
    known = settings.home / "images" / f"wheels-{key}"
    with locked(settings.home / "images" / f".{key}.lock"):
        layer = find_layer(known.read_text(), folder, _note(lock)) if known.is_file() else None
        if layer is None:
            layer = _install(lock, python, target, settings, folder)
            write_atomically(known, layer.digest.encode())
    return layer


def machine() -> str:
    """The processor that images are made for: this machine's. Raises EnvironmentFailed for one without wheels."""
    found = _MACHINES.get(platform.machine())
    if found is None:
        raise EnvironmentFailed(f"images can be built for x86_64 and aarch64, and this is {platform.machine()!r}")
    return found


def _install(lock: Sequence[str], python: str, target: str, settings: Settings, folder: Path) -> Layer:
    aside = Path(tempfile.mkdtemp(prefix="wheels-", dir=_made(settings.home / "images")))
    try:
        site = aside / "site-packages"
        uv_commands.install_into(site, list(lock), python, target, settings)
        _tidy(site)
        _compile(site, python)
        return write_layer(entries_of(site, SITE_PACKAGES), folder, _note(lock))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tidy(site: Path) -> None:
    """Remove what differs between two installs of the same wheels, and command-line scripts, which name a Python."""
    shutil.rmtree(site / "bin", ignore_errors=True)
    (site / ".lock").unlink(missing_ok=True)
    for folder in site.glob("*.dist-info"):
        for name in _DROPPED:
            (folder / name).unlink(missing_ok=True)
        record = folder / "RECORD"
        if record.is_file():
            kept = [line for line in record.read_text(encoding="utf-8").splitlines() if not _is_dropped(line)]
            record.write_text("".join(f"{line}\n" for line in sorted(kept)), encoding="utf-8")


def _is_dropped(line: str) -> bool:
    name = line.partition(",")[0]
    return name.endswith(_DROPPED) or name.startswith(("../", "bin/")) or name.endswith(".pyc")


def _compile(site: Path, python: str) -> None:
    """Byte code for a read-only image, without times in it; only when this Python writes what that one reads."""
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        return
    command = [sys.executable, "-I", "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(site), "-p", SITE_PACKAGES, str(site)]
    environ = {**os.environ, "PYTHONHASHSEED": "0"}
    # a file that does not compile (a template, a test of a syntax error) is no fault: it would not be imported either
    subprocess.run(command, env=environ, capture_output=True, timeout=_COMPILE_S, check=False)


def _note(lock: Sequence[str]) -> str:
    return f"{len(lock)} locked distributions"


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
