"""`mlfuncs pipeline ...`: validate, run, resume and debug pipelines."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

from mlfuncs.errors import InvalidInput, MlfuncsError
from mlfuncs.settings import read_settings
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.run_log import PipelineRun


@click.group()
def pipeline() -> None:
    """Compile, check and run Kubeflow pipelines."""


@pipeline.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def validate(file: Path, as_json: bool) -> None:
    """Check a compiled pipeline FILE strictly; every problem comes with its place and its mend."""
    from mlfuncs_pipelines.validate import check_file

    checked, problems = check_file(file)
    if as_json:
        body = {"file": str(file), "valid": not problems, "problems": [problem.to_dict() for problem in problems]}
        click.echo(json.dumps(body))
    else:
        for problem in problems:
            click.echo(str(problem), err=True)
        name = checked.name if checked else str(file)
        click.echo(f"{name}: " + (f"{len(problems)} problem(s)" if problems else "valid"))
    if problems:
        raise SystemExit(1)


@pipeline.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--param", "params", multiple=True, metavar="NAME=JSON", help="A parameter of the pipeline.")
@click.option("--parallel", type=click.IntRange(min=1), help="Steps at once; default: one per core, at least 4.")
@click.option("--cache/--no-cache", default=True, help="Use the results of equal steps that ran before.")
@click.option("--ignore", multiple=True, metavar="INPUT", help="An input that does not count for the cache.")
@click.option("--containers", type=click.Choice(["docker", "process"]), default="docker", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; logs go to standard error.")
def run(file: Path, params: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run a compiled pipeline FILE on this machine; the exit code is 0 only when it succeeded."""
    from mlfuncs_pipelines.runner import run_pipeline
    from mlfuncs_pipelines.validate import load_pipeline

    def execute() -> PipelineRun:
        loaded = load_pipeline(file)
        values = parse_params(params, loaded)
        return run_pipeline(loaded, values, read_settings(), _options(options), [_observer(as_json)])

    _report(execute, as_json)


@pipeline.command()
@click.argument("run_id")
@click.option("--parallel", type=click.IntRange(min=1))
@click.option("--cache/--no-cache", default=True)
@click.option("--ignore", multiple=True, metavar="INPUT")
@click.option("--containers", type=click.Choice(["docker", "process"]), default="docker", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; logs go to standard error.")
def resume(run_id: str, as_json: bool, **options: Any) -> None:
    """Go on with a run that failed or was killed, at the step where it stopped."""
    from mlfuncs_pipelines.runner import resume_run

    _report(lambda: resume_run(run_id, read_settings(), _options(options), [_observer(as_json)]), as_json)


def parse_params(texts: tuple[str, ...], pipeline: Pipeline) -> dict[str, Any]:
    """The values of `--param name=JSON`; text that is no JSON is a string, and a STRING parameter takes it as it is."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, raw = text.partition("=")
        if not equals:
            raise InvalidInput(f"--param {text!r} has no '='; write it like --param days=7")
        try:
            value = json.loads(raw)
        except json.JSONDecodeError:
            value = raw
        declared = pipeline.root.input_parameters.get(name)
        if declared and declared.type == "STRING" and not isinstance(value, str | None):
            value = raw  # 007 and 1e5 are texts here
        values[name] = value
    return values


def _options(options: dict[str, Any]) -> Any:
    from mlfuncs_pipelines.engine import Options

    return Options(
        parallel=options["parallel"] or 0,
        cache=options["cache"],
        ignore=frozenset(options["ignore"]),
        containers=options["containers"],
    )


def _observer(as_json: bool) -> Any:
    from mlfuncs_pipelines.display import LineObserver

    return LineObserver(sys.stderr if as_json else sys.stdout)


def _report(execute: Any, as_json: bool) -> None:
    """Run, print the outcome, and leave with 0 for success, 1 for failure, 130 when interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        finished: PipelineRun = execute()
    except MlfuncsError as exc:
        if as_json:
            problem = exc.to_problem()
            body = {**problem, "status": "failed", "error": str(exc), "steps": [], "outputs": {}}
            click.echo(json.dumps(body))
        else:
            click.echo(f"error: {exc}", err=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if as_json:
            click.echo(json.dumps({"status": "cancelled", "error": "interrupted", "steps": [], "outputs": {}}))
        raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(finished.to_dict(), default=str))
    else:
        for name, value in finished.outputs.items():
            click.echo(f"{name} = {json.dumps(value, default=str)}")
    raise SystemExit(0 if finished.status == "succeeded" else 1)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
