"""What a person sees of a pipeline run while it goes on: lines, a tree in a terminal, a graph in a notebook."""

from __future__ import annotations

import sys
import time
from typing import IO, TYPE_CHECKING, Any

from mlfuncs_pipelines.engine import Observer
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord

if TYPE_CHECKING:
    from mlfuncs_pipelines.ir import Pipeline as IrPipeline

_REDRAW_S = 0.25
_SIGNS = {"succeeded": "✓", "failed": "✗", "running": "…", "cancelled": "✗"}
_STYLES = {"succeeded": "green", "failed": "red", "running": "blue", "cancelled": "yellow", "skipped": "dim"}


class LineObserver(Observer):
    """One line per event, and every line that a step prints with the step's id before it."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout
        self._partial: dict[str, str] = {}

    def run_started(self, run: PipelineRun) -> None:
        self._print(f"run {run.id}")

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if record.is_group and record.status in ("running", "succeeded"):
            return
        self._flush(record)
        parts = [f"{record.id}: {record.status}"]
        if record.status == "running" and record.attempt:
            parts.append(f"attempt {record.attempt + 1}")
        if record.cached or record.resumed:
            parts.append("cached" if record.cached else "done before")
        elif record.status in ("succeeded", "failed") and not record.is_group:
            parts.append(f"{record.duration_s:.2f} s, {record.max_rss_mib:.0f} MiB")
        if record.reason:
            parts.append(record.reason)
        self._print(", ".join(parts))

    attempt_failed = step_changed

    def step_logged(self, record: StepRecord, text: str) -> None:
        *lines, rest = (self._partial.pop(record.id, "") + text).split("\n")
        for line in lines:
            self._print(f"[{record.id}] {line}")
        if rest:
            self._partial[record.id] = rest

    def run_ended(self, run: PipelineRun) -> None:
        ending = f": {run.error}" if run.error else ""
        self._print(f"run {run.id}: {run.status} in {run.duration_s:.2f} s{ending}")
        if run.status != "succeeded":
            self._print(f"resume it with: mlfuncs pipeline resume {run.id}")

    def _flush(self, record: StepRecord) -> None:
        rest = self._partial.pop(record.id, "")
        if rest:
            self._print(f"[{record.id}] {rest}")

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class LatestRun(Observer):
    """Keeps the run, also for when it is interrupted and so is not returned."""

    run: PipelineRun | None = None

    def run_started(self, run: PipelineRun) -> None:
        self.run = run


class TreeObserver(Observer):
    """A live tree in a terminal: what runs with its seconds, what is done, what failed; prints go above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._run: PipelineRun | None = None
        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=8, get_renderable=self._render)

    def run_started(self, run: PipelineRun) -> None:
        self._run = run
        self._live.start()

    def step_logged(self, record: StepRecord, text: str) -> None:
        for line in text.rstrip("\n").split("\n"):
            self._console.print(f"[{record.id}] {line}", markup=False, highlight=False)

    def run_ended(self, run: PipelineRun) -> None:
        self._live.refresh()
        self._live.stop()

    def _render(self) -> Any:
        from rich.text import Text
        from rich.tree import Tree

        run = self._run
        if run is None:
            return Text("")
        steps = [step for step in list(run.steps.values()) if not step.is_group]
        done = sum(step.status != "running" for step in steps)
        tree = Tree(Text(f"{run.pipeline} {run.status}: {done} of {len(steps)} started steps are over"))
        for step in steps[-30:]:
            seconds = time.time() - step.started if step.status == "running" else step.duration_s
            note = "cached" if step.cached else step.reason[:100]
            label = f"{_SIGNS.get(step.status, '-')} {step.id} {step.status} {seconds:.1f} s {note}"
            tree.add(Text(label, style=_STYLES.get(step.status, "")))
        return tree


class NotebookObserver(Observer):
    """The run's graph in a notebook, drawn again as steps start and end (at most four times a second)."""

    def __init__(self, pipeline: IrPipeline) -> None:
        self._pipeline = pipeline
        self._handle: Any = None
        self._drawn = 0.0

    def run_started(self, run: PipelineRun) -> None:
        from IPython.display import display

        self._handle = display(self._page(run), display_id=True)

    def step_changed(self, run: PipelineRun, record: StepRecord) -> None:
        if time.monotonic() - self._drawn > _REDRAW_S:
            self._drawn = time.monotonic()
            self._handle.update(self._page(run))

    def run_ended(self, run: PipelineRun) -> None:
        self._handle.update(self._page(run))

    def _page(self, run: PipelineRun) -> Any:
        from IPython.display import HTML

        from mlfuncs_pipelines.drawing import run_html

        return HTML(run_html(self._pipeline, run))


def observers_here(pipeline: IrPipeline) -> list[Observer]:
    """What shows a run that Python code started: a live graph in a notebook, a live tree in a terminal, else lines."""
    from mlfuncs.progress import in_notebook

    if in_notebook():
        return [NotebookObserver(pipeline)]
    return [TreeObserver() if sys.stdout.isatty() else LineObserver(sys.stdout)]
