"""Bundles: a function packed with its code, spec and locked requirements, named by the digest of what it means.

A bundle's archive holds `manifest.json`, `source.py` (for people), `sources.json` (the same with file and line, so that
tracebacks in a worker show the code), `code.pkl` (for machines), `modules/` (the user's own modules as files),
`requirements.txt` and `requirements.lock`.

The digest covers the code, its closure, the user's modules, the spec, the locked requirements and Python's minor
version; not comments, line numbers, file names, the project or the commit. The signature covers the archive's bytes.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import linecache
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlfuncs.bundles import store as bundle_store
from mlfuncs.bundles.archive import read_archive, unpack_archive, write_archive
from mlfuncs.bundles.store import StoredBundle
from mlfuncs.errors import BundleError
from mlfuncs.settings import Settings
from mlfuncs.signing import sha256_hex
from mlfuncs.spec import FunctionSpec

FORMAT = 1
_MODULES = "modules"


@dataclass(frozen=True)
class Manifest:
    """What a bundle is, as its `manifest.json` says."""

    name: str
    kind: str  # "function", "class" or "nuclio"
    project: str
    spec: Mapping[str, Any]
    python: str  # e.g. "3.11"
    requirements: tuple[str, ...]
    lock: tuple[str, ...]  # "name==version" lines
    environment_digest: str
    git_commit: str  # "" outside a checkout
    source: str  # the code for people
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)  # packed module -> digest
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` gives an equal manifest back."""
        return dataclasses.asdict(self) | {"requirements": list(self.requirements), "lock": list(self.lock)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """The manifest that `to_dict` wrote."""
        listed = {key: tuple(values[key]) for key in ("requirements", "lock")}
        return cls(**{**values, **listed})

    @property
    def function_spec(self) -> FunctionSpec:
        """The spec as its own type."""
        return FunctionSpec.from_dict(self.spec)


@dataclass(frozen=True)
class Bundle:
    """A bundle that is stored: `path` is its archive in `home`."""

    digest: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class OpenBundle:
    """A bundle whose digest and signature were checked; nothing in it has run yet."""

    digest: str
    path: Path
    manifest: Manifest
    settings: Settings
    _members: Mapping[str, bytes] = dataclasses.field(repr=False)

    def load(self) -> Any:
        """The callable or class. Raises BundleError when this Python is another one than it was built with."""
        here = python_version()
        if self.manifest.python != here:
            raise BundleError(
                f"bundle {self.digest[:12]} of {self.manifest.name!r} was built with Python {self.manifest.python} and "
                f"this is Python {here}; run it with Python {self.manifest.python} or build it again here"
            )
        self._check_modules()
        entry = f"{self.path}/{_MODULES}"
        if self.manifest.modules and entry not in sys.path:
            sys.path.insert(0, entry)
            importlib.invalidate_caches()
        self._show_sources()
        from mlfuncs.bundles.packing import unpack

        return unpack(self._members["code.pkl"])

    def python(self) -> Path:
        """The interpreter that has the locked requirements: this one, or one of a cached environment, built if needed.

        Raises EnvironmentFailed.
        """
        from mlfuncs.environments.environment import environment_for

        return environment_for(self.manifest.lock, self.settings)

    def read(self, name: str) -> bytes:
        """One member of the archive, e.g. "source.py". Raises BundleError when there is none."""
        if name not in self._members:
            raise BundleError(f"bundle {self.digest[:12]} has no {name!r}; it has {', '.join(sorted(self._members))}")
        return self._members[name]

    def unpack(self, folder: Path) -> None:
        """Write the archive's members below `folder`, e.g. for an image."""
        unpack_archive(self.path.read_bytes(), folder)

    def _check_modules(self) -> None:
        from mlfuncs.bundles.siblings import PackedModule, locate

        for name, digest in self.manifest.modules.items():
            if name not in sys.modules:
                continue
            found = locate(name)
            if found is None or found.source is None:
                raise BundleError(f"module {name!r} of the bundle is hidden by an installed one; rename yours")
            member = next(path for path in _module_paths(name) if f"{_MODULES}/{path}" in self._members)
            if PackedModule(name, member, found.source).digest != digest:
                raise BundleError(
                    f"module {name!r} is already imported here with other code than the bundle of "
                    f"{self.manifest.name!r} has; load the bundle in a new process"
                )

    def _show_sources(self) -> None:
        texts: dict[str, dict[int, str]] = {}
        for snippet in json.loads(self._members["sources.json"]):
            for number, line in enumerate(snippet["text"].splitlines(keepends=True), snippet["first_line"]):
                texts.setdefault(snippet["filename"], {})[number] = line
        for filename, lines in texts.items():
            if not linecache.getlines(filename):
                whole = [lines.get(number, "\n") for number in range(1, max(lines) + 1)]
                linecache.cache[filename] = (sum(map(len, whole)), None, whole, filename)


def build_bundle(target: Any, spec: FunctionSpec, settings: Settings) -> Bundle:
    """Pack `target` under `spec`, sign and store it; a bundle that is stored already is only looked up.

    Raises BundleError (a value cannot be packed), EnvironmentFailed, SpecError or StorageError.
    """
    from mlfuncs.bundles.closure import walk_closure
    from mlfuncs.bundles.siblings import collect_siblings
    from mlfuncs.environments.environment import environment_digest, infer_requirements, lock_requirements, own_extras
    from mlfuncs.interface.signature import function_kind
    from mlfuncs.secrets import available_secrets, encodings_of

    bundle_store.prepare(settings)
    secrets = {name: v for name, v in available_secrets(spec.secrets, settings).items() if encodings_of(v)}
    closure = walk_closure(target, tuple(secrets.items()))
    siblings = collect_siblings(closure.modules)
    if spec.requirements is None:
        requirements = infer_requirements(siblings.external, settings.home)
    else:
        requirements = spec.requirements
    extras = own_extras(closure.modules, closure.facade)
    if spec.features:  # its worker reads them, also when its code names nothing of the feature store
        extras = tuple(dict.fromkeys([*extras, "mlfuncs[featurestore]"]))
    requirements = (*requirements, *extras)
    lock = lock_requirements(requirements, settings)
    manifest = Manifest(
        name=spec.name,
        kind=function_kind(target),
        project=settings.project,
        spec=spec.to_dict(),
        python=python_version(),
        requirements=tuple(requirements),
        lock=lock,
        environment_digest=environment_digest(lock),
        git_commit=_commit_of(target),
        source=_source_text(spec.name, closure.texts),
        modules={module.name: module.digest for module in siblings.packed},
    )
    digest = _digest(closure.digest, manifest)
    stored = bundle_store.find_own(digest, settings)
    if stored is None:
        members = _members(target, closure, siblings, manifest)
        _check_secrets(members, secrets, spec.name)
        stored = bundle_store.keep(digest, write_archive(members), settings)
    return Bundle(digest, stored.folder / bundle_store.ARCHIVE, manifest)


def open_bundle(digest: str, settings: Settings) -> OpenBundle:
    """The bundle with this digest, checked before anything in it runs; fetched from the artifact URL when not here.

    Raises NotFound, UntrustedError (changed, unsigned, or signed by a key that is not trusted) or BundleError.
    """
    stored: StoredBundle = bundle_store.find(digest, settings)
    members = read_archive(stored.content)
    manifest = _read_manifest(members, digest)
    return OpenBundle(digest, stored.folder / bundle_store.ARCHIVE, manifest, settings, members)


def python_version() -> str:
    """This interpreter's version as a bundle records it, e.g. "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _read_manifest(members: Mapping[str, bytes], digest: str) -> Manifest:
    try:
        values = json.loads(members["manifest.json"])
    except (KeyError, ValueError) as exc:
        raise BundleError(f"bundle {digest[:12]} has no readable manifest.json; build it again") from exc
    if values.get("format") != FORMAT:
        raise BundleError(
            f"bundle {digest[:12]} has format {values.get('format')!r} and this mlfuncs reads {FORMAT}; "
            "use the mlfuncs version that built it, or build it again"
        )
    return Manifest.from_dict(values)


def _digest(closure: str, manifest: Manifest) -> str:
    meaning = {
        "format": FORMAT,
        "closure": closure,
        "kind": manifest.kind,
        "spec": dict(manifest.spec),
        "python": manifest.python,
        "requirements": list(manifest.requirements),
        "lock": list(manifest.lock),
        "modules": dict(manifest.modules),
    }
    return sha256_hex(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode())


def _members(target: Any, closure: Any, siblings: Any, manifest: Manifest) -> dict[str, bytes]:
    from mlfuncs.bundles.packing import pack

    snippets = [dataclasses.asdict(snippet) for snippet in closure.texts]
    members = {
        "manifest.json": json.dumps(manifest.to_dict(), sort_keys=True, indent=1).encode(),
        "source.py": manifest.source.encode(),
        "sources.json": json.dumps(snippets, sort_keys=True).encode(),
        "code.pkl": pack(target, closure.by_value),
        "requirements.txt": "".join(f"{line}\n" for line in manifest.requirements).encode(),
        "requirements.lock": "".join(f"{line}\n" for line in manifest.lock).encode(),
    }
    for module in siblings.packed:
        members[f"{_MODULES}/{module.path}"] = module.source
    return members


def _check_secrets(members: Mapping[str, bytes], secrets: Mapping[str, str], name: str) -> None:
    from mlfuncs.secrets import encodings_of

    for secret, value in secrets.items():
        for member, data in members.items():
            if any(form.encode() in data for form in encodings_of(value)):
                raise BundleError(
                    f"function {name!r}: {member} of its bundle would hold the value of the secret {secret!r}; "
                    f"remove it from the code and read it inside the function with ml.secret({secret!r})"
                )


def _source_text(name: str, texts: tuple[Any, ...]) -> str:
    parts = [f"# The code of {name!r} as it was written, the function first, then what it uses.\n"]
    parts += [f"\n# line {snippet.first_line}\n{snippet.text}" for snippet in texts]
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts)


def _commit_of(target: Any) -> str:
    from mlfuncs.bundles.source import git_commit

    code = getattr(target, "__code__", None)
    file = Path(getattr(code, "co_filename", "") or "")
    return git_commit(file.parent.absolute() if file.is_file() else Path.cwd())


def _module_paths(name: str) -> tuple[str, str]:
    return name.replace(".", "/") + ".py", name.replace(".", "/") + "/__init__.py"
