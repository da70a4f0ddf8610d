"""An image as a build context: its layers and a Dockerfile that adds them, for builders inside a cluster."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import tempfile

from mlfuncs.errors import StorageError
from mlfuncs_runtime.images.image import Image
from mlfuncs_runtime.images.layers import EPOCH_S


def dockerfile(image: Image) -> str:
    """The Dockerfile of the image: the same layers in the same order, unpacked by ADD."""
    lines = [f"FROM {image.base.name}"]
    lines += [f"# {layer.note}\nADD {layer.digest}.tar /" for layer in image.layers]
    lines += [f"ENV {name}={_quoted(value)}" for name, value in sorted(image.environ.items())]
    lines += [f"LABEL {name}={_quoted(value)}" for name, value in sorted(image.labels.items())]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    """`value` as a Dockerfile reads it back: its variables, which are expanded inside of quotes too, are none."""
    return json.dumps(value, ensure_ascii=False).replace("$", "\\$")


def write_context(image: Image, url: str) -> int:
    """Write the context, a .tar.gz, to a path or any URL that fsspec reaches; its bytes. Raises StorageError."""
    import fsspec

    with tempfile.TemporaryFile() as packed:  # layers are gigabytes at times
        with (
            gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=EPOCH_S) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            text = dockerfile(image).encode()
            archive.addfile(_member("Dockerfile", len(text)), io.BytesIO(text))
            for layer in image.layers:
                with layer.path.open("rb") as content:
                    archive.addfile(_member(f"{layer.digest}.tar", layer.size_bytes), content)
        size = packed.tell()
        packed.seek(0)
        try:
            with fsspec.open(url, "wb") as target:
                shutil.copyfileobj(packed, target, 1 << 20)
        except (OSError, ValueError, ImportError) as exc:  # the last two: a scheme that is unknown, or needs a package
            raise StorageError(f"the build context cannot be written to {url!r}: {exc}") from exc
    return size


def _member(name: str, size: int) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.mtime, made.mode = size, EPOCH_S, 0o644
    return made
