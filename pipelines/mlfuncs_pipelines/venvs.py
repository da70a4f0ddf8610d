"""A cached virtual environment per set of packages, for kfp's lightweight components; never the user's own."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mlfuncs.errors import EnvironmentFailed
from mlfuncs.settings import Settings, ensure_home
from mlfuncs_pipelines.lightweight import Lightweight

_INSTALL_TIMEOUT_S = 1800


def python_for(component: Lightweight, settings: Settings) -> Path:
    """A Python that has what `component` installs: this one when it has it already, else a cached environment's.

    Raises EnvironmentFailed with the installer's own words.
    """
    wanted = _base_python(component.python)
    if wanted == sys.executable and _is_satisfied_here(component.packages):
        return Path(sys.executable)
    folder = ensure_home(settings) / "environments" / f"kfp-{environment_digest(component)[:24]}"
    python = folder / "bin" / "python"
    if python.exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not python.exists():
            _build(component, folder, wanted, settings)
    return python


def environment_digest(component: Lightweight) -> str:
    """SHA-256 of what decides the environment: packages, indexes, kfp's version, Python's version."""
    python = component.python or f"{sys.version_info.major}.{sys.version_info.minor}"
    body = [sorted(component.packages), component.index_options, component.kfp_requirement, python]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _build(component: Lightweight, folder: Path, python: str, settings: Settings) -> None:
    """Make the environment aside and rename it, so that a half-made one is never used."""
    aside = folder.with_suffix(f".{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    environment = {**os.environ, "VIRTUAL_ENV": str(aside), "UV_LINK_MODE": "hardlink"}
    if settings.uv_index_url and not component.index_options:
        environment["UV_DEFAULT_INDEX"] = settings.uv_index_url
    what = ", ".join(component.packages) or "kfp"
    try:
        _uv(["venv", "--quiet", "--relocatable", "--python", python, str(aside)], environment, what)
        target = ["--python", str(aside / "bin" / "python")]
        if component.packages:
            options = [word for word in component.index_options if word]
            _uv(["pip", "install", "--quiet", *target, *options, *component.packages], environment, what)
        # the executor needs kfp's own modules only, as in the command that the kfp compiler writes
        kfp = component.kfp_requirement or f"kfp=={importlib.metadata.version('kfp')}"
        _uv(["pip", "install", "--quiet", "--no-deps", *target, kfp], environment, what)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _uv(arguments: list[str], environment: dict[str, str], what: str) -> None:
    try:
        done = subprocess.run(
            [_uv_program(), *arguments], env=environment, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as exc:
        raise EnvironmentFailed(f"installing {what} took over {_INSTALL_TIMEOUT_S} s and was stopped") from exc
    if done.returncode:
        reason = done.stderr.strip()[-2000:]
        raise EnvironmentFailed(f"the environment with {what} cannot be built: {reason}")


@functools.cache
def _uv_program() -> str:
    try:
        import uv

        return uv.find_uv_bin()
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
        if found is None:
            raise EnvironmentFailed("uv is not installed, and a step needs packages: pip install uv") from None
        return found


@functools.cache
def _base_python(version: str) -> str:
    """The interpreter for an image with Python `version`: another minor version when this machine has it."""
    found = shutil.which(f"python{version}")
    if not found or version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    runs = subprocess.run([found, "-c", ""], capture_output=True).returncode == 0  # pyenv's stand-ins may not
    return found if runs else sys.executable


def _is_satisfied_here(packages: tuple[str, ...]) -> bool:
    """Whether this interpreter's environment fulfils every requirement; one with extras or a URL never counts."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in packages:
        try:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate():
                continue
            installed = importlib.metadata.version(requirement.name)
        except (InvalidRequirement, importlib.metadata.PackageNotFoundError):
            return False
        if requirement.extras or requirement.url or not requirement.specifier.contains(installed, prereleases=True):
            return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
