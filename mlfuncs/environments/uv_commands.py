"""uv, called as a command: resolve, create, install. Its errors become ours, with the requirement at fault named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlfuncs.errors import EnvironmentFailed
from mlfuncs.settings import Settings

_TIMEOUT_S = 900  # a guess: a large download on a slow line
_USEFUL_LINES = 6


def compile_lock(requirements: Sequence[str], settings: Settings, *, hashes: bool) -> list[str]:
    """The full set of pins for `requirements`, sorted; versions installed here are preferred where they fit."""
    from mlfuncs.environments.installed import installed

    with tempfile.TemporaryDirectory() as folder:
        wanted, pins = Path(folder) / "requirements.in", Path(folder) / "requirements.lock"
        wanted.write_text("".join(f"{line}\n" for line in requirements))
        pins.write_text("".join(f"{d.name}=={d.version}\n" for d in installed().all() if "+" not in d.version))
        arguments = ["pip", "compile", str(wanted), "-o", str(pins), "--python", sys.executable, "--quiet"]
        arguments += ["--no-header", "--no-annotate", *(["--generate-hashes"] if hashes else [])]
        _run(arguments, settings, requirements)
        text = pins.read_text()
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return sorted(line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#"))


def create_environment(folder: Path, settings: Settings) -> Path:
    """Make an empty virtual environment that may be moved; the path of its Python."""
    _run(["venv", "--relocatable", "--no-project", "--quiet", "--python", sys.executable, str(folder)], settings, ())
    return folder / "bin" / "python"


def install(python: Path, pins: Sequence[str], settings: Settings) -> None:
    """Install exactly `pins` into the environment of `python`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("".join(f"{line}\n" for line in pins))
        _run(["pip", "install", "--quiet", "--python", str(python), "--no-deps", "-r", str(file)], settings, pins)


def install_into(folder: Path, pins: Sequence[str], python: str, platform: str, settings: Settings) -> None:
    """Install exactly `pins` into a plain folder, for Python `python` (e.g. "3.11") on uv's `platform`."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "requirements.txt"
        file.write_text("".join(f"{line}\n" for line in pins))
        arguments = ["pip", "install", "--quiet", "--target", str(folder), "--no-deps", "--link-mode", "copy"]
        arguments += ["--python", sys.executable, "--python-version", python, "--python-platform", platform]
        _run([*arguments, "-r", str(file)], settings, pins)


def check_import(python: Path) -> None:
    """Check that an environment can run functions. Raises EnvironmentFailed."""
    code = "import mlfuncs.bundles.bundle, mlfuncs.bundles.packing"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise EnvironmentFailed(f"the new environment cannot import mlfuncs: {reason[0]}")


def _run(arguments: Sequence[str], settings: Settings, requirements: Sequence[str]) -> None:
    environ = {
        key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    }
    environ |= {"NO_COLOR": "1", "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never"}
    if settings.uv_index_url:
        environ["UV_DEFAULT_INDEX"] = settings.uv_index_url
    try:
        done = subprocess.run(
            [_uv(), *arguments], capture_output=True, text=True, env=environ, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise EnvironmentFailed(
            f"uv {arguments[0]} did not end within {_TIMEOUT_S} s; is the index reachable?"
        ) from exc
    if done.returncode:
        raise EnvironmentFailed(_explain(done.stderr, requirements))


def _uv() -> str:
    import uv

    try:
        return uv.find_uv_bin()
    except FileNotFoundError as exc:
        raise EnvironmentFailed("the uv command is missing beside its package; reinstall it: pip install uv") from exc


def _explain(stderr: str, requirements: Sequence[str]) -> str:
    """One message from uv's: the requirement at fault first, then its last useful lines.

    >>> _explain("error: boom for nosuch", ["numpy", "nosuch>=1"])
    "requirement 'nosuch>=1' cannot be met: boom for nosuch; ..."
    """
    lines = [re.sub(r"^[\s×╰─▶├│]+", "", line).strip() for line in stderr.splitlines()]
    useful = " ".join(
        [line.removeprefix("error: ") for line in lines if line and not line.startswith("warning:")][-_USEFUL_LINES:]
    )
    faulty = [
        line for line in requirements if re.search(rf"(?<![\w.-]){re.escape(_name(line))}(?![\w-])", useful, re.I)
    ]
    if faulty:
        what = f"requirement {faulty[0]!r} cannot be met"
    else:
        what = f"the requirements {', '.join(requirements)} cannot be met" if requirements else "uv failed"
    return f"{what}: {useful}; correct it in requirements=[...] or set MLFUNCS_UV_INDEX_URL"


def _name(line: str) -> str:
    return re.split(r"[\s\[<>=!~;@]", line, maxsplit=1)[0]
