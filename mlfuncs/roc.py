"""Confusion matrix and ROC curve with numpy alone.

The ROC is built as in T. Fawcett, "An introduction to ROC analysis" (Pattern Recognition Letters 27, 2006),
algorithm 1, over distinct thresholds; the area is by trapezoids, before points are thinned out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlfuncs.errors import InvalidInput

Measured = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], list[tuple[float, float, float]], float | None]


def measure(y: Any, score: Any, labels: Sequence[Any] | None, threshold: float, max_points: int) -> Measured:
    """Label names, confusion matrix (k, k), ROC points (threshold, fpr, tpr) and area; see ClassificationMetrics."""
    truth, scores = np.asarray(y), np.asarray(score)
    _check(truth, scores)
    predicted_labels = scores.dtype.kind != "f"
    classes = _classes(truth, scores if predicted_labels else None, labels)
    true_index = _index(truth, classes, "y")
    if predicted_labels:
        return _result(classes, true_index, _index(scores, classes, "score"), [], None)
    if scores.ndim == 2 and scores.shape[1] == 2 == len(classes):
        scores = scores[:, 1]
    _check_width(scores, classes)
    if scores.ndim == 1:
        chosen = (scores >= threshold).astype(np.int64)
        points, area = roc(true_index == 1, scores, max_points)
    else:
        chosen = scores.argmax(axis=1)
        one_hot = true_index[:, None] == np.arange(len(classes))
        points, area = roc(one_hot.ravel(), scores.ravel(), max_points)
    return _result(classes, true_index, chosen, points, area)


def roc(positive: Any, score: Any, max_points: int) -> tuple[list[tuple[float, float, float]], float | None]:
    """ROC points (threshold, fpr, tpr) from (0, 0) to (1, 1), at most `max_points`, and the area under the whole curve.

    `positive` (n,) is boolean. Without both classes there is no curve: an empty list and None.
    """
    positives = int(np.count_nonzero(positive))
    negatives = positive.size - positives
    if not positives or not negatives:
        return [], None
    order = np.argsort(score, kind="stable")[::-1]
    score, hits = score[order], np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(score)), score.size - 1)  # the last row of each distinct score
    true_positives, false_positives = np.append(0, hits[last]), np.append(0, last + 1 - hits[last])
    tpr, fpr = true_positives / positives, false_positives / negatives
    area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    above_all = np.nextafter(score[0], np.asarray(np.inf, score.dtype))  # no row is predicted positive; finite
    thresholds = np.append(above_all, score[last])
    keep = _thin(false_positives, true_positives, max_points)
    return [
        (float(t), float(f), float(r)) for t, f, r in zip(thresholds[keep], fpr[keep], tpr[keep], strict=True)
    ], area


def _thin(false_positives: Any, true_positives: Any, max_points: int) -> Any:
    """Indices of the points where the step changes, and of those at most `max_points`, even along the curve."""
    changes = np.logical_or(np.diff(false_positives, 2), np.diff(true_positives, 2))
    bends = np.flatnonzero(np.append(True, np.append(changes, True)))
    if bends.size <= max_points:
        return bends
    length = false_positives[bends] / false_positives[-1] + true_positives[bends] / true_positives[-1]  # 0 to 2
    picked = np.searchsorted(length, np.linspace(0, length[-1], max_points))
    return bends[np.unique(np.append(0, np.append(picked[1:-1], bends.size - 1)))]


def _result(classes: list[Any], truth: Any, chosen: Any, points: list[Any], area: float | None) -> Measured:
    k = len(classes)
    matrix = np.bincount(truth * k + chosen, minlength=k * k).reshape(k, k)
    return tuple(str(c) for c in classes), tuple(tuple(int(n) for n in row) for row in matrix), points, area


def _check(truth: Any, scores: Any) -> None:
    if truth.ndim != 1 or truth.size == 0:
        raise InvalidInput(f"y should hold one class per row, not an array of shape {truth.shape}")
    if scores.ndim not in (1, 2) or len(scores) != len(truth):
        raise InvalidInput(f"score has shape {scores.shape} for {len(truth)} rows of y; give one row of scores each")
    for name, values in (("y", truth), ("score", scores)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InvalidInput(f"{name} has a value that is NaN or infinite at row {_first_bad(values)}")


def _first_bad(values: Any) -> int:
    return int(np.argwhere(~np.isfinite(values))[0][0])


def _check_width(scores: Any, classes: list[Any]) -> None:
    if scores.ndim == 1 and len(classes) != 2:
        raise InvalidInput(
            f"one score per row needs two classes, and {len(classes)} are known ({classes}); "
            "give labels=[negative, positive], or one column of scores per class"
        )
    if scores.ndim == 2 and scores.shape[1] != len(classes):
        raise InvalidInput(f"score has {scores.shape[1]} columns for {len(classes)} classes ({classes}); give labels=")


def _classes(truth: Any, predicted: Any, labels: Sequence[Any] | None) -> list[Any]:
    if labels is not None:
        found = np.asarray(labels).tolist()
        if len(set(found)) != len(found):
            raise InvalidInput(f"labels {found} name a class twice")
        return list(found)
    seen = np.unique(truth) if predicted is None else np.union1d(truth, predicted)
    return list(seen.tolist())


def _index(values: Any, classes: list[Any], name: str) -> Any:
    """The position in `classes` of each value."""
    if values.ndim != 1:
        raise InvalidInput(f"{name} should hold one class per row, not an array of shape {values.shape}")
    unique, inverse = np.unique(values, return_inverse=True)
    position = {label: i for i, label in enumerate(classes)}
    unknown = [value for value in unique.tolist() if value not in position]
    if unknown:
        raise InvalidInput(f"{name} has the class {unknown[0]!r}, which is not among the labels {classes}")
    return np.array([position[value] for value in unique.tolist()], dtype=np.int64)[inverse]
