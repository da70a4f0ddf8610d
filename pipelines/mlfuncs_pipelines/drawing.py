"""A run as pictures: its graph with status colours and durations, a Gantt chart of its steps, and a diff of two runs.

SVG and HTML as text; nothing here needs a browser, a notebook or a library.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlfuncs_pipelines.ir import Component, Pipeline, Task
from mlfuncs_pipelines.run_log import PipelineRun, StepRecord, plain

COLOURS = {
    "succeeded": "#2e7d32",
    "cached": "#00838f",
    "running": "#1565c0",
    "failed": "#c62828",
    "skipped": "#9e9e9e",
    "upstream_failed": "#b39ddb",
    "cancelled": "#ef6c00",
    "pending": "#cfd8dc",
}
_BOX, _ROW, _COLUMN = (190, 44), 64, 230  # size of a box, distance of rows and columns, in pixels
_BAR = 18


@dataclass(frozen=True)
class Node:
    """One box of the graph: a step, or a group drawn as one box in the row of its dependencies' successors."""

    id: str
    label: str
    depth: int
    row: int
    is_group: bool


def layout(pipeline: Pipeline, run: PipelineRun | None = None) -> tuple[list[Node], list[tuple[str, str]]]:
    """Boxes in columns by dependency depth, and the edges between them; what ran of a group stands inside it."""
    nodes: list[Node] = []
    edges: list[tuple[str, str]] = []
    _place(pipeline, pipeline.root, "", 0, run, (nodes, edges))
    return nodes, edges


def _place(
    pipeline: Pipeline,
    component: Component,
    prefix: str,
    first: int,
    run: PipelineRun | None,
    made: tuple[list[Node], list[tuple[str, str]]],
) -> int:
    """Add the boxes of one DAG from column `first` on; the deepest column used comes back."""
    nodes, edges = made
    assert component.dag is not None
    ends: dict[str, int] = {}
    for task in _ordered(component.dag.tasks):
        start = max((ends[name] + 1 for name in task.dependencies if name in ends), default=first)
        node_id = f"{prefix}{task.name}"
        inner = pipeline.component_of(task)
        is_group = inner.dag is not None or task.iterator is not None
        nodes.append(Node(node_id, task.display_name, start, len(nodes), is_group))
        edges.extend((f"{prefix}{name}", node_id) for name in sorted(task.dependencies))
        ends[task.name] = start
        if inner.dag is not None:
            for inside in _instances(node_id, task, run):
                ends[task.name] = max(ends[task.name], _place(pipeline, inner, f"{inside}/", start + 1, run, made))
    return max(ends.values(), default=first)


def _instances(node_id: str, task: Task, run: PipelineRun | None) -> list[str]:
    """The places of a group's insides: one, or one per iteration of a loop that ran (the first ten)."""
    if task.iterator is None or run is None:
        return [node_id]
    started = {step.split("/")[node_id.count("/") + 1] for step in run.steps if step.startswith(f"{node_id}/")}
    numbers = sorted(int(part) for part in started if part.isdigit())[:10]
    return [f"{node_id}/{number}" for number in numbers] or [node_id]


def _ordered(tasks: Mapping[str, Task]) -> Iterable[Task]:
    """The tasks, each after its dependencies."""
    left, done = dict(tasks), set[str]()
    while left:
        ready = [name for name, task in left.items() if task.dependencies <= done]
        for name in ready or list(left):
            done.add(name)
            yield left.pop(name)


def graph_svg(pipeline: Pipeline, run: PipelineRun | None = None) -> str:
    """The pipeline's graph; with a run, coloured by status, with durations, and each box linked to its step's log."""
    nodes, edges = layout(pipeline, run)
    at = {node.id: (10 + node.depth * _COLUMN, 10 + node.row * _ROW) for node in nodes}
    width = max((x for x, _ in at.values()), default=0) + _BOX[0] + 20
    height = len(nodes) * _ROW + 20
    lines = [_edge(at[tail], at[head]) for tail, head in edges if tail in at and head in at]
    boxes = [_box(node, at[node.id], run.steps.get(node.id) if run else None) for node in nodes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" role="img" aria-label="pipeline {html.escape(pipeline.name)}">'
        f"{''.join(lines)}{''.join(boxes)}</svg>"
    )


def gantt_svg(run: PipelineRun) -> str:
    """The run's steps as bars over time."""
    steps = [step for step in run.steps.values() if step.started and not step.is_group]
    origin = min((step.started for step in steps), default=run.started)
    total = max((step.started - origin + step.duration_s for step in steps), default=0.0) or 1.0
    left, width = 220, 560
    bars = []
    for row, step in enumerate(steps):
        x = left + (step.started - origin) / total * width
        length = max(step.duration_s / total * width, 1.5)
        y = row * (_BAR + 6)
        title = html.escape(f"{step.id}: {_state(step)}, {step.duration_s:.3f} s, {step.max_rss_mib:.0f} MiB")
        bars.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end" font-size="12">{html.escape(step.id[-32:])}</text>'
            f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2" fill="{COLOURS[_state(step)]}">'
            f"<title>{title}</title></rect>"
        )
    height = len(steps) * (_BAR + 6) + 24
    axis = f'<text x="{left}" y="{height - 6}" font-size="11">0 s</text>'
    axis += f'<text x="{left + width}" y="{height - 6}" font-size="11" text-anchor="end">{total:.2f} s</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{height}" '
        f'font-family="sans-serif" role="img" aria-label="steps over time">{"".join(bars)}{axis}</svg>'
    )


