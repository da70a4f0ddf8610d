"""Commands that take a function from a file: run, deploy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import click

from mlfuncs.cli.output import as_json, emit, only_json, parse_assignments
from mlfuncs.errors import SpecError

if TYPE_CHECKING:
    from mlfuncs.runs.run import Run


@click.command()
@click.argument("target", metavar="FILE:FUNCTION")
@click.option("-p", "--param", "params", multiple=True, metavar="NAME=JSON", help="An argument; may be repeated.")
@click.option("--isolated", is_flag=True, help="In a process and environment of its own.")
@click.option("--target", "place", type=click.Choice(["docker", "kubernetes"]), help="In a container; as a Job.")
@click.option("--timeout-s", type=float, help="How long an isolated run may take.")
@as_json
def run(
    target: str,
    params: tuple[str, ...],
    isolated: bool,
    place: Literal["docker", "kubernetes"] | None,
    timeout_s: float | None,
    json_wanted: bool,
) -> None:
    """Run a function as a tracked run and print its id, status, metrics and outputs."""
    from mlfuncs.display import format_duration, format_value
    from mlfuncs.loading import load_target
    from mlfuncs.runs.run import run_function

    given = parse_assignments(params, "--param")
    with only_json(json_wanted):
        function = load_target(target)
        isolation = "process" if isolated else "inline"
        options: dict[str, Any] = {"isolation": isolation, "target": place, "timeout_s": timeout_s}
        result = run_function(function, (), _typed(function, given), **options)
    values = _run_values(result)
    lines = [f"run {result.id} {values['status']} in {format_duration(values['duration_s'] or 0)}"]
    lines += [f"  {name} = {format_value(value)}" for name, value in values["metrics"].items()]
    lines += [f"  {name}: {format_value(value)}" for name, value in result.outputs.items()]
    emit(values, json_wanted, "\n".join(lines))


def _typed(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """`given` as the function's own types: a date from its text, a dataclass from its object. Raises InvalidInput."""
    from mlfuncs.errors import SignatureError

    try:
        return dict(function.signature.validate_json(json.dumps(given).encode()))
    except SignatureError:  # a parameter that has no JSON form, or a Nuclio handler: the run itself says so
        return given


@click.command()
@click.argument("target", metavar="FILE:NAME|NOTEBOOK|function.yaml")
@click.option("--name", help="The endpoint's name (default: the function's).")
@click.option("--target", "place", default="process", show_default=True, help="What serves it.")
@click.option("--min", "min_replicas", type=int, help="The fewest replicas.")
@click.option("--max", "max_replicas", type=int, help="The most replicas.")
@click.option("--init", multiple=True, metavar="NAME=JSON", help="A constructor's argument; RUN/OUTPUT after '=@'.")
@click.option("--traffic", type=click.IntRange(0, 100), help="The new revision's percentage of requests.")
@click.option("--timeout-s", type=float, help="How long one request may take.")
@click.option("--env", multiple=True, metavar="NAME=TEXT", help="An environment variable of the workers.")
@click.option("--wait-s", type=float, help="How long to wait until it answers.")
@as_json
def deploy(target: str, json_wanted: bool, **options: Any) -> None:
    """Serve a function, a class or a Nuclio handler, and print its URL once it answers.

    The constructor's arguments of a class are given with --init: JSON, or an output of an earlier run as @RUN/OUTPUT.
    """
    from mlfuncs.nuclio_source import load_deployable
    from mlfuncs.serving import endpoints
    from mlfuncs.serving.deployment import with_scale

    with only_json(json_wanted):
        function = load_deployable(target)
    spec = with_scale(function.spec, min=options["min_replicas"], max=options["max_replicas"])
    given: dict[str, Any] = {
        key: options[key] for key in ("traffic", "timeout_s", "wait_s") if options[key] is not None
    }
    if spec != function.spec:
        given["scale"] = spec.scale
    if options["env"]:
        given["env"] = {**spec.env, **_texts(options["env"])}
    given |= {name: _resolve(value) for name, value in parse_assignments(options["init"], "--init").items()}
    endpoint = endpoints.deploy(function, name=options["name"], target=options["place"], **given)
    values = {"name": endpoint.name, "url": endpoint.url, "revision": endpoint.revision}
    emit(values, json_wanted, f"{endpoint.name} {endpoint.revision} answers at {endpoint.url}")


def _texts(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise SpecError(f"--env {pair!r} is not of the form NAME=TEXT")
    return {name: text for name, _, text in (pair.partition("=") for pair in pairs)}


def _resolve(value: Any) -> Any:
    """The output of a run that "@RUN/OUTPUT" names, else the value itself."""
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    from mlfuncs.errors import NotFound
    from mlfuncs.runs.run import get_run

    run_id, _, output = value[1:].partition("/")
    outputs = get_run(run_id).outputs
    if (output or "output") not in outputs:
        raise NotFound(f"output of run {run_id!r}", output or "output", outputs)
    return outputs[output or "output"]


def _run_values(result: Run) -> dict[str, Any]:
    return {
        "id": result.id,
        "function": result.function,
        "status": result.status,
        "duration_s": result.duration_s,
        "params": result.params,
        "metrics": result.metrics,
        "outputs": {name: _output(value) for name, value in result.outputs.items()},
        "error": result.error,
    }


def _output(value: Any) -> Any:
    ref = getattr(value, "ref", None)
    return ref.to_dict() if ref is not None else value
