"""`mlfuncs pipeline ...`: compile, validate, run, resume, submit and debug pipelines."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlfuncs.cli.output import only_json
from mlfuncs.errors import InvalidInput, MlfuncsError, SpecError
from mlfuncs.settings import read_settings
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.run_log import PipelineRun

if TYPE_CHECKING:
    from mlfuncs_pipelines.observer import Observer


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
@click.argument("target")
@click.option("--param", "params", multiple=True, metavar="NAME=JSON", help="A parameter of the pipeline.")
@click.option("--parallel", type=click.IntRange(min=1), help="Steps at once; default: one per core, at least 4.")
@click.option("--cache/--no-cache", default=True, help="Use the results of equal steps that ran before.")
@click.option("--ignore", multiple=True, metavar="INPUT", help="An input that does not count for the cache.")
@click.option("--containers", type=click.Choice(["docker", "process"]), default="docker", show_default=True)
@click.option("--resume", default="", metavar="RUN", help="Go on with this run, but with TARGET as it is now.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; logs go to standard error.")
def run(target: str, params: tuple[str, ...], as_json: bool, resume: str, **options: Any) -> None:
    """Run a pipeline on this machine; the exit code is 0 only when it succeeded.

    TARGET is a compiled file (any kfp v2 IR) or FILE.py:NAME.
    """
    from mlfuncs_pipelines.runner import check_same, resume_run, run_pipeline

    def execute(observers: list[Observer]) -> PipelineRun:
        with only_json(as_json):
            loaded = load_ir(target)
        values, settings = parse_params(params, loaded), read_settings()
        if not resume:
            return run_pipeline(loaded, values, settings, _options(options), observers)
        check_same(resume, loaded, values, settings)
        observers = [_says(f"{resume} goes on with {target} as it is now; steps that it changes run again"), *observers]
        return resume_run(resume, settings, _options(options), observers, loaded)

    _report(execute, as_json)


@pipeline.command(name="compile")
@click.argument("target")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Where to write; default: NAME.yaml.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compile_(target: str, output: Path | None, as_json: bool) -> None:
    """Write the pipeline FILE.py:NAME as an IR YAML file."""
    from mlfuncs_pipelines.targets import load_pipeline_object, write_ir

    with only_json(as_json):
        found = load_pipeline_object(target)
        path = write_ir(found, output or Path(f"{found.name}.yaml"))
    click.echo(json.dumps({"pipeline": found.name, "path": str(path)}) if as_json else str(path))


@pipeline.command()
@click.argument("target")
@click.option("--param", "params", multiple=True, metavar="NAME=JSON")
@click.option("--host", default="", help="Kubeflow Pipelines URL; default: the setting kubeflow_host.")
@click.option("--experiment", default="Default", show_default=True)
@click.option("--cron", default="", help="Run at these times instead of now: five fields.")
@click.option("--wait/--no-wait", default=False, help="Return when the run is over.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def submit(target: str, params: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run the pipeline FILE.py:NAME on Kubeflow, or schedule it there."""
    from mlfuncs_pipelines.targets import load_pipeline_object

    with only_json(as_json):
        found = load_pipeline_object(target)
        values = parse_params(params, found.ir)
    place = {"host": options["host"], "experiment": options["experiment"]}
    if options["cron"]:
        made = found.schedule(options["cron"], **place, **values)
        body = {"schedule": made.id, "cron": made.cron, "url": made.url}
    else:
        started = found.submit(**place, **values)
        if options["wait"]:
            started.wait()
        body = {"run_id": started.id, "status": started.status(), "url": started.url}
    click.echo(json.dumps(body) if as_json else "\n".join(f"{name}: {value}" for name, value in body.items()))


@pipeline.command()
@click.argument("run_id")
@click.argument("step")
def debug(run_id: str, step: str) -> None:
    """Run one STEP of a run again, alone and with the same inputs; a failure opens the debugger."""
    from mlfuncs_pipelines.debugging import debug_step

    raise SystemExit(debug_step(run_id, step, read_settings()))


@pipeline.command()
@click.argument("run_id")
@click.option("--parallel", type=click.IntRange(min=1))
@click.option("--cache/--no-cache", default=True)
@click.option("--ignore", multiple=True, metavar="INPUT")
@click.option("--containers", type=click.Choice(["docker", "process"]), default="docker", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; logs go to standard error.")
def resume(run_id: str, as_json: bool, **options: Any) -> None:
    """Go on with a run that failed or was killed, at the step where it stopped, with the code that it began with."""
    from mlfuncs_pipelines.runner import resume_run

    present = f"mlfuncs pipeline run FILE.py:NAME --resume {run_id}"
    first = _says(f"{run_id} goes on with the code that it began with; with the present code: {present}")
    _report(lambda others: resume_run(run_id, read_settings(), _options(options), [first, *others]), as_json)


def load_ir(target: str) -> Pipeline:
    """The pipeline in a compiled file, or the one that FILE.py:NAME defines. Raises InvalidPipeline or NotFound."""
    from mlfuncs_pipelines.validate import load_pipeline

    if target.endswith((".py", ".ipynb")):
        raise SpecError(f"{target!r} is code: say which pipeline of it, like {target}:NAME")
    if target.endswith((".yaml", ".yml", ".json")) or Path(target).is_file() or ":" not in target:
        return load_pipeline(target)
    from mlfuncs_pipelines.targets import load_pipeline_object

    found: Pipeline = load_pipeline_object(target).ir
    return found


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
        parallel=options["parallel"],
        cache=options["cache"],
        ignore=frozenset(options["ignore"]),
        containers=options["containers"],
    )


def _says(text: str) -> Observer:
    """An observer that prints `text` once it is sure that the run begins."""
    from mlfuncs_pipelines.observer import Observer

    class Says(Observer):
        def run_started(self, run: PipelineRun) -> None:
            click.echo(text, err=True)

    return Says()


def _observer(as_json: bool) -> Any:
    from mlfuncs_pipelines.display import LineObserver, TreeObserver

    if sys.stdout.isatty() and not as_json:
        return TreeObserver()
    return LineObserver(sys.stderr if as_json else sys.stdout)


def _report(execute: Callable[[list[Observer]], PipelineRun], as_json: bool) -> None:
    """Run, print the outcome, and leave with 0 for success, 1 for failure, 130 when interrupted."""
    from mlfuncs_pipelines.display import LatestRun

    signal.signal(signal.SIGTERM, _interrupt)
    latest = LatestRun()
    try:
        finished = execute([latest, _observer(as_json)])
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
            begun = latest.run.to_dict() if latest.run else {"steps": [], "outputs": {}}
            click.echo(json.dumps({**begun, "status": "cancelled", "error": "interrupted"}, default=str))
        raise SystemExit(130) from None
    if as_json:
        click.echo(json.dumps(finished.to_dict(), default=str))
    else:
        for name, value in finished.outputs.items():
            click.echo(f"{name} = {json.dumps(value, default=str)}")
    raise SystemExit(0 if finished.status == "succeeded" else 1)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
