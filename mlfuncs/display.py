"""One look for tables and cards, in notebooks (HTML) and terminals (rich)."""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas
    import rich.table

_STATES = {
    "succeeded": "#1a7f37", "ready": "#1a7f37", "running": "#0969da", "pending": "#9a6700", "starting": "#9a6700",
    "failed": "#cf222e", "cancelled": "#6e7781", "stopped": "#6e7781", "degraded": "#9a6700",
}  # fmt: skip
_RICH = {"#1a7f37": "green", "#0969da": "blue", "#9a6700": "yellow", "#cf222e": "red", "#6e7781": "dim"}
_CELL = "padding:2px 10px;text-align:{align};vertical-align:top;white-space:nowrap;max-width:40em;overflow:hidden;"


@dataclass(frozen=True)
class Markup:
    """HTML that is known to be safe, with the plain text that a terminal shows instead."""

    html: str
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of named values that show themselves in a notebook and in a terminal.

    `columns` are the keys shown, in order; `best` holds the (row number, column) cells to stand out.
    """

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    caption: str = ""
    best: frozenset[tuple[int, str]] = field(default_factory=frozenset)

    def _repr_html_(self) -> str:
        return table_html(self.rows, self.columns, caption=self.caption, best=self.best)

    def __rich__(self) -> rich.table.Table:
        return rich_table(self.rows, self.columns, caption=self.caption, best=self.best)

    def __str__(self) -> str:
        return render_text(self)

    __repr__ = __str__

    def __len__(self) -> int:
        return len(self.rows)

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a DataFrame, one row each, values as they are (missing ones None or NaN)."""
        import pandas

        return pandas.DataFrame([[row.get(c) for c in self.columns] for row in self.rows], columns=list(self.columns))


def table_html(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    caption: str = "",
    best: Iterable[tuple[int, str]] = (),
) -> str:
    """An HTML table; every value is escaped unless it is `Markup`. Numbers and their heads stand right, `best` is bold.

    >>> "&lt;b&gt;" in table_html([{"name": "<b>"}], ["name"])
    True
    """
    best, rows = set(best), list(rows)
    head = "".join(
        f'<th style="{_CELL.format(align=_alignment(row.get(column) for row in rows))}">{html.escape(str(column))}</th>'
        for column in columns
    )
    body = "".join(
        "<tr>" + "".join(_cell(row.get(column), (number, column) in best) for column in columns) + "</tr>"
        for number, row in enumerate(rows)
    )
    title = f'<caption style="text-align:left;font-weight:600">{html.escape(caption)}</caption>' if caption else ""
    return f'<table style="border-collapse:collapse">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def card_html(title: str, state: str, facts: Mapping[str, Any], body: str = "") -> str:
    """A titled box with a state, when it has one, and facts, one a line; facts that are None are left out.

    `body` is HTML below them.
    """
    lines = "".join(
        f'<tr><td style="color:#6e7781;padding:1px 12px 1px 0;text-align:left">{html.escape(name)}</td>'
        f'<td style="text-align:left">{_as_html(value)}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    return (
        '<div style="border:1px solid #d0d7de;border-radius:6px;padding:8px 12px;margin:4px 0;display:inline-block">'
        f"<div><b>{html.escape(title)}</b>{f' &nbsp;{state_markup(state).html}' if state else ''}</div>"
        f'<table style="border-collapse:collapse;margin:4px 0">{lines}</table>{body}</div>'
    )


def fold_html(title: str, text: str) -> str:
    """A folded block of preformatted text, for logs and tracebacks; empty when there is no text."""
    if not text:
        return ""
    shown = f'<pre style="max-height:24em;overflow:auto;margin:4px 0">{html.escape(text)}</pre>'
    return f"<details><summary>{html.escape(title)}</summary>{shown}</details>"


def state_markup(state: str) -> Markup:
    """A state in its colour."""
    colour = _STATES.get(state, "#57606a")
    return Markup(f'<span style="color:{colour}">&#9679; {html.escape(state)}</span>', state)


def rich_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    caption: str = "",
    best: Iterable[tuple[int, str]] = (),
) -> rich.table.Table:
    """The same table for a terminal."""
    import rich.box
    import rich.table
    import rich.text

    rows, best = list(rows), set(best)
    table = rich.table.Table(title=caption or None, box=rich.box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(str(column), justify=_alignment(row.get(column) for row in rows))
    for number, row in enumerate(rows):
        cells = []
        for column in columns:
            text = format_value(row.get(column))
            style = "bold green" if (number, column) in best else _RICH.get(_STATES.get(text, ""), "")
            cells.append(rich.text.Text(text, style=style))
        table.add_row(*cells)
    return table


def render_text(renderable: Any, width: int | None = None) -> str:
    """What rich would print to a terminal `width` columns wide (default: this one, else 120), without colours."""
    import io
    import shutil

    import rich.console

    width = width or shutil.get_terminal_size((120, 24)).columns
    console = rich.console.Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False)
    console.print(renderable)
    return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def format_value(value: Any) -> str:
    """A value as short text: floats to 6 digits, None empty, long text cut.

    >>> format_value(0.123456789), format_value(None), format_value(3)
    ('0.123457', '', '3')
    """
    if value is None:
        return ""
    if isinstance(value, Markup):
        return value.text
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def format_duration(seconds: float | None) -> str | None:
    """Seconds as people say them; None stays None.

    >>> format_duration(0.0042), format_duration(75), format_duration(7300)
    ('4.2 ms', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None:
        return None
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_time(seconds: float | None) -> str | None:
    """A UNIX time as local date and time; None stays None."""
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def format_bytes(size: float | None) -> str | None:
    """A number of bytes in binary units; None stays None.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    if size is None:
        return None
    power = 0 if size < 1024 else min(4, int(math.log(size, 1024)))
    amount = size / 1024**power
    digits = 0 if power == 0 or amount >= 100 else 1
    return f"{amount:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _cell(value: Any, best: bool) -> str:
    style = _CELL.format(align="right" if _is_number(value) else "left")
    if best:
        style += "font-weight:700;color:#1a7f37;"
    return f'<td style="{style}">{_as_html(value)}</td>'


def _as_html(value: Any) -> str:
    if isinstance(value, Markup):
        return value.html
    if isinstance(value, str) and value in _STATES:
        return state_markup(value).html
    return html.escape(format_value(value))


def _alignment(values: Iterable[Any]) -> Literal["left", "right"]:
    return "right" if any(map(_is_number, values)) else "left"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
