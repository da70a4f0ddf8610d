"""Pages, figures, metrics, plain bytes and JSON: formats that are small and read in one piece."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any, BinaryIO

from mlfuncs.codecs import tagged, untagged
from mlfuncs.errors import ArtifactError
from mlfuncs.results import HTML, ClassificationMetrics, FigureImage, Markdown, Metrics, draw

_PREVIEW_CHARS = 200


class JsonCodec:
    """Any value that tagged JSON gives back equal."""

    kind = "json"
    signed = False

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        text = tagged.dumps(value)
        sink.write(text)
        preview = reprlib.repr(value)  # looks at the first items only
        metadata: dict[str, Any] = {"preview": preview[:_PREVIEW_CHARS] + "…" * (len(preview) > _PREVIEW_CHARS)}
        classes = tagged.classes_named(text)
        return {**metadata, "classes": sorted(classes)} if classes else metadata

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> Any:
        return untagged.loads(source.read_bytes(), hint)


class BytesCodec:
    """Bytes as they are."""

    kind = "bytes"
    signed = False

    def encode(self, value: bytes, sink: BinaryIO) -> dict[str, Any]:
        sink.write(value)
        return {}

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> bytes:
        return source.read_bytes()


class PageCodec:
    """HTML or Markdown, as UTF-8 text."""

    signed = False

    def __init__(self, kind: str, page: type[HTML] | type[Markdown]) -> None:
        self.kind, self._page = kind, page

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        if isinstance(value, HTML | Markdown):
            value = value.text
        text = value if isinstance(value, str) else value.to_html()  # plotly and altair figures
        sink.write(text.encode())
        return {"title": text.strip()[:80]}

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> Any:
        return self._page(source.read_bytes().decode())  # not read_text, which changes line ends


class FigureCodec:
    """A matplotlib figure, drawn as PNG; it comes back as a FigureImage."""

    kind = "figure"
    signed = False

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        image = value if isinstance(value, FigureImage) else draw(value)
        sink.write(image.png)
        return {"width": image.size[0], "height": image.size[1], "media_type": "image/png"}

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> FigureImage:
        return FigureImage(source.read_bytes())


class MetricsCodec:
    """ml.Metrics, as JSON; the metadata holds the numbers themselves."""

    kind = "metrics"
    signed = False

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        sink.write(tagged.dumps(dict(value)))
        return {"metrics": {name: number for name, number in value.items() if abs(number) < float("inf")}}

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> Metrics:
        return Metrics(untagged.loads(source.read_bytes()))


class ClassificationMetricsCodec:
    """ml.ClassificationMetrics, as the JSON that Kubeflow shows."""

    kind = "classification_metrics"
    signed = False

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        sink.write(json.dumps(value.to_dict(), allow_nan=False).encode())
        return {"labels": list(value.labels), "accuracy": value.accuracy, "auc": value.auc}

    def decode(self, source: Path, metadata: dict[str, Any], hint: Any) -> ClassificationMetrics:
        try:
            return ClassificationMetrics.from_dict(json.loads(source.read_bytes()))
        except (ValueError, KeyError, TypeError) as exc:
            raise ArtifactError(f"these are not classification metrics: {exc}") from exc
