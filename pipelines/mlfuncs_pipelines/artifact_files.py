"""Values of decorated functions as kfp artifacts: one file (or folder) in the value's own format, and metadata.

Metadata holds, under "mlfuncs", what is needed to read the file back; beside it stands what Kubeflow's UI shows by the
artifact's system.* type.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, get_args, get_origin

from mlfuncs.codecs import NotEncodable, codec_named, codecs_for
from mlfuncs.errors import ArtifactError, UntrustedError
from mlfuncs.settings import Settings
from mlfuncs.signing import key_ring, project_key
from mlfuncs_pipelines.placeholders import local_path

OURS = "mlfuncs"  # the metadata key under which the format is described
_PNG_IN_PAGE = re.compile(rb'src="data:image/png;base64,([A-Za-z0-9+/=]+)"')


def write_artifact(value: Any, hint: Any, path: Path, settings: Settings) -> dict[str, Any]:
    """Write `value` to `path` and return the artifact's metadata. Raises ArtifactError when it has no stored form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, Path):
        return _write_path(value, path)
    reasons = []
    for codec in codecs_for(value, hint):
        try:
            described = _encode(codec, value, path, settings)
        except NotEncodable as exc:
            reasons.append(str(exc))
            continue
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        ours = {"kind": codec.kind, "type": name, "metadata": described}
        return {OURS: ours, **_shown(value, codec.kind, described)}
    raise ArtifactError(f"a {type(value).__qualname__} cannot be stored: {'; '.join(reasons)}")


def read_artifact(artifact: Mapping[str, Any], hint: Any, settings: Settings) -> Any:
    """The value of a kfp runtime artifact, ours or another component's, as `hint` wants it.

    Raises ArtifactError for a format that `hint` cannot be read from, UntrustedError for a pickle without our seal.
    """
    path = Path(artifact.get("customPath") or local_path(artifact["uri"]))
    ours = artifact.get("metadata", {}).get(OURS)
    if hint is Path or (ours is None and not _is_wanted(hint)):
        return _named(path, (ours or {}).get("metadata", {}).get("name"))
    if not path.exists():
        raise ArtifactError(f"the artifact {artifact.get('name', '')!r} has no file at {path}; was it deleted?")
    if ours is None:
        return _read_foreign(path, hint, artifact)
    if ours["kind"] in ("file", "directory"):
        return _named(path, ours["metadata"].get("name"))
    return _decode(codec_named(ours["kind"]), path, ours["metadata"], hint, settings)


def _encode(codec: Any, value: Any, path: Path, settings: Settings) -> dict[str, Any]:
    with open(path, "wb") as file:
        sink = _HashingFile(file) if codec.signed else file
        described: dict[str, Any] = codec.encode(value, sink)
        if codec.signed:
            from mlfuncs.codecs.pickled import seal

            file.write(seal(codec.kind, sink.hexdigest(), project_key(settings)))  # type: ignore[union-attr]
    if codec.kind == "figure":
        _wrap_figure(path)
    return described


def _decode(codec: Any, path: Path, metadata: dict[str, Any], hint: Any, settings: Settings) -> Any:
    if codec.signed:
        from mlfuncs.codecs.pickled import unseal

        try:
            payload = unseal(codec.kind, path.read_bytes(), key_ring(settings), f"the artifact {path.name!r}")
        except UntrustedError as exc:
            raise UntrustedError(f"{exc}. On a cluster, give pods the project's key: docs/pipelines.md") from exc
        return codec.decode(payload, metadata, hint)
    if codec.kind == "figure":
        from mlfuncs.results import FigureImage

        found = _PNG_IN_PAGE.search(path.read_bytes())
        if found is None:
            raise ArtifactError(f"the figure at {path} holds no image")
        return FigureImage(base64.b64decode(found[1]))
    return codec.decode(path, metadata, hint)


