"""numpy arrays as .npy files, never pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from mlfuncs.codecs.tagged import NotEncodable
from mlfuncs.errors import ArtifactError


def write(value: Any, sink: BinaryIO) -> dict[str, Any]:
    """Write an array or numpy scalar; its shape and dtype come back. Raises NotEncodable for arrays of objects."""
    import numpy

    scalar = isinstance(value, numpy.generic)
    array = numpy.asarray(value)
    if array.dtype.hasobject or (array.dtype.kind == "V" and array.dtype.names is None):
        raise NotEncodable(f"an array of {array.dtype}")
    numpy.lib.format.write_array(sink, array, allow_pickle=False)
    return {"shape": list(array.shape), "dtype": str(array.dtype), "scalar": scalar}


def read(source: BinaryIO | Path) -> Any:
    """The array in an .npy file. Raises ArtifactError when it is not one, or holds Python objects."""
    import numpy

    try:
        return numpy.load(source, allow_pickle=False)
    except (ValueError, EOFError, OSError) as exc:
        raise ArtifactError(f"the array cannot be read: {exc}") from exc


class NpyCodec:
    """numpy.ndarray and numpy scalars."""

    kind = "npy"
    signed = False

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        return write(value, sink)

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> Any:
        array = read(source)
        return array[()] if metadata.get("scalar") else array
