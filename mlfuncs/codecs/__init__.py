"""Value to artifact by type: which format a value is stored in, safe formats first.

    kind                     values                                              file
    parquet                  pandas DataFrame and Series, polars, pyarrow         Parquet
    npy                      numpy array, numpy scalar                            .npy
    metrics                  ml.Metrics                                           JSON
    classification_metrics   ml.ClassificationMetrics                             JSON
    html, markdown           ml.HTML, plotly and altair figures; ml.Markdown      text
    figure                   matplotlib figure                                    PNG
    file, directory          pathlib.Path                                         the bytes; a tar
    bytes                    bytes                                                the bytes
    json                     what tagged JSON gives back equal (see tagged.py)    JSON
    model                    estimators: objects with fit and get_params          signed pickle
    pickle                   anything else                                        signed pickle

The choice is made once, when a value is written, and recorded as the artifact's kind. Reading takes that one format or
fails: it never tries another.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mlfuncs.codecs.tagged import NotEncodable
from mlfuncs.errors import ArtifactError, NotFound

__all__ = ["Codec", "NotEncodable", "codec_for", "codec_named", "codecs_for", "kinds"]


class Codec(Protocol):
    """One format. A codec also has `decode`, or (for files and directories) `unpack`.

    `encode` writes the value and returns what describes it, JSON-ready; it raises NotEncodable when the value would
    not come back equal. `signed` formats can run code when read: they are sealed after writing and checked first.
    """

    @property
    def kind(self) -> str: ...

    @property
    def signed(self) -> bool: ...

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]: ...


def codec_for(value: Any, hint: Any = None) -> Codec:
    """The first choice of format for `value`. Text hinted as ml.HTML or ml.Markdown is a page.

    >>> codec_for({"a": (1, 2)}).kind
    'json'
    """
    return next(iter(codecs_for(value, hint)))


def codecs_for(value: Any, hint: Any = None) -> Iterable[Codec]:
    """The formats to try in order when writing `value`; the next is for when one raises NotEncodable."""
    first = _kind_of(value, hint)
    yield codec_named(first)
    if first in ("parquet", "npy", "json"):
        yield codec_named("pickle")


@lru_cache(maxsize=1)
def _codecs() -> dict[str, Any]:
    from mlfuncs.codecs import arrays, files, pickled, reports, tables
    from mlfuncs.results import HTML, Markdown

    codecs: list[Any] = [
        tables.ParquetCodec(),
        arrays.NpyCodec(),
        reports.MetricsCodec(),
        reports.ClassificationMetricsCodec(),
        reports.PageCodec("html", HTML),
        reports.PageCodec("markdown", Markdown),
        reports.FigureCodec(),
        files.FileCodec(),
        files.DirectoryCodec(),
        reports.BytesCodec(),
        reports.JsonCodec(),
        pickled.PickleCodec("model"),
        pickled.PickleCodec("pickle"),
    ]
    return {codec.kind: codec for codec in codecs}


def codec_named(kind: str) -> Any:
    """The codec of a kind. Raises NotFound for a kind that values are not stored in."""
    if kind not in _codecs():
        raise NotFound("artifact kind", kind, _codecs())
    return _codecs()[kind]


def kinds() -> list[str]:
    """All kinds, in the order in which they are tried."""
    return list(_codecs())


def _kind_of(value: Any, hint: Any) -> str:
    from mlfuncs import results
    from mlfuncs.codecs import tables

    cls = type(value)
    if tables.is_table(value):
        return "parquet"
    numpy = sys.modules.get("numpy")
    if numpy is not None and (cls is numpy.ndarray or isinstance(value, numpy.generic)):
        return "npy"
    by_class = {
        results.Metrics: "metrics",
        results.ClassificationMetrics: "classification_metrics",
        results.HTML: "html",
        results.Markdown: "markdown",
        results.FigureImage: "figure",
        bytes: "bytes",
    }
    if cls in by_class:
        return by_class[cls]
    if cls is str and hint in (results.HTML, results.Markdown):
        return by_class[hint]
    if isinstance(value, Path):
        return _kind_of_path(value)
    figure = sys.modules.get("matplotlib.figure")
    if figure is not None and isinstance(value, figure.Figure):
        return "figure"
    if cls.__module__.split(".")[0] in ("plotly", "altair") and hasattr(value, "to_html"):
        return "html"
    from mlfuncs.codecs.pickled import is_estimator

    return "model" if is_estimator(value) else "json"


def _kind_of_path(path: Path) -> str:
    if path.is_file():
        return "file"
    if path.is_dir():
        return "directory"
    raise ArtifactError(f"the path {str(path)!r} does not exist, so there is nothing to store; write the file first")
