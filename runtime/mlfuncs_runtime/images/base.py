"""What the base image is built from: the Dockerfile, and exactly the files that it copies.

In a checkout they are where they are. An installed wheel brings the Dockerfile and what stands beside it as data in
`SHIPPED` (pyproject.toml puts them there), and its packages are the ones installed: the same context, the same image.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlfuncs
from mlfuncs.environments.own import package_folders
from mlfuncs.errors import NotFound, SpecError
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec
from mlfuncs_runtime.images.layers import Entry

CUDA = "cuda"  # the extra with CUDA's libraries
FILES = ("Dockerfile", "pyproject.toml", "LICENSE")
PACKAGES = {  # import name -> folder in the context
    "mlfuncs": "mlfuncs",
    "mlfuncs_runtime": "runtime/mlfuncs_runtime",
    "mlfuncs_pipelines": "pipelines/mlfuncs_pipelines",
    "mlfuncs_featurestore": "featurestore/mlfuncs_featurestore",
}
SHIPPED = Path(__file__).with_name("shipped")  # in an installed wheel only
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_CERTIFICATES_FILE = "certificates.pem"  # in the context; the Dockerfile's first stage alone has it


@dataclass(frozen=True)
class BaseWish:
    """What functions want to stand on: the image that they name, else one with CUDA's libraries when they have GPUs."""

    image: str = ""
    cuda: bool = False

    @classmethod
    def of(cls, functions: Iterable[tuple[FunctionSpec, Sequence[str]]]) -> BaseWish:
        """The wish of functions, each with its lock, that share an image. Raises SpecError when they do not agree.

        Only GPUs of NVIDIA need CUDA's libraries, and only where the locked distributions, e.g. PyTorch's, have none.
        """
        made = list(functions)
        images = sorted({spec.base_image for spec, _ in made} - {""})
        if len(images) > 1:
            raise SpecError(f"one image has one base, and these functions name {', '.join(images)}: build one for each")
        return cls("".join(images), any(_asks_for_nvidia(spec) and not _has_cuda(lock) for spec, lock in made))

    def name(self, settings: Settings) -> str:
        """The base's name where no engine can be asked."""
        named = self.image or settings.base_image
        return named or settings.resolved_base_image + f"-{CUDA}" * self.cuda


def _asks_for_nvidia(spec: FunctionSpec) -> bool:
    return bool(spec.resources.gpu) and spec.resources.gpu_type.startswith("nvidia.com/")


def _has_cuda(lock: Sequence[str]) -> bool:
    return any(line.startswith(("nvidia-cublas", "nvidia-cuda-runtime")) for line in lock)


@dataclass(frozen=True)
class BaseSource:
    """The files by their names in the context, the Dockerfile among them; `python_image` is what it builds from."""

    files: Mapping[str, Path]
    python_image: str
    extras: tuple[str, ...] = ()  # of mlfuncs, whose dependencies are put in as well

    def tag(self, python_id: str) -> str:
        """The base's name: the release, and a digest of everything that it is made of."""
        whole = hashlib.sha256(" ".join([python_id, *self.extras]).encode())
        for entry in sorted(self._sources(), key=lambda entry: entry.name):
            assert isinstance(entry.source, Path)
            whole.update(f"{entry.name}\0".encode())
            whole.update(hashlib.sha256(entry.source.read_bytes()).digest())
        return f"mlfuncs/base:{mlfuncs.__version__}-{whole.hexdigest()[:12]}"

    def check_extras(self) -> None:
        """Raise NotFound for an extra that mlfuncs does not have."""
        project = tomllib.loads(self.files["pyproject.toml"].read_text(encoding="utf-8"))["project"]
        known = [*project["optional-dependencies"], "platform"]
        for extra in self.extras:
            if extra not in known:
                raise NotFound("extra of mlfuncs", extra, known)

    def context(self) -> list[Entry]:
        """The files that are sent to a builder."""
        certificates = own_certificates()
        extra = [Entry(_CERTIFICATES_FILE, certificates)] if certificates else []
        return self._sources() + extra

    def arguments(self, settings: Settings) -> dict[str, str]:
        """The build arguments. Those of `private_arguments` reach no layer of the final stage."""
        found = {"PYTHON_IMAGE": self.python_image, "VERSION": mlfuncs.__version__, "EXTRAS": " ".join(self.extras)}
        found["FOR_PYTHON"] = f"{sys.version_info.major}.{sys.version_info.minor}"
        if own_certificates():
            found["CERTIFICATES"] = f"/src/{_CERTIFICATES_FILE}"
        return found | private_arguments(settings)

    def _sources(self) -> list[Entry]:
        return [Entry(name, path) for name, path in self.files.items()]


def find_source() -> BaseSource:
    """What this mlfuncs, a checkout or an installed wheel, builds its base from. Raises NotFound naming what lacks."""
    folders = package_folders()
    beside = SHIPPED if SHIPPED.is_dir() else folders["mlfuncs"].parent
    files = {name: beside / name for name in FILES}
    for name, place in PACKAGES.items():
        for path in _files_in(folders[name]) if name in folders else ():
            files[f"{place}/{path}"] = folders[name] / path
    missing = [name for name in FILES if not files[name].is_file()] + [n for n in PACKAGES if n not in folders]
    if missing:
        raise NotFound(
            "part of the base image",
            missing[0],
            hint="; this mlfuncs is not a whole install: install its wheel again, or set MLFUNCS_BASE_IMAGE",
        )
    return BaseSource(files, f"python:{sys.version_info.major}.{sys.version_info.minor}-slim")


def _files_in(folder: Path) -> list[str]:
    """Every source file of a package, relative to it."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return [str(p.relative_to(folder)) for p in found if "__pycache__" not in p.parts and not p.is_relative_to(SHIPPED)]


def private_arguments(settings: Settings) -> dict[str, str]:
    """The build arguments that may hold a password: proxies and the index."""
    found = {name: os.environ[name] for name in _PROXIES if os.environ.get(name)}
    index = settings.uv_index_url or os.environ.get("PIP_INDEX_URL") or ""
    return {**found, **({"PIP_INDEX_URL": index} if index else {})}


def own_certificates() -> Path | None:
    """The bundle of certificate authorities that this machine was told to trust, when it was told."""
    for name in _CERTIFICATES:
        path = Path(os.environ.get(name) or "")
        if os.environ.get(name) and path.is_file():
            return path
    return None
