"""Peers to measure against, each in a virtual environment of its own below ~/.cache/mlfuncs-benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlfuncs-benchmarks"
INSTALL_S = 900
FEAST = ["feast[duckdb,redis]>=0.40", "redis>=5,<7", "hiredis", "setuptools<81"]


def peer_python(name: str, packages: list[str]) -> str | None:
    """The interpreter of an environment that holds `packages`, made on first use; None (and why) when it cannot be."""
    folder = CACHE / name
    python = folder / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    if (folder / ".complete").exists():
        return str(python)
    print(f"installing {name} for comparison ...", file=sys.stderr, flush=True)
    try:
        for command in (
            [*uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)],
            [*uv, "pip", "install", "-q", "--python", str(python), *packages],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        reason = (getattr(exc, "stderr", "") or str(exc)).strip().splitlines()[-1]
        print(f"{name} is left out: {reason}", file=sys.stderr)
        return None
    (folder / ".complete").touch()
    return str(python)
