"""mlfuncs itself, as something that is put into the environments it builds.

It is never downloaded: an environment gets the same code that runs here, by path when that is a source tree (an
editable install), by copy when it is an installed wheel.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
import tomllib
from pathlib import Path

from mlfuncs.bundles.source import OWN_PACKAGES, is_installed_path
from mlfuncs.errors import EnvironmentFailed


def package_folders() -> dict[str, Path]:
    """The folder of each of our packages that is here, by import name."""
    found = {}
    for name in sorted(OWN_PACKAGES):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            found[name] = Path(spec.origin).parent.resolve()
    return found


def install_into(site_packages: Path) -> None:
    """Make our packages importable from `site_packages`: a `.pth` to the source tree, or copies."""
    folders = package_folders()
    if not is_installed_path(str(folders["mlfuncs"])):
        lines = dict.fromkeys(str(folder.parent) for folder in folders.values())
        (site_packages / "mlfuncs-source.pth").write_text("".join(f"{line}\n" for line in lines))
        return
    for name, folder in folders.items():
        shutil.copytree(folder, site_packages / name, ignore=shutil.ignore_patterns("__pycache__"))
    info = _metadata_folder()
    if info is not None:
        shutil.copytree(info, site_packages / info.name)


@functools.cache
def identity() -> str:
    """Changes when another mlfuncs would be put into an environment: its version, and where or what it is."""
    from mlfuncs import __version__

    folder = package_folders()["mlfuncs"]
    if not is_installed_path(str(folder)):
        return f"{__version__} {folder}"
    record = importlib.metadata.distribution("mlfuncs").read_text("RECORD") or ""
    return f"{__version__} {hashlib.sha256(record.encode()).hexdigest()}"


def declared_requirements(extra: str) -> list[str]:
    """The PEP 508 lines that our metadata declares for `extra` ("": those always needed). Raises EnvironmentFailed."""
    from packaging.requirements import Requirement

    lines = _project_lines(extra)
    if lines is None:
        lines = []
        for line in importlib.metadata.distribution("mlfuncs").requires or ():
            requirement = Requirement(line)
            text = str(requirement.marker or "")
            if (f'extra == "{extra}"' in text) if extra else ("extra ==" not in text):
                requirement.marker = None if extra and " and " not in text else requirement.marker
                lines.append(_without_extra(requirement))
    if extra and not lines:
        raise EnvironmentFailed(f"mlfuncs has no extra named {extra!r}")
    return lines


def _without_extra(requirement: object) -> str:
    text = str(requirement)
    head, _, marker = text.partition(";")
    kept = [part.strip() for part in marker.split(" and ") if part.strip() and "extra ==" not in part]
    return f"{head.strip()}; {' and '.join(kept)}" if kept else head.strip()


def _project_lines(extra: str) -> list[str] | None:
    """From `pyproject.toml` beside a source tree, which is newer than the metadata of an editable install."""
    file = package_folders()["mlfuncs"].parent / "pyproject.toml"
    if not file.is_file() or is_installed_path(str(file)):
        return None
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != "mlfuncs":
        return None
    return list(project.get("optional-dependencies", {}).get(extra, [])) if extra else list(project["dependencies"])


def _metadata_folder() -> Path | None:
    for path in importlib.metadata.files("mlfuncs") or []:
        if path.name == "METADATA":
            return Path(str(path.locate())).parent
    return None