def steps_html(run: PipelineRun, log_lines: int = 40) -> str:
    """A fold per step: inputs, outputs, error and the end of its log."""
    parts = []
    for step in run.steps.values():
        if step.is_group:
            continue
        head = f"<b>{html.escape(step.id)}</b> {_mark(_state(step))} {step.duration_s:.2f} s {html.escape(step.reason)}"
        rows = [("inputs", _json(plain(step.inputs))), ("outputs", _json(plain(step.outputs)))]
        rows += [("traceback", step.traceback)] if step.traceback else []
        rows.append(("log", _log_end(step, log_lines)))
        body = "".join(f"<div>{name}</div><pre>{html.escape(text)}</pre>" for name, text in rows if text)
        parts.append(f'<details id="{_anchor(step.id)}"><summary>{head}</summary>{body}</details>')
    return "".join(parts)


def run_html(pipeline: Pipeline, run: PipelineRun) -> str:
    """The whole of a run for a notebook: graph, Gantt and the steps, each with its log."""
    title = f"<h4>{html.escape(run.pipeline)} {_mark(run.status)} {run.duration_s:.2f} s <code>{run.id}</code></h4>"
    error = f"<pre>{html.escape(run.error)}</pre>" if run.error else ""
    gantt = f"<details><summary>steps over time</summary>{gantt_svg(run)}</details>"
    return f"{title}{error}{graph_svg(pipeline, run)}{gantt}{steps_html(run)}"


def compare(first: PipelineRun, second: PipelineRun) -> list[dict[str, object]]:
    """What differs between two runs: parameters, states, inputs, outputs and durations by step."""
    rows: list[dict[str, object]] = []
    for name in sorted({*first.params, *second.params}):
        _differ(rows, "run", f"parameter {name}", first.params.get(name), second.params.get(name))
    for step_id in dict.fromkeys([*first.steps, *second.steps]):
        one, two = first.steps.get(step_id), second.steps.get(step_id)
        _differ(rows, step_id, "state", one and _state(one), two and _state(two))
        if one is None or two is None or one.is_group:
            continue
        for part in sorted({*one.cache_parts, *two.cache_parts}):
            if part in ("code", "environment"):
                _differ(rows, step_id, part, one.cache_parts.get(part, "")[:12], two.cache_parts.get(part, "")[:12])
        for kind, before, after in (("input", one.inputs, two.inputs), ("output", one.outputs, two.outputs)):
            for name in sorted({*before.parameters, *after.parameters}):
                _differ(rows, step_id, f"{kind} {name}", before.parameters.get(name), after.parameters.get(name))
        if abs(one.duration_s - two.duration_s) > 0.5 * max(one.duration_s, two.duration_s, 0.1):
            _differ(rows, step_id, "seconds", round(one.duration_s, 3), round(two.duration_s, 3))
    return rows


def _differ(rows: list[dict[str, object]], step: str, what: str, first: object, second: object) -> None:
    if first != second:
        rows.append({"step": step, "what": what, "first": first, "second": second})


def _edge(tail: tuple[int, int], head: tuple[int, int]) -> str:
    x1, y1 = tail[0] + _BOX[0], tail[1] + _BOX[1] // 2
    x2, y2 = head[0], head[1] + _BOX[1] // 2
    middle = (x1 + x2) / 2
    return f'<path d="M{x1},{y1} C{middle},{y1} {middle},{y2} {x2},{y2}" fill="none" stroke="#90a4ae"/>'


def _box(node: Node, at: tuple[int, int], step: StepRecord | None) -> str:
    state = _state(step) if step else "pending"
    x, y = at
    detail = f"{step.duration_s:.2f} s" if step and step.duration_s else state.replace("_", " ")
    dash = ' stroke-dasharray="4 3"' if node.is_group else ""
    title = html.escape(f"{node.id}: {state}" + (f": {step.reason}" if step and step.reason else ""))
    body = (
        f'<rect x="{x}" y="{y}" width="{_BOX[0]}" height="{_BOX[1]}" rx="6" fill="#fff" stroke="{COLOURS[state]}" '
        f'stroke-width="2"{dash}><title>{title}</title></rect>'
        f'<rect x="{x}" y="{y}" width="6" height="{_BOX[1]}" rx="3" fill="{COLOURS[state]}"/>'
        f'<text x="{x + 14}" y="{y + 18}" font-size="13">{html.escape(node.label[:24])}</text>'
        f'<text x="{x + 14}" y="{y + 35}" font-size="11" fill="#607d8b">{html.escape(detail)}</text>'
    )
    return f'<a href="#{_anchor(node.id)}">{body}</a>' if step and not node.is_group else body


def _state(step: StepRecord) -> str:
    return "cached" if step.cached and step.status == "succeeded" else step.status


def _mark(state: str) -> str:
    return f'<span style="color:{COLOURS.get(state, "#000")}">{html.escape(state)}</span>'


def _anchor(step_id: str) -> str:
    return "step-" + html.escape(step_id.replace("/", "-"))


def _json(value: object) -> str:
    return json.dumps(value, indent=1, default=str) if value else ""


def _log_end(step: StepRecord, lines: int) -> str:
    try:
        with open(step.log, encoding="utf-8", errors="replace") as file:
            return "".join(file.readlines()[-lines:])
    except OSError:
        return ""
