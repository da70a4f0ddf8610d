"""Features as a table for people: what there is, of which type and owner, how its values lie.

Owns: the table of `FeatureStore.search`, with a sparkline of each feature's histogram.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlfuncs.display import Markup, Table
from mlfuncs.errors import NotFound

if TYPE_CHECKING:
    from mlfuncs_featurestore.store import FeatureStore

_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = ("feature", "type", "values", "nulls", "distinct", "median", "owner", "tags", "description")


def feature_table(store: FeatureStore, text: str = "", *, tag: str = "", owner: str = "") -> Table:
    """The features that `Catalog.search` finds, with the statistics of their last ingest."""
    found = store.catalog.search(text, tag=tag, owner=owner)
    statistics = {name: _statistics(store, name) for name in {_view(row) for row in found}}
    rows = [_describe(row, statistics[_view(row)]) for row in found]
    return Table(_COLUMNS, tuple(rows), caption=f"{len(rows)} features")


def sparkline(counts: Sequence[int]) -> Markup:
    """A histogram as a small picture, and as block characters where there are no pictures.

    >>> sparkline([0, 1, 4]).text
    '▁▃█'
    """
    top = max(counts, default=0) or 1
    text = "".join(_BARS[min(7, -(-count * 7 // top))] for count in counts)
    width = 60 / max(len(counts), 1)
    bars = "".join(
        f'<rect x="{index * width:.1f}" y="{16 * (1 - count / top):.1f}" width="{width * 0.9:.1f}" '
        f'height="{16 * count / top:.1f}"/>'
        for index, count in enumerate(counts)
    )
    return Markup(f'<svg width="60" height="16" fill="#0969da" role="img" aria-label="histogram">{bars}</svg>', text)


def _view(row: Mapping[str, Any]) -> str:
    return row["feature"].partition(":")[0]


def _statistics(store: FeatureStore, view: str) -> dict[str, Any]:
    try:
        return store.offline.statistics(view)
    except NotFound:
        return {}


def _describe(row: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    about = statistics.get(row["feature"].partition(":")[2], {})
    tags = ", ".join(f"{key}={value}" if value else key for key, value in row["tags"].items())
    described: dict[str, Any] = {
        "feature": row["feature"] + (" (deprecated)" if row["deprecated"] else ""),
        "type": row["type"],
        "owner": row["owner"],
        "tags": tags,
        "description": row["description"],
    }
    if about:
        described["nulls"] = f"{100 * about['nulls'] / max(about['count'], 1):.3g} %"
        described["distinct"] = about.get("distinct")
        described["median"] = about.get("quantiles", {}).get("0.5")
        if "histogram" in about:
            described["values"] = sparkline(about["histogram"]["counts"])
    return described
