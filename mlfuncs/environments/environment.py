"""Environments: which distributions a function needs, at which versions, and an interpreter that has them.

Requirements are inferred from the imports when not given. They are locked to what this interpreter has installed when
that meets them: no network, no waiting. Else uv resolves them, and the function runs in a virtual environment of its
own, one per set of pins, built aside and kept in `home/environments`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlfuncs.errors import EnvironmentFailed
from mlfuncs.files import locked, write_atomically
from mlfuncs.settings import Settings, ensure_home

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def infer_requirements(modules: Iterable[str], home: Path | None = None) -> tuple[str, ...]:
    """PEP 508 lines for the distributions that provide `modules` (dotted names), pinned to the installed versions.

    The standard library, mlfuncs itself and names that no distribution provides give nothing. `home` remembers the
    table of what is installed.
    """
    from mlfuncs.bundles.source import OWN_PACKAGES
    from mlfuncs.environments.installed import installed

    tops = {module: module.partition(".")[0] for module in modules}
    wanted = [module for module, top in tops.items() if top not in sys.stdlib_module_names and top not in OWN_PACKAGES]
    if not wanted:
        return ()
    table, found = installed(home), {}
    for module in wanted:
        for distribution in table.providing(module):
            found[distribution.name.lower()] = distribution.pin
    return tuple(found[name] for name in sorted(found))


def own_extras(modules: Iterable[str], facade: Iterable[str]) -> tuple[str, ...]:
    """The extras of mlfuncs that code needs which imports `modules` and uses the names `facade` of mlfuncs."""
    from mlfuncs.adapters import FACADE

    extras = {FACADE[name][1] for name in facade if name in FACADE}
    packages = {"mlfuncs_featurestore": "featurestore", "mlfuncs_pipelines": "pipelines"}
    extras |= {packages[top] for module in modules if (top := module.partition(".")[0]) in packages}
    return tuple(f"mlfuncs[{extra}]" for extra in sorted(extras))


def lock_requirements(requirements: Sequence[str], settings: Settings, hashes: bool = False) -> tuple[str, ...]:
    """Every distribution that `requirements` need in turn, as sorted "name==version" lines.

    With `hashes`, each line carries its `--hash=` options. Raises EnvironmentFailed, naming the requirement at fault.
    """
    if not requirements:
        return ()
    if not hashes:
        pins = _installed_pins(tuple(requirements), settings)
        if pins is not None:
            return pins
    key = _digest([*sorted(requirements), sys.version.split()[0], _platform(), settings.uv_index_url, hashes])
    cache = settings.home / "locks" / f"{key}.txt"
    if not cache.exists():
        from mlfuncs.environments import uv_commands

        with locked(settings.home / "locks" / f".{key}.lock"):
            if not cache.exists():
                wanted = [*expand_own(requirements), *own_requirements()]
                _announce(f"resolving {', '.join(requirements)}")
                lines = uv_commands.compile_lock(wanted, settings, hashes=hashes)
                write_atomically(cache, "".join(f"{line}\n" for line in lines).encode())
    return tuple(cache.read_text().splitlines())


def environment_digest(lock: Sequence[str]) -> str:
    """The digest of an environment: the pins and Python's minor version."""
    return _digest([*sorted(lock), f"{sys.version_info.major}.{sys.version_info.minor}"])


def satisfied_here(lock: Sequence[str], settings: Settings | None = None) -> bool:
    """Whether this interpreter has every pinned distribution at its version."""
    from packaging.requirements import Requirement

    from mlfuncs.environments.installed import installed

    if not lock:
        return True
    table = installed(settings.home if settings else None)
    return all(table.satisfies(Requirement(line.partition(" --hash=")[0])) for line in lock)


