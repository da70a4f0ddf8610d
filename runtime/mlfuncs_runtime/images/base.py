"""What the base image is built from: the repository's Dockerfile, and exactly the files that it copies."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import mlfuncs
from mlfuncs.environments.own import package_folders
from mlfuncs.errors import NotFound
from mlfuncs.settings import Settings
from mlfuncs_runtime.images.layers import Entry

FILES = ("Dockerfile", "pyproject.toml", "LICENSE")
FOLDERS = ("mlfuncs", "runtime", "pipelines", "featurestore")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_CERTIFICATES_FILE = "certificates.pem"  # in the context; the Dockerfile's first stage alone has it


@dataclass(frozen=True)
class BaseSource:
    """A source tree with the Dockerfile; `python_image` is what it builds from."""

    root: Path
    python_image: str

    def tag(self, python_id: str) -> str:
        """The base's name: the release, and a digest of everything that it is made of."""
        whole = hashlib.sha256(python_id.encode())
        for entry in sorted(self._sources(), key=lambda entry: entry.name):
            assert isinstance(entry.source, Path)
            whole.update(f"{entry.name}\0".encode())
            whole.update(hashlib.sha256(entry.source.read_bytes()).digest())
        return f"mlfuncs/base:{mlfuncs.__version__}-{whole.hexdigest()[:12]}"

    def context(self) -> list[Entry]:
        """The files that are sent to a builder."""
        certificates = own_certificates()
        extra = [Entry(_CERTIFICATES_FILE, certificates)] if certificates else []
        return self._sources() + extra

    def arguments(self, settings: Settings) -> dict[str, str]:
        """The build arguments. Those that carry a proxy or an index reach no layer of the final stage."""
        found = {"PYTHON_IMAGE": self.python_image, "VERSION": mlfuncs.__version__}
        found |= {name: os.environ[name] for name in _PROXIES if os.environ.get(name)}
        index = settings.uv_index_url or os.environ.get("PIP_INDEX_URL") or ""
        if index:
            found["PIP_INDEX_URL"] = index
        if own_certificates():
            found["PIP_CERT"] = f"/src/{_CERTIFICATES_FILE}"
        return found

    def _sources(self) -> list[Entry]:
        found = [Entry(name, self.root / name) for name in FILES]
        for folder in FOLDERS:
            for path in (self.root / folder).rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                    found.append(Entry(path.relative_to(self.root).as_posix(), path))
        return found


def find_source() -> BaseSource:
    """The source tree that this mlfuncs runs from. Raises NotFound for an installed wheel, which has no Dockerfile."""
    root = package_folders()["mlfuncs"].parent
    if not (root / "Dockerfile").is_file():
        raise NotFound(
            "base image",
            f"mlfuncs/base:{mlfuncs.__version__}",
            hint="; build it from a checkout of the repository ('docker build -t NAME .') and set MLFUNCS_BASE_IMAGE",
        )
    return BaseSource(root, f"python:{sys.version_info.major}.{sys.version_info.minor}-slim")


def own_certificates() -> Path | None:
    """The bundle of certificate authorities that this machine was told to trust, when it was told."""
    for name in _CERTIFICATES:
        path = Path(os.environ.get(name) or "")
        if os.environ.get(name) and path.is_file():
            return path
    return None
