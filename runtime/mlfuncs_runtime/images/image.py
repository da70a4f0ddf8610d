"""An image as a value: a base, layers on top, and a config; and the archive that `docker load` takes.

The config decides the image's digest (its id is the SHA-256 of the config), and the config is made from the base's and
the layers' digests alone: same input, same image. Format: Docker Image Specification v1.2, whose config is the OCI one.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mlfuncs.errors import SpecError
from mlfuncs_runtime.images.layers import EPOCH_S, Layer

_PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"  # https://github.com/distribution/reference, grammar
_HOST = r"(?:localhost|[A-Za-z0-9.\-\[\]:]*[.:][A-Za-z0-9.\-\[\]:]*)"
_REFERENCE = re.compile(rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.\-]{{0,127}})?")
CREATED = "1980-01-01T00:00:00Z"


def check_reference(name: str) -> str:
    """An image's name with its tag, ":latest" when it has none. Raises SpecError for what no engine takes.

    >>> check_reference("registry.example:5000/team/churn")
    'registry.example:5000/team/churn:latest'
    """
    if not _REFERENCE.fullmatch(name):
        raise SpecError(
            f"{name!r} is not an image's name: write [REGISTRY/]NAME[:TAG], the name in lower case, e.g. "
            "registry.example/team/churn:1"
        )
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@dataclass(frozen=True)
class BaseImage:
    """What an image stands on, as an engine describes it."""

    name: str
    id: str  # "sha256:..."
    diff_ids: tuple[str, ...]
    config: Mapping[str, Any]  # the container config: Env, Entrypoint, User, ...
    architecture: str = "amd64"
    size_bytes: int = 0


@dataclass(frozen=True)
class Image:
    """A whole image: `environ` and `labels` are added to the base's."""

    base: BaseImage
    layers: tuple[Layer, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The image's digest, "sha256:...", by which engines know it."""
        return f"sha256:{hashlib.sha256(self.config).hexdigest()}"

    @property
    def own_layers(self) -> dict[str, Path]:
        """The tars of the layers above the base by their diff ids, the lowest first."""
        return {layer.diff_id: layer.path for layer in self.layers}

    @property
    def config(self) -> bytes:
        """The image's config document."""
        runs = dict(self.base.config)
        variables = dict(item.split("=", 1) for item in runs.get("Env") or ())
        runs["Env"] = [f"{name}={value}" for name, value in {**variables, **self.environ}.items()]
        runs["Labels"] = dict(sorted({**(runs.get("Labels") or {}), **self.labels}.items()))
        keep = ("Env", "Labels", "Entrypoint", "Cmd", "User", "WorkingDir", "ExposedPorts", "Healthcheck", "StopSignal")
        history = [{"created": CREATED, "comment": "base"}] * len(self.base.diff_ids)
        history += [{"created": CREATED, "created_by": "mlfuncs", "comment": layer.note} for layer in self.layers]
        document = {
            "architecture": self.base.architecture,
            "os": "linux",
            "created": CREATED,
            "config": {key: runs[key] for key in keep if runs.get(key)},
            "rootfs": {"type": "layers", "diff_ids": [*self.base.diff_ids, *(layer.diff_id for layer in self.layers)]},
            "history": history,
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def write_archive(image: Image, tags: Sequence[str], file: IO[bytes], layers: Mapping[str, Path]) -> None:
    """Write the archive that `docker load` takes, with the tars of these layers, by diff id, and no others.

    An engine that keeps layers by their chain (every one with the classic image store) needs no layer that it has, the
    base's above all: the archive is as small as what is new.
    """
    names = [f"{diff_id.removeprefix('sha256:')}/layer.tar" for diff_id in image.base.diff_ids]
    names += [f"{layer.digest}/layer.tar" for layer in image.layers]
    config_name = f"{image.id.removeprefix('sha256:')}.json"
    manifest = [{"Config": config_name, "RepoTags": list(tags), "Layers": names}]
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for diff_id, path in layers.items():
            _add(archive, f"{diff_id.removeprefix('sha256:')}/layer.tar", path)
        _add(archive, config_name, image.config)
        _add(archive, "manifest.json", json.dumps(manifest).encode())


def layers_in(archive: IO[bytes], wanted: Sequence[str], folder: Path) -> dict[str, Path]:
    """Unpack the layers with these diff ids out of what `docker save` gave; a missing one is left out."""
    found: dict[str, Path] = {}
    for name, content in _members(archive):
        path = folder / f"part-{len(found)}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        digest = hashlib.sha256()
        with path.open("wb") as file:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        diff_id = f"sha256:{digest.hexdigest()}"
        if diff_id in wanted:
            found[diff_id] = path
        else:
            path.unlink()
    return found


def _members(archive: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=archive, mode="r|*") as members:
        for member in members:
            content = members.extractfile(member) if member.isreg() else None
            if content is not None:
                yield member.name, content


def _add(archive: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    made = tarfile.TarInfo(name)
    made.mtime, made.mode = EPOCH_S, 0o644
    if isinstance(content, bytes):
        made.size = len(content)
        archive.addfile(made, io.BytesIO(content))
        return
    made.size = content.stat().st_size
    with content.open("rb") as file:
        archive.addfile(made, file)
