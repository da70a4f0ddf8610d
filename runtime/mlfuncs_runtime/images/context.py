"""An image as a build context: its layers and a Dockerfile that adds them, for builders inside a cluster."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import Any

from mlfuncs.errors import StorageError
from mlfuncs_runtime.images.image import Image
from mlfuncs_runtime.images.layers import EPOCH_S


def dockerfile(image: Image) -> str:
    """The Dockerfile of the image: the same layers in the same order, unpacked by ADD."""
    lines = [f"FROM {image.base.name}"]
    lines += [f"# {layer.note}\nADD {layer.digest}.tar /" for layer in image.layers]
    lines += [f"ENV {name}={json.dumps(value)}" for name, value in sorted(image.environ.items())]
    lines += [f"LABEL {name}={json.dumps(value)}" for name, value in sorted(image.labels.items())]
    return "\n".join(lines) + "\n"


def write_context(image: Image, url: str) -> int:
    """Write the context, a .tar.gz, to a path or any URL that fsspec reaches; its bytes. Raises StorageError."""
    import fsspec

    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=EPOCH_S) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        _add(archive, "Dockerfile", dockerfile(image).encode())
        for layer in image.layers:
            _add(archive, f"{layer.digest}.tar", layer.path.read_bytes())
    try:
        with fsspec.open(url, "wb") as target:
            target.write(packed.getvalue())
    except (OSError, ValueError, ImportError) as exc:  # the last two: a scheme that is unknown, or needs a package
        raise StorageError(f"the build context cannot be written to {url!r}: {exc}") from exc
    return len(packed.getvalue())


def _add(archive: Any, name: str, content: bytes) -> None:
    made = tarfile.TarInfo(name)
    made.size, made.mtime, made.mode = len(content), EPOCH_S, 0o644
    archive.addfile(made, io.BytesIO(content))