def environment_for(lock: Sequence[str], settings: Settings) -> Path:
    """The path of a Python that has every pinned distribution, and mlfuncs: this one, or a cached environment's.

    A missing environment is built, which takes seconds; concurrent builders wait for one. Raises EnvironmentFailed,
    with nothing half built left behind.
    """
    if satisfied_here(lock, settings):
        return Path(sys.executable)
    root = ensure_home(settings) / "environments"
    folder = root / _digest([environment_digest(lock), _platform(), _own_identity()])
    python = folder / "bin" / "python"
    if python.exists():
        return python
    with locked(root / f".{folder.name}.lock"):
        if not python.exists():
            _build(folder, lock, settings)
    return python


def _build(folder: Path, lock: Sequence[str], settings: Settings) -> None:
    from mlfuncs.environments import uv_commands

    started = time.monotonic()
    _announce(f"building an environment with {_summary(lock)}; it is kept for the next time")
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        python = uv_commands.create_environment(aside / "venv", settings)
        everything = uv_commands.compile_lock([*lock, *own_requirements()], settings, hashes=False)
        uv_commands.install(python, everything, settings)
        _install_own(aside / "venv")
        uv_commands.check_import(python)
        os.rename(aside / "venv", folder)
    except OSError as exc:
        raise EnvironmentFailed(f"the environment cannot be built in {folder.parent}: {exc.strerror or exc}") from exc
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _announce(f"environment ready after {time.monotonic() - started:.1f} s")


def _installed_pins(requirements: tuple[str, ...], settings: Settings) -> tuple[str, ...] | None:
    from mlfuncs.environments.installed import installed

    table = installed(settings.home)
    cache = settings.home / "locks" / f"pins-{_digest([*sorted(requirements), table.stamp])}.json"
    if cache.exists():
        try:
            return tuple(json.loads(cache.read_text()))
        except (ValueError, TypeError, OSError):
            pass  # an unreadable cache is made again
    pins = table.resolve(_parse(line) for line in expand_own(requirements))
    if pins is None:
        return None
    lines = tuple(pin for _, pin in sorted(pins.items()))
    write_atomically(cache, json.dumps(lines).encode())
    return lines


def _parse(line: str) -> Requirement:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(line)
    except InvalidRequirement as exc:
        raise EnvironmentFailed(
            f"requirement {line!r} is not PEP 508: {exc}; write it like 'scikit-learn>=1.5'"
        ) from exc


def expand_own(requirements: Iterable[str]) -> list[str]:
    """`requirements` with `mlfuncs[extra]` replaced by what that extra needs: mlfuncs itself is never downloaded."""
    from packaging.utils import canonicalize_name

    wanted: list[str] = []
    for line in requirements:
        requirement = _parse(line)
        if canonicalize_name(requirement.name) == "mlfuncs":
            wanted += own_requirements(requirement.extras)
        else:
            wanted.append(line)
    return wanted


def own_requirements(extras: Iterable[str] = ()) -> list[str]:
    """What mlfuncs itself needs to run a function, with its `extras`, as PEP 508 lines."""
    from mlfuncs.environments.own import declared_requirements

    lines, waiting, seen = [], [*extras], set()
    lines += declared_requirements("")
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for line in declared_requirements(extra):
            requirement = _parse(line)
            if requirement.name == "mlfuncs":
                waiting += requirement.extras
            else:
                lines.append(line)
    return lines


def _install_own(venv: Path) -> None:
    from mlfuncs.environments.own import install_into

    install_into(next((venv / "lib").glob("python*/site-packages")))


def _own_identity() -> str:
    from mlfuncs.environments.own import identity

    return identity()


def _summary(lock: Sequence[str]) -> str:
    from mlfuncs.environments.installed import installed

    table = installed()
    other = [line for line in lock if not table.satisfies(_parse(line.partition(" --hash=")[0]))]
    return ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")


def _platform() -> str:
    return sysconfig.get_platform()


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def _announce(message: str) -> None:
    print(f"mlfuncs: {message}", file=sys.stderr, flush=True)
