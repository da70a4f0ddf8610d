"""One progress bar for terminals, notebooks and plain output.

    with progress("Ingesting", total=n) as bar:
        bar.advance(k)

A terminal shows rich's bar, a notebook the browser's own, anything else (a log file, CI) a line now and then. All of it
goes to standard error, so that what a command prints stays clean.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from mlfuncs.display import format_duration

REDRAW_S = 0.1
PLAIN_LINE_S = 10.0


@dataclass(frozen=True)
class State:
    """How far a job is: `done` of `total` (None: unknown), since how long, and a note to the right."""

    label: str
    total: float | None
    done: float = 0
    elapsed_s: float = 0.0
    note: str = ""
    finished: bool = False
    failed: bool = False  # the block raised

    @property
    def fraction(self) -> float | None:
        """Between 0 and 1; None while the total is unknown."""
        return None if not self.total else min(1.0, self.done / self.total)

    @property
    def text(self) -> str:
        """The state as one line."""
        took = format_duration(self.elapsed_s) if self.elapsed_s >= REDRAW_S else ""
        end = "failed" if self.failed else ""
        return "  ".join(part for part in (self.label, self.count, took, self.note, end) if part)

    @property
    def count(self) -> str:
        """ "3/10", or "3" while the total is unknown; empty for a job that is not counted."""
        if self.total is None:
            return f"{self.done:g}" if self.done else ""
        return f"{self.done:g}/{self.total:g}"


class View(Protocol):
    """Where a bar is drawn."""

    interval_s: float

    def draw(self, state: State) -> None:
        """Show the state; the last call has `finished` set."""
        ...


def progress(label: str, total: float | None = None, *, enabled: bool = True) -> Progress:
    """A progress bar for a `with` block; `total` None shows that something happens, not how much is left."""
    return Progress(State(label, total), choose_view(sys.stderr) if enabled else SilentView())


class Progress:
    """A bar that any thread may move; drawing is limited to a few times a second."""

    def __init__(self, state: State, view: View, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = state
        self._view, self._clock = view, clock
        self._started = clock()
        self._drawn: float | None = None
        self._lock = threading.Lock()

    def advance(self, amount: float = 1) -> None:
        """Say that `amount` more is done."""
        with self._lock:
            self._change(done=self.state.done + amount)

    def update(self, *, done: float | None = None, total: float | None = None, note: str | None = None) -> None:
        """Set what is given: the amount done, the total, the note (e.g. the best so far)."""
        given = {"done": done, "total": total, "note": note}
        with self._lock:
            self._change(**{key: value for key, value in given.items() if value is not None})

    def __enter__(self) -> Self:
        with self._lock:
            self._draw(force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self.state = replace(self.state, finished=True, failed=kind is not None)
            self._draw(force=True)

    def _change(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        self._draw(force=False)

    def _draw(self, force: bool) -> None:
        now = self._clock()
        if force or self._drawn is None or now - self._drawn >= self._view.interval_s:
            self._drawn = now
            self.state = replace(self.state, elapsed_s=now - self._started)
            self._view.draw(self.state)


class SilentView:
    """Draws nothing."""

    interval_s = 3600.0

    def draw(self, state: State) -> None:
        """Do nothing."""


class PlainView:
    """A line at the start, every ten seconds and at the end, for output that is not a screen."""

    interval_s = PLAIN_LINE_S

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, state: State) -> None:
        """Write the state as a line."""
        end = "  done" if state.finished and not state.failed else ""
        self._stream.write(f"{state.text}{end}\n")
        self._stream.flush()


class TerminalView:
    """rich's progress bar."""

    interval_s = REDRAW_S

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        self._progress = Progress(*columns, console=Console(file=stream, force_jupyter=False), refresh_per_second=4)
        self._task: Any = None

    def draw(self, state: State) -> None:
        """Move the bar; stop it at the end."""
        fields: dict[str, Any] = {"total": state.total, "completed": state.done, "count": state.count}
        fields["note"] = f"{state.note}  failed".strip() if state.failed else state.note
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(state.label, **fields)
        self._progress.update(self._task, **fields)
        if state.finished:
            self._progress.stop()


class NotebookView:
    """The browser's own progress element, updated in place."""

    interval_s = REDRAW_S

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, state: State) -> None:
        """Show the bar, or replace the one shown."""
        from IPython.display import HTML, display

        shown = HTML(render_bar(state))
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


def render_bar(state: State) -> str:
    """The state as an HTML progress element with its text."""
    value = "" if state.fraction is None else f' max="1" value="{state.fraction:.4f}"'
    bar = "" if state.finished and state.fraction is None else f'<progress style="width:20em"{value}></progress> '
    return f"<div>{bar}<code>{html.escape(state.text)}</code></div>"


def choose_view(stream: TextIO) -> View:
    """The view that suits where the output goes."""
    if in_notebook():
        return NotebookView()
    return TerminalView(stream) if stream.isatty() else PlainView(stream)


def in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
