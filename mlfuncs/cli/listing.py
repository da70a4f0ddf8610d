"""Commands that list and show: ls, models, logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from mlfuncs.cli.output import as_json, emit, table
from mlfuncs.errors import InvalidInput, NotFound
from mlfuncs.settings import read_settings

if TYPE_CHECKING:
    from mlfuncs.runs.run import Run

FOLLOW_S = 0.5  # how often a run that goes on is asked what it has printed since
_limit = click.option("--limit", default=20, type=click.IntRange(min=1), show_default=True, help="How many at most.")


@click.command()
@click.argument("what", default="endpoints", type=click.Choice(["endpoints", "runs", "functions", "artifacts"]))
@_limit
@click.option("--pipeline", help="Of runs: the pipeline's runs and those of its steps alone.")
@as_json
def ls(what: str, limit: int, pipeline: str | None, json_wanted: bool) -> None:
    """List what the project has: endpoints by name, runs, functions and artifacts the newest first."""
    if pipeline is not None and what != "runs":
        raise InvalidInput(f"--pipeline chooses among runs; write 'mlfuncs ls runs --pipeline {pipeline}'")
    rows, columns = _runs(limit, pipeline) if what == "runs" else _READERS[what](limit)
    emit({what: rows}, json_wanted, lambda: table([_shown(row) for row in rows], columns, f"no {what} yet"))


@click.command()
@_limit
@as_json
def models(limit: int, json_wanted: bool) -> None:
    """List the models that runs have stored, the newest first."""
    rows, columns = _artifacts(limit, kind="model")
    emit({"models": rows}, json_wanted, lambda: table([_shown(row) for row in rows], columns, "no models yet"))


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with every new line.")
@click.option("-n", "--lines", default=100, type=click.IntRange(min=1), show_default=True, help="How many at the end.")
@as_json
def logs(name: str, follow: bool, lines: int, json_wanted: bool) -> None:
    """Show the log of the endpoint NAME, or of the run whose id starts with NAME.

    The log of a pipeline run is those of its steps, each line with the step's name.
    """
    from mlfuncs.serving.endpoints import endpoint

    try:
        found = endpoint(name)
    except NotFound as no_endpoint:
        _run_logs(name, lines, follow, json_wanted, no_endpoint)
        return
    if follow:
        _emit_lines(found.logs(lines, follow=True), json_wanted)
        return
    text = list(found.logs(lines))
    emit({"name": name, "lines": text}, json_wanted, "\n".join(text))


def _emit_lines(lines: Iterable[str], json_wanted: bool) -> None:
    for line in lines:
        emit({"line": line}, json_wanted, line or " ")
        sys.stdout.flush()


def _run_logs(name: str, lines: int, follow: bool, json_wanted: bool, no_endpoint: NotFound) -> None:
    from mlfuncs.runs.run import get_run

    try:
        run = get_run(name)
    except NotFound:
        raise NotFound(
            "endpoint or run", name, no_endpoint.near, hint="See 'mlfuncs ls' and 'mlfuncs ls runs'."
        ) from None
    if follow:
        _emit_lines(_new_lines(run, lines), json_wanted)
        return
    text = _log_of(run).splitlines()[-lines:]
    emit({"run": run.id, "lines": text}, json_wanted, "\n".join(text))


def _new_lines(run: Run, lines: int) -> Iterator[str]:
    """The last `lines` lines of the run's log, and each that comes until it has ended."""
    from mlfuncs.registry.runs import ACTIVE

    seen: int | None = None
    while True:
        is_over = run.status not in ACTIVE  # asked first: what it printed last is read after that
        text = _log_of(run)
        whole = text if is_over else text[: text.rfind("\n") + 1]
        yield from whole.splitlines()[-lines:] if seen is None else whole[seen:].splitlines()
        seen = len(whole)
        if is_over:
            return
        time.sleep(FOLLOW_S)


def _log_of(run: Run) -> str:
    """What the run printed; of a pipeline run each line of its steps with the step's name before it."""
    if run.row.kind != "pipeline":
        return run.logs
    return "\n".join(f"[{step.row.step}] {line}" for step in run.children() for line in step.logs.splitlines())


Rows = tuple[list[dict[str, Any]], tuple[str, ...]]


def _endpoints(limit: int) -> Rows:
    from mlfuncs.cli.home import _overview

    columns = ("name", "state", "revision", "replicas", "url")
    return [{key: endpoint[key] for key in columns} for endpoint in _overview()["endpoints"][:limit]], columns


def _runs(limit: int, pipeline: str | None = None) -> Rows:
    from mlfuncs.display import format_time
    from mlfuncs.runs.run import list_runs

    rows = [
        {
            "id": run.id,
            "function": run.function,
            "step": run.row.step,
            "status": run.status,
            "started": format_time(run.row.started_at),
            "duration_s": run.duration_s,
            "params": run.params,
            "metrics": run.metrics,
        }
        for run in list_runs(pipeline=pipeline, limit=limit)
    ]
    steps = ("step",) if any(row["step"] for row in rows) else ()
    return rows, ("id", "function", *steps, "status", "started", "took", "params", "metrics")


def _functions(limit: int) -> Rows:
    from mlfuncs.display import format_time
    from mlfuncs.registry import open_registry

    functions = open_registry(read_settings()).functions
    known = [functions.versions(name) for name in functions.names()]
    rows = []
    for versions in sorted(known, key=lambda versions: versions[0].recorded_at, reverse=True)[:limit]:
        latest = versions[0]
        rows.append(
            {"name": latest.name, "versions": len(versions), "latest": latest.digest}
            | {"kind": latest.manifest.get("kind"), "recorded": format_time(latest.recorded_at)}
        )
    return rows, ("name", "kind", "versions", "latest", "recorded")


def _artifacts(limit: int, kind: str | None = None) -> Rows:
    from mlfuncs.registry import open_registry

    rows = [
        {"digest": ref["digest"], "kind": ref["kind"], "type": ref["type_name"], "size_bytes": ref["size_bytes"]}
        for ref in open_registry(read_settings()).artifacts.list(kind=kind, limit=limit)
    ]
    return rows, ("digest", "kind", "type", "size_bytes")


_READERS = {"endpoints": _endpoints, "runs": _runs, "functions": _functions, "artifacts": _artifacts}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people: digests cut, durations in words, mappings and lists as short text."""
    from mlfuncs.display import format_duration

    shown = dict(row)
    for key, value in row.items():
        if key in ("digest", "latest"):
            shown[key] = str(value)[:12]
        elif key == "url":
            shown[key] = value or "none until 'mlfuncs up'"
        elif key == "duration_s":
            shown["took"] = format_duration(value)
        elif key == "replicas":
            shown[key] = f"{sum(r['state'] == 'ready' for r in value)}/{len(value)}"
        elif isinstance(value, dict):
            shown[key] = ", ".join(f"{name}={text!s:.40}" for name, text in value.items())
    return shown
