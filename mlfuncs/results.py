"""What a function may return beside data: metrics, and pages for people. Each shows itself in a notebook.

Metrics                 named numbers
ClassificationMetrics   confusion matrix and ROC curve of a classifier
HTML, Markdown          a page
FigureImage             a figure as it was drawn (what a stored matplotlib figure comes back as)
"""

from __future__ import annotations

import base64
import html
import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlfuncs.errors import InvalidInput

_MAX_ROC_POINTS = 200  # kept of a curve: enough for any screen, and small enough for Kubeflow's metadata store
_SIDE = 220  # pixels of the drawn ROC curve's side


class Metrics(dict[str, float]):
    """Named numbers. Raises InvalidInput for a value that is not a number.

    >>> Metrics(accuracy=0.97, errors=3)
    Metrics({'accuracy': 0.97, 'errors': 3})
    """

    def __init__(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        super().__init__({name: _number(name, value) for name, value in {**(values or {}), **named}.items()})

    def __repr__(self) -> str:
        return f"Metrics({super().__repr__()})"

    def __reduce__(self) -> Any:
        return Metrics, (dict(self),)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{value:.6g}</td></tr>" for name, value in self.items())
        return f"<table><tbody>{rows}</tbody></table>"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return _border(cls, handler.generate_schema(dict[str, float]), cls, lambda value: dict(value), core_schema)


class RocPoint(NamedTuple):
    """One point of a ROC curve: predicting positive at `threshold` and above gives these rates, each in [0, 1]."""

    threshold: float
    false_positive_rate: float
    true_positive_rate: float


@dataclass(frozen=True)
class ClassificationMetrics:
    """How a classifier did.

    `confusion_matrix[i][j]` counts the rows of true class `labels[i]` that were predicted as `labels[j]`. `roc` runs
    from (0, 0) to (1, 1); it is empty and `auc` None when there were no scores or only one class.
    """

    labels: tuple[str, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]
    roc: tuple[RocPoint, ...] = ()
    auc: float | None = None

    @classmethod
    def from_predictions(
        cls, y: Any, score: Any, labels: Sequence[Any] | None = None, threshold: float = 0.5
    ) -> ClassificationMetrics:
        """Metrics of true classes `y` (n,) against `score`.

        `score` is the probability of the second label (n,); one column of probabilities per label (n, k); or the
        predicted classes (n,) when it has no floats. `labels` defaults to the sorted classes found. `threshold` splits
        the probabilities of two classes. With three or more the ROC is the micro-average of one class against the rest.

        >>> ClassificationMetrics.from_predictions([0, 1, 1, 0], [0.2, 0.9, 0.4, 0.6]).confusion_matrix
        ((1, 1), (1, 1))

        Raises InvalidInput for lengths that differ, NaN, or a class that is not in `labels`.
        """
        from mlfuncs.roc import measure

        names, matrix, curve, auc = measure(y, score, labels, threshold, _MAX_ROC_POINTS)
        return cls(names, matrix, tuple(RocPoint(*point) for point in curve), auc)

    @property
    def accuracy(self) -> float | None:
        """The share of rows on the diagonal; None when there are no rows."""
        total = sum(map(sum, self.confusion_matrix))
        return sum(row[i] for i, row in enumerate(self.confusion_matrix)) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """The metadata of Kubeflow's system.ClassificationMetrics, with `auc` beside it."""
        points = [
            {
                "confidenceThreshold": p.threshold,
                "recall": p.true_positive_rate,
                "falsePositiveRate": p.false_positive_rate,
            }
            for p in self.roc
        ]
        return {
            "confidenceMetrics": points,
            "confusionMatrix": {
                "annotationSpecs": [{"displayName": label} for label in self.labels],
                "rows": [{"row": list(row)} for row in self.confusion_matrix],
            },
            "auc": self.auc,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassificationMetrics:
        """The metrics that `to_dict` wrote."""
        matrix = values["confusionMatrix"]
        return cls(
            tuple(spec["displayName"] for spec in matrix["annotationSpecs"]),
            tuple(tuple(int(count) for count in row["row"]) for row in matrix["rows"]),
            tuple(
                RocPoint(p["confidenceThreshold"], p["falsePositiveRate"], p["recall"])
                for p in values.get("confidenceMetrics", ())
            ),
            values.get("auc"),
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(label)}</th>" for label in self.labels)
        rows = "".join(
            f"<tr><th>{html.escape(label)}</th>{''.join(f'<td>{count}</td>' for count in row)}</tr>"
            for label, row in zip(self.labels, self.confusion_matrix, strict=True)
        )
        accuracy = "" if self.accuracy is None else f"accuracy {self.accuracy:.4f}"
        caption = f'<caption style="white-space:nowrap">true \\ predicted; {accuracy}</caption>'
        table = f"<table>{caption}<tr><th></th>{head}</tr>{rows}</table>"
        return f'<div style="display:flex;gap:2em;align-items:center">{table}{self._roc_svg()}</div>'

    def _roc_svg(self) -> str:
        if not self.roc:
            return ""
        line = " ".join(
            f"{p.false_positive_rate * _SIDE:.1f},{(1 - p.true_positive_rate) * _SIDE:.1f}" for p in self.roc
        )
        caption = "ROC" if self.auc is None else f"ROC, AUC {self.auc:.4f}"
        return (
            f'<svg width="{_SIDE + 20}" height="{_SIDE + 34}" viewBox="-10 -4 {_SIDE + 20} {_SIDE + 34}" '
            f'role="img" aria-label="{caption}"><rect width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#999"/>'
            f'<line x1="0" y1="{_SIDE}" x2="{_SIDE}" y2="0" stroke="#999" stroke-dasharray="4"/>'
            f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="2"/>'
            f'<text x="{_SIDE // 2}" y="{_SIDE + 20}" text-anchor="middle" font-size="13">{caption}</text></svg>'
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return _border(cls, core_schema.dict_schema(), cls.from_dict, lambda value: value.to_dict(), core_schema)


@dataclass(frozen=True)
class HTML:
    """A page or fragment of HTML. It is shown as it is: escape what comes from strangers."""

    text: str

    def _repr_html_(self) -> str:
        return self.text

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return _border(cls, core_schema.str_schema(), cls, lambda value: value.text, core_schema)


@dataclass(frozen=True)
class Markdown:
    """A page of Markdown (CommonMark). HTML inside it is shown as text."""

    text: str

    def _repr_markdown_(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from markdown_it import MarkdownIt

        return MarkdownIt("commonmark", {"html": False}).enable("table").render(self.text)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return _border(cls, core_schema.str_schema(), cls, lambda value: value.text, core_schema)


@dataclass(frozen=True)
class FigureImage:
    """A figure as it was drawn; `png` is the image file's content."""

    png: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width, height = struct.unpack(">II", self.png[16:24])  # the IHDR chunk comes first (PNG, section 11.2.2)
        return int(width), int(height)

    def save(self, path: str | Path) -> None:
        """Write the PNG file."""
        Path(path).write_bytes(self.png)

    def __repr__(self) -> str:
        return f"<figure {self.size[0]} x {self.size[1]}>"

    def _repr_html_(self) -> str:
        return f'<img src="{data_url(self)}" style="max-width:100%">'


def draw(figure: Any) -> FigureImage:
    """A matplotlib figure as an image, cut to what is drawn."""
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight", metadata={"Software": None})  # the same bytes each time
    return FigureImage(image.getvalue())


def data_url(figure: Any) -> str:
    """A FigureImage or matplotlib figure as "data:image/png;base64,..."."""
    png = figure.png if isinstance(figure, FigureImage) else draw(figure).png
    return "data:image/png;base64," + base64.b64encode(png).decode()


def preview_html(value: Any, max_chars: int = 2000) -> str:
    """HTML that shows `value` in a notebook: its own, else its repr, cut to `max_chars` characters.

    >>> preview_html("a<b")
    '<pre>&#x27;a&lt;b&#x27;</pre>'
    """
    own = getattr(value, "_repr_html_", None)
    shown = own() if callable(own) and not isinstance(value, type) else None
    if shown is not None:
        return str(shown)
    text = repr(value)
    return f"<pre>{html.escape(text if len(text) <= max_chars else text[:max_chars] + '…')}</pre>"


def _border(cls: Any, inner: Any, read: Any, write: Any, core_schema: Any) -> Any:
    """A pydantic schema: `inner` read by `read` from JSON, an instance in Python, written by `write`."""
    from pydantic_core import PydanticCustomError

    def take(value: Any) -> Any:
        try:
            return read(value)
        except (InvalidInput, KeyError, TypeError, ValueError) as exc:
            message = f"should be ml.{cls.__name__}: {exc!r}"
            raise PydanticCustomError("border", "{message}", {"message": message}) from exc

    return core_schema.json_or_python_schema(
        json_schema=core_schema.no_info_after_validator_function(take, inner),
        python_schema=core_schema.is_instance_schema(cls),
        serialization=core_schema.plain_serializer_function_ser_schema(write, return_schema=inner),
    )


def _number(name: str, value: Any) -> float:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a numpy scalar
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(
            f"metric {name!r} should be a number, not {value!r}",
            [{"field": name, "message": f"should be a number, not {value!r}"}],
        )
    return value
