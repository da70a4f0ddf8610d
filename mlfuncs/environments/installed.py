"""What is installed in this interpreter: import names to distributions, versions, and what they need in turn.

Reading the metadata of every distribution takes tens of milliseconds, so the table is kept in `home/locks` until one of
the folders on the import path changes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.files import write_atomically

_INFO = (".dist-info", ".egg-info", ".egg", ".egg-link")

if TYPE_CHECKING:  # packaging takes tens of milliseconds to import, and a remembered lock needs none of it
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class Distribution:
    """One installed distribution: `requires` are its PEP 508 lines, `origin` a VCS requirement it came from or ""."""

    name: str
    version: str
    requires: tuple[str, ...]
    imports: tuple[str, ...]  # top-level import names
    origin: str = ""

    @property
    def pin(self) -> str:
        """The PEP 508 line that asks for exactly this: "name==version", or where it came from."""
        return self.origin or f"{self.name}=={self.version.partition('+')[0]}"


class Installed:
    """The installed distributions by canonical name."""

    def __init__(self, distributions: Iterable[Distribution], stamp: str = "") -> None:
        self.stamp = stamp  # changes when a distribution is installed, upgraded or removed
        self._by_name = {canonicalize_name(d.name): d for d in distributions}
        self._by_import: dict[str, list[Distribution]] = {}
        for distribution in self._by_name.values():
            for name in distribution.imports:
                self._by_import.setdefault(name, []).append(distribution)

    def all(self) -> list[Distribution]:
        """Every distribution, by name."""
        return sorted(self._by_name.values(), key=lambda d: d.name.lower())

    def get(self, name: str) -> Distribution | None:
        """The distribution of that name, or None."""
        return self._by_name.get(canonicalize_name(name))

    def providing(self, module: str) -> list[Distribution]:
        """The distributions that may provide a dotted module; for a shared namespace those that hold that very path."""
        found = self._by_import.get(module.partition(".")[0], [])
        if len(found) < 2:
            return found
        path = module.replace(".", "/")
        exact = [d for d in found if _holds(d.name, path)]
        return exact or found

    def satisfies(self, requirement: Requirement) -> bool:
        """Whether the installed version meets a requirement. A URL requirement is met only by the same origin."""
        distribution = self.get(requirement.name)
        if distribution is None:
            return False
        if requirement.url:
            return distribution.origin.endswith(requirement.url)
        from packaging.version import InvalidVersion, Version

        try:
            return requirement.specifier.contains(Version(distribution.version), prereleases=True)
        except InvalidVersion:
            return False

    def resolve(self, requirements: Iterable[Requirement]) -> dict[str, str] | None:
        """The pins, by name, that meet `requirements` and what these need in turn; None when one is not met here."""
        pins: dict[str, str] = {}
        waiting = list(requirements)
        seen: set[tuple[str, frozenset[str]]] = set()
        while waiting:
            requirement = waiting.pop()
            if not _applies(requirement, ()):
                continue
            if not self.satisfies(requirement):
                return None
            distribution = self._by_name[canonicalize_name(requirement.name)]
            key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if key in seen:
                continue
            seen.add(key)
            pins[key[0]] = distribution.pin
            for line in distribution.requires:
                if not requirement.extras and "extra ==" in line:
                    continue  # parsing it is most of the work, and it cannot apply
                needed = _parse(line)
                if needed is not None and _applies(needed, requirement.extras):
                    needed.marker = None
                    waiting.append(needed)
        return pins


def installed(home: Path | None = None) -> Installed:
    """The distributions of this interpreter; with `home`, remembered there from process to process."""
    stamp = _stamp()
    return _installed(stamp, None if home is None else home / "locks" / f"installed-{stamp}.json")


@functools.lru_cache(maxsize=4)
def _installed(stamp: str, cache: Path | None) -> Installed:
    if cache is not None and cache.exists():
        try:
            rows = json.loads(cache.read_text())
            return Installed((_from_row(row) for row in rows), stamp)
        except (ValueError, TypeError, KeyError, OSError):
            pass  # an unreadable cache is made again
    distributions = _scan()
    if cache is not None:
        write_atomically(cache, json.dumps([vars(d) for d in distributions]).encode())
    return Installed(distributions, stamp)


def _from_row(row: dict[str, Any]) -> Distribution:
    return Distribution(**{**row, "requires": tuple(row["requires"]), "imports": tuple(row["imports"])})


def _stamp() -> str:
    """Changes when a distribution is installed, upgraded or removed."""
    parts = [sys.version, sysconfig.get_platform(), sys.prefix]
    for place in sys.path:
        place = place or os.curdir
        with contextlib.suppress(OSError):
            if "site-packages" in place or "dist-packages" in place:
                parts.append(f"{place}:{os.stat(place).st_mtime_ns}")
            elif os.path.isdir(place):  # files come and go in the user's own folders: what counts is what is installed
                parts += [f"{place}/{name}" for name in sorted(os.listdir(place)) if name.endswith(_INFO)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _scan() -> list[Distribution]:
    found: dict[str, Distribution] = {}
    for place in sys.path:
        for item in _in_folder(place or os.curdir):
            found.setdefault(canonicalize_name(item.name), item)  # the first on the path is the one that is imported
    return list(found.values())


def _in_folder(place: str) -> Iterator[Distribution]:
    """The distributions in one place of the import path, read without parsing what is not needed.

    `importlib.metadata` parses every description as an e-mail: half a second for two hundred distributions, against
    thirty milliseconds. It still reads what is not a folder of `.dist-info` (eggs, zip files).
    """
    try:
        names = os.listdir(place)
    except NotADirectoryError:
        names = ["archive.egg"]  # a zip file
    except OSError:
        return
    for name in sorted(names):
        if name.endswith(".dist-info"):
            found = _read_dist_info(os.path.join(place, name))
            if found is not None:
                yield found
    if any(name.endswith(_INFO[1:]) for name in names):
        for item in importlib.metadata.distributions(path=[place]):
            if item.metadata["Name"] and not str(getattr(item, "_path", "")).endswith(".dist-info"):
                imports = _declared(item.read_text("top_level.txt"))
                imports = imports or _imports_of(item.read_text("RECORD") or item.read_text("SOURCES.txt"))
                requires = tuple(item.requires or ())
                origin = _origin(item.metadata["Name"], item.read_text("direct_url.json"))
                yield Distribution(item.metadata["Name"], item.version, requires, imports, origin)


def _read_dist_info(folder: str) -> Distribution | None:
    text = _read(os.path.join(folder, "METADATA"))
    if text is None:
        return None
    headers = re.sub(r"\r?\n[ \t]+", " ", re.split(r"\r?\n\r?\n", text, maxsplit=1)[0])
    fields: dict[str, list[str]] = {}
    for line in headers.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.lower(), []).append(value.strip())
    if not fields.get("name") or not fields.get("version"):
        return None
    name = fields["name"][0]
    imports = _declared(_read(os.path.join(folder, "top_level.txt")))
    imports = imports or _imports_of(_read(os.path.join(folder, "RECORD")))
    origin = _origin(name, _read(os.path.join(folder, "direct_url.json")))
    return Distribution(name, fields["version"][0], tuple(fields.get("requires-dist", ())), imports, origin)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except OSError:
        return None


def _declared(top_level: str | None) -> tuple[str, ...]:
    return tuple(sorted({name.replace("/", ".").partition(".")[0] for name in (top_level or "").split()}))


def _imports_of(record: str | None) -> tuple[str, ...]:
    """The import names of the modules among a distribution's files."""
    names = set()
    for path in _PYTHON_FILE.findall(record or ""):
        first, nested, _ = path.partition("/")
        name = first if nested else first.partition(".")[0]
        if name.isidentifier():
            names.add(name)
    return tuple(sorted(names))


_PYTHON_FILE = re.compile(r'^"?([^,"\n]+\.(?:py|so|pyd))(?=["\r,]|$)', re.MULTILINE)


def _origin(name: str, text: str | None) -> str:
    if not text:
        return ""
    try:
        values = json.loads(text)
        vcs = values.get("vcs_info")
        return f"{name} @ {vcs['vcs']}+{values['url']}@{vcs['commit_id']}" if vcs else ""
    except (ValueError, KeyError, TypeError):
        return ""


@functools.lru_cache(maxsize=1024)
def _holds(name: str, path: str) -> bool:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:  # removed since the table was made
        return False
    return any(str(file).startswith((path + "/", path + ".")) for file in files)


def canonicalize_name(name: str) -> str:
    """A distribution's name in the one form of PEP 503, e.g. "scikit-learn"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _parse(line: str) -> Requirement | None:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(line)
    except InvalidRequirement:
        return None


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**_markers(), "extra": extra}) for extra in (*extras, ""))


@functools.cache
def _markers() -> dict[str, Any]:
    from packaging.markers import default_environment

    return dict(default_environment())
