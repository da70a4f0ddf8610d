"""Plots of benchmarks as small SVG files: bars by contender, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "#4c72b0"
OTHERS = "#b8b8b8"
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3")


def bars(path: Path, panels: Mapping[str, Mapping[str, float]], logarithmic: bool = False) -> None:
    """One panel of horizontal bars for each title in `panels`: value by contender, ours coloured."""
    plt = _pyplot()
    tallest = max(map(len, panels.values()))
    size = (3.6 * len(panels), 0.6 + 0.3 * tallest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for panel, (title, values) in zip(axes[0], panels.items(), strict=True):
        names = list(values)[::-1]
        colors = [OURS if name.startswith("mlfuncs") else OTHERS for name in names]
        drawn = panel.barh(names, [values[name] for name in names], color=colors)
        panel.bar_label(drawn, [f" {_short(values[name])}" for name in names], fontsize=8)
        panel.set_title(f"{title} (log)" if logarithmic else title, fontsize=9)
        panel.set_xscale("log" if logarithmic else "linear")
        panel.margins(x=0.22)
        panel.tick_params(left=False, bottom=False, labelbottom=False)
        panel.tick_params(which="minor", bottom=False)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    _save(figure, path)


def curves(path: Path, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines through the (x, y) points of each series, from 0 up."""
    figure, axes = _pyplot().subplots(figsize=(5.5, 2.8), layout="constrained")
    for (name, points), color in zip(series.items(), COLORS, strict=False):
        across, up = zip(*points, strict=True)
        axes.plot(across, up, ".-", label=name, color=color)
    axes.set(xlabel=x, ylabel=y, ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mlfuncs", "font.size": 9})
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _short(value: float) -> str:
    """Three digits.

    >>> _short(0.1234), _short(12.34), _short(12345.6)
    ('0.123', '12.3', '12,346')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