def _write_path(value: Path, path: Path) -> dict[str, Any]:
    """A file or folder as itself, so that any component can read it; linked where the disk allows it."""
    if value.is_dir():
        shutil.copytree(value, path, dirs_exist_ok=True)
        kind = "directory"
    elif value.is_file():
        _link_or_copy(value, path)
        kind = "file"
    else:
        raise ArtifactError(f"the path {str(value)!r} does not exist, so there is nothing to pass on; write it first")
    return {OURS: {"kind": kind, "type": "pathlib.Path", "metadata": {"name": value.resolve().name}}}


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        # a link would let a later write to the source change the artifact: only a file that nobody else names is moved
        if source.stat().st_nlink == 1 and source.is_relative_to(tempfile.gettempdir()):
            os.link(source, target)
            return
    except OSError:
        pass  # another disk: the bytes are copied
    shutil.copyfile(source, target)


def _wrap_figure(path: Path) -> None:
    """The figure as a page, which is what Kubeflow's UI shows."""
    image = base64.b64encode(path.read_bytes()).decode()
    path.write_text(f'<img style="max-width:100%" src="data:image/png;base64,{image}">', encoding="ascii")


def _shown(value: Any, kind: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """What the UI shows of the artifact's metadata."""
    if kind == "metrics":
        return dict(described["metrics"])
    if kind == "classification_metrics":
        return {key: item for key, item in value.to_dict().items() if key != "auc"}
    if kind == "parquet":
        return {"rows": described["rows"], "columns": described["columns"]}
    if kind == "model":
        return {"framework": ", ".join(f"{k} {v}" for k, v in described.get("libraries", {}).items())}
    return {}


def _is_wanted(hint: Any) -> bool:
    """Whether a hint says more than "whatever it is", so that a foreign file must be read."""
    return hint is not None and hint is not Any and not _is_kfp(hint)


def _is_kfp(hint: Any) -> bool:
    return getattr(hint, "__module__", "").startswith("kfp.")


def _named(path: Path, name: str | None) -> Path:
    """The artifact's path; under its own name when it had one, because programs look at suffixes."""
    name = PurePosixPath(name or "").name
    if not name or name == path.name or not path.exists():
        return path
    link = Path(tempfile.mkdtemp(prefix="mlfuncs-")) / name
    link.symlink_to(path.absolute(), target_is_directory=path.is_dir())
    return link


def _read_foreign(path: Path, hint: Any, artifact: Mapping[str, Any]) -> Any:
    """A file that another component wrote, read as the wanted type: tables from Parquet, CSV or JSON; text; bytes."""
    from mlfuncs.codecs.tables import library_of, read

    name = getattr(hint, "__name__", str(hint))
    library = library_of(hint)
    if library is not None:
        with open(path, "rb") as file:
            head = file.read(4)
        return read(path, {}, library) if head == b"PAR1" else _read_csv(path, library)
    if hint is bytes:
        return path.read_bytes()
    if hint is str:
        return path.read_text(encoding="utf-8")
    if get_origin(hint) in (list, dict) or hint in (list, dict, int, float, bool):
        import json

        return json.loads(path.read_text(encoding="utf-8"))
    title = artifact.get("type", {}).get("schemaTitle", "artifact")
    if hasattr(hint, "fit"):
        raise UntrustedError(
            f"the {title} at {path} was not written by an mlfuncs step, so no signature vouches for it as a {name}; "
            "take it as a pathlib.Path and load it in the step"
        )
    raise ArtifactError(f"the {title} at {path} cannot be read as {name}; take it as a pathlib.Path and read it there")


def _read_csv(path: Path, library: str) -> Any:
    import pyarrow
    import pyarrow.csv

    try:
        table = pyarrow.csv.read_csv(str(path))
    except pyarrow.ArrowInvalid as exc:
        raise ArtifactError(f"the table at {path} is neither Parquet nor CSV: {exc}") from exc
    if library == "pyarrow":
        return table
    if library == "polars":
        import polars

        return polars.from_arrow(table)
    frame = table.to_pandas()
    return frame.iloc[:, 0] if library == "series" else frame


def element_of(hint: Any) -> Any:
    """T of list[T]; None for anything else."""
    return (get_args(hint) or (Any,))[0] if get_origin(hint) is list or hint is list else None


class _HashingFile:
    """A file that knows the digest of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, chunk: Any) -> int:
        self._digest.update(chunk)
        self._file.write(chunk)
        return memoryview(chunk).nbytes

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
