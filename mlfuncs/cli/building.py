"""Commands that turn functions into what runs elsewhere: build, render."""

from __future__ import annotations

import json
from typing import Any

import click

from mlfuncs.cli.output import as_json, emit, only_json
from mlfuncs.errors import SpecError
from mlfuncs.settings import read_settings


@click.command()
@click.argument("targets", metavar="FILE:NAME...|base", nargs=-1, required=True)
@click.option("--tag", help="The image's name (default: from the functions and the image's digest).")
@click.option("--push", is_flag=True, help="Send it to the registry of its name.")
@click.option("--context", metavar="URL", help="Write a build context (.tar.gz) there instead; needs no engine.")
@click.option("--python-image", default="", help="With 'base': the Python image to start from, e.g. one with CUDA.")
@click.option("--extras", default="", help="With 'base': extras of mlfuncs to put in, e.g. 'postgres,featurestore'.")
@as_json
def build(
    targets: tuple[str, ...],
    tag: str | None,
    push: bool,
    context: str | None,
    python_image: str,
    extras: str,
    json_wanted: bool,
) -> None:
    """Build an image that serves a function, or several; the same input gives the same image.

    'base' builds what all of them stand on: set MLFUNCS_BASE_IMAGE to its name to use it elsewhere.
    """
    from mlfuncs import adapters

    if targets == ("base",):
        names = [name for name in extras.replace(",", " ").split() if name]
        made = adapters.load("images:base")(tag, push, python_image, names, read_settings(), _report)
        _emit_image(made, f"{made.size_bytes / 1e6:.0f} MB", json_wanted)
        return
    if python_image or extras:
        raise SpecError("--python-image and --extras go with 'mlfuncs build base'")
    functions = _load(targets, json_wanted)
    if context:
        size = adapters.load("images:context")(functions, context, read_settings())
        emit({"context": context, "size_bytes": size}, json_wanted, f"{context} ({size / 1e6:.1f} MB)")
        return
    built = adapters.load("images:build")(functions, tag, push, read_settings(), _report)
    size = f"{built.size_bytes / 1e6:.0f} MB, {built.new_bytes / 1e6:.1f} MB above its base"
    _emit_image(built, size, json_wanted)


@click.command()
@click.argument("target", metavar="FILE:NAME|platform")
@click.option(
    "--target",
    "place",
    default="kubernetes",
    show_default=True,
    help="knative, kubernetes, nuclio, job, docker, buildkit, kaniko.",
)
@click.option("--image", default="", help="The image to name (default: what deploy would push).")
@click.option("--diff", is_flag=True, help="Compare with the cluster instead; changes nothing.")
@click.option("--compose", is_flag=True, help="With 'platform': a docker compose file for one machine.")
@as_json
def render(target: str, place: str, image: str, diff: bool, compose: bool, json_wanted: bool) -> None:
    """Print what deploy would apply, as YAML; 'platform' prints the namespace's own objects."""
    from mlfuncs import adapters

    settings = read_settings()
    if compose and target != "platform":
        raise SpecError("--compose goes with 'mlfuncs render platform'")
    if target == "platform":
        documents, warnings, text = adapters.load("manifests:platform")(settings, compose), [], ""
    else:
        (function,) = _load((target,), True)
        rendered = adapters.load("manifests:render")(function, place, settings, image)
        documents, warnings, text = rendered.documents, rendered.warnings, rendered.text
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if diff:
        _show_differences(adapters.load("manifests:differences")(documents, settings), json_wanted)
        return
    values = {"documents": documents, "warnings": warnings, **({"text": text} if text else {})}
    emit(values, json_wanted, lambda: text or to_yaml(documents))


def _report(note: str) -> None:
    click.echo(note, err=True)


def _emit_image(built: Any, size: str, json_wanted: bool) -> None:
    emit(built.to_dict(), json_wanted, f"{built.repo_digest or built.reference} ({size})\n{built.id}")


def to_yaml(documents: list[dict[str, Any]]) -> str:
    """The documents as YAML; as JSON, which is YAML too, where PyYAML is not installed."""
    try:
        import yaml
    except ModuleNotFoundError:
        return "\n---\n".join(json.dumps(document, indent=2) for document in documents)
    return str(yaml.safe_dump_all(documents, sort_keys=False)).rstrip("\n")


def _show_differences(found: list[dict[str, Any]], json_wanted: bool) -> None:
    lines = []
    for item in found:
        lines.append(f"{item['kind']} {item['name']}: {item['change']}")
        lines += [f"  {line}" for line in item["diff"]]
    emit({"differences": found}, json_wanted, "\n".join(lines))


def _load(targets: tuple[str, ...], quiet: bool) -> list[Any]:
    from mlfuncs.nuclio_source import load_deployable

    with only_json(quiet):
        return [load_deployable(target) for target in targets]
