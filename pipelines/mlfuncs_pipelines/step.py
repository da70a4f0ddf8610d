"""The entry point inside a step: `python -m mlfuncs_pipelines.step --bundle DIGEST ... --executor_input {{$}}`.

The same code runs in a Kubeflow pod and in the local engine's forked workers. Only the standard library is imported
until the user's code is loaded.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfuncs.settings import Settings
    from mlfuncs.spec import FunctionSpec
    from mlfuncs_pipelines.ports import Port


# what a call imports late; a forked step finds it loaded
_LATER = (
    "mlfuncs.codecs",
    "mlfuncs.runs.execution",
    "mlfuncs.runs.journal",
    "mlfuncs.secrets",
    "mlfuncs.runs.tracking",
    "mlfuncs_pipelines.artifact_files",
)
_MESSAGE_BYTES = 100_000  # a socket takes about 200 KB in one message; a longer output goes through a file


@dataclass(frozen=True)
class Loaded:
    """A function ready to be called: its code, its interface, the settings it runs under."""

    digest: str
    target: Any
    spec: FunctionSpec
    settings: Settings
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    signature: Any


@dataclass(frozen=True)
class Track:
    """Where a step's own metrics and artifacts are kept: the id of its run and the file of its journal."""

    run_id: str
    journal: str


@dataclass(frozen=True)
class Call:
    """One execution: kfp's executor input, and the inputs that travel as JSON text."""

    executor_input: Mapping[str, Any]
    json_inputs: frozenset[str] = frozenset()
    track: Track | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> None:
    """Run the step that the command line describes."""
    parser = argparse.ArgumentParser(prog="mlfuncs_pipelines.step")
    parser.add_argument("--bundle", required=True, help="digest of the function's bundle")
    parser.add_argument("--inline", default="", help="the bundle itself: base64 of {file name: base64}")
    parser.add_argument("--json", default="", help="inputs that are JSON text, separated by commas")
    parser.add_argument("--point", action="store_true", help="run one point of a sweep")
    parser.add_argument("--executor_input", required=True, help="kfp's ExecutorInput as JSON")
    given = parser.parse_args(arguments)
    if given.inline:
        unpack_inline(given.bundle, given.inline)
    names = frozenset(name for name in given.json.split(",") if name)
    call = Call(_without_nulls(json.loads(given.executor_input)), names)
    written = execute(load({"bundle": given.bundle, "point": given.point}), call)
    _write_file(call, json.dumps(_with_nulls(written, call.executor_input["outputs"])))


def _with_nulls(written: dict[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """The executor output with null for what the step left out: Kubeflow fails a step without all of its parameters."""
    nulls = dict.fromkeys(declared.get("parameters", {}))
    return {**written, "parameterValues": {**nulls, **written["parameterValues"]}}


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """The executor input without the nulls of such steps: what gets none has its default."""
    inputs = given.get("inputs", {})
    kept = {name: value for name, value in inputs.get("parameterValues", {}).items() if value is not None}
    return {**given, "inputs": {**inputs, "parameterValues": kept}}


def load(step: Mapping[str, Any]) -> Loaded:
    """Open the verified bundle and load the function. Raises NotFound or UntrustedError with nothing loaded."""
    from mlfuncs.bundles.bundle import open_bundle
    from mlfuncs.decorator import Function
    from mlfuncs.interface.signature import Signature
    from mlfuncs.settings import read_settings
    from mlfuncs_pipelines.ports import input_ports, output_ports

    settings = read_settings()
    bundle = open_bundle(step["bundle"], settings)
    target = bundle.load()
    target = target.target if isinstance(target, Function) else target
    signature = Signature.of(target)
    inputs, outputs = input_ports(signature), output_ports(signature)
    loaded = Loaded(bundle.digest, target, bundle.manifest.function_spec, settings, inputs, outputs, signature)
    if step.get("point"):
        from mlfuncs_pipelines.point import as_point

        loaded = as_point(loaded)
    _warm(loaded)
    return loaded


def _warm(loaded: Loaded) -> None:
    """Import and build now, once, what no step forked from here should have to."""
    from mlfuncs.errors import InvalidInput
    from mlfuncs_pipelines.ports import build_borders

    for name in (*_LATER, *(["asyncio"] if inspect.iscoroutinefunction(loaded.target) else [])):
        importlib.import_module(name)
    build_borders([*loaded.inputs.values(), *loaded.outputs.values()])
    try:
        loaded.signature.validate_python({})
    except InvalidInput:
        return


def run_request(request: Mapping[str, Any], loaded: Loaded | None) -> dict[str, Any] | None:
    """Run one step for the local engine, in this process, and return its executor output.

    None when that is too long for a message: then it is in the file where kfp has it.
    """
    if loaded is None or loaded.digest != request["bundle"]:
        loaded = load(request)
    if loaded.spec.secrets:
        _mask_secrets(loaded)
    track = Track(**request["track"]) if request.get("track") else None
    call = Call(request["executor_input"], frozenset(request.get("json_inputs", ())), track)
    written = execute(loaded, call)
    text = json.dumps(written)
    if len(text) < _MESSAGE_BYTES:
        return written
    _write_file(call, text)
    return None


def _mask_secrets(loaded: Loaded) -> None:
    """Keep secret values out of the step's log and of its reported error."""
    from mlfuncs.secrets import Redactor, available_secrets

    redactor = Redactor(available_secrets(loaded.spec.secrets, loaded.settings).values())
    sys.stdout, sys.stderr = redactor.wrap(sys.stdout), redactor.wrap(sys.stderr)
    host = sys.modules.get("mlfuncs_step_child")
    if host is not None:  # it reports errors
        host.mask = redactor.text  # type: ignore[attr-defined]


def execute(loaded: Loaded, call: Call) -> dict[str, Any]:
    """Read the inputs, call the function, write the artifacts; kfp's executor output as JSON."""
    values = _read_inputs(loaded, call)
    result = _call(loaded, values, call)
    return _write_outputs(loaded, call.executor_input, result)


def unpack_inline(digest: str, encoded: str, settings: Settings | None = None) -> None:
    """Put a bundle that came with the command where bundles are found; its signature is checked when it is opened."""
    from mlfuncs.bundles.store import unpack_files
    from mlfuncs.settings import read_settings

    unpack_files(digest, json.loads(base64.b64decode(encoded)), settings or read_settings())


def _read_inputs(loaded: Loaded, call: Call) -> dict[str, Any]:
    from dataclasses import replace

    from mlfuncs_pipelines.ports import decode_value, value_port

    given = call.executor_input.get("inputs", {})
    values: dict[str, Any] = {}
    for name, value in given.get("parameterValues", {}).items():
        port = loaded.inputs.get(name)
        if port is None:
            continue  # kfp adds inputs for the placeholders in other ones
        if name in call.json_inputs and port.form == "value":
            port = replace(port, form="json")  # the item of a loop
        if port.form == "json" and name not in call.json_inputs:
            port = value_port(port, "")
        values[name] = decode_value(port, value)
    for name, artifacts in given.get("artifacts", {}).items():
        if name in loaded.inputs:
            values[name] = _read_artifacts(loaded, name, artifacts.get("artifacts", []))
    for parameter in loaded.signature.parameters:  # kfp gives nothing where None was given
        if parameter.required and parameter.name not in values and loaded.inputs[parameter.name].optional:
            values[parameter.name] = None
    return dict(loaded.signature.validate_python(values))


def _read_artifacts(loaded: Loaded, name: str, artifacts: list[Mapping[str, Any]]) -> Any:
    from mlfuncs_pipelines.artifact_files import element_of, read_artifact
    from mlfuncs_pipelines.ports import strip_optional

    hint, _ = strip_optional(loaded.inputs[name].hint)
    element = element_of(hint)
    if loaded.inputs[name].is_list or (element is not None and len(artifacts) > 1):
        return [read_artifact(artifact, element, loaded.settings) for artifact in artifacts]
    return read_artifact(artifacts[0], None if hint is Any else hint, loaded.settings) if artifacts else None


def _call(loaded: Loaded, values: Mapping[str, Any], call: Call) -> Any:
    """The function's result. A function that ends the process has none, and fails whatever its exit code."""
    try:
        return _invoke(loaded, values, call)
    except SystemExit as exc:
        message = f"the function ended the process with exit code {exc.code!r}; return a value instead"
        raise SystemExit(message) from exc


def _invoke(loaded: Loaded, values: Mapping[str, Any], call: Call) -> Any:
    from mlfuncs.runs.execution import invoke

    if call.track is None:
        return invoke(loaded.target, values)
    from mlfuncs.runs.journal import Journal
    from mlfuncs.runs.tracking import ActiveRun, activate
    from mlfuncs.secrets import available_secrets

    secrets = available_secrets(loaded.spec.secrets, loaded.settings)
    run = ActiveRun(call.track.run_id, loaded.settings, Journal(Path(call.track.journal)), secrets)
    with activate(run):
        return invoke(loaded.target, values)


def _write_file(call: Call, text: str) -> None:
    path = Path(call.executor_input["outputs"]["outputFile"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_outputs(loaded: Loaded, given: Mapping[str, Any], result: Any) -> dict[str, Any]:
    from mlfuncs.errors import InvalidInput
    from mlfuncs_pipelines.artifact_files import write_artifact
    from mlfuncs_pipelines.placeholders import local_path
    from mlfuncs_pipelines.ports import encode_value, strip_optional

    outputs = given["outputs"]
    named = _by_name(loaded, result)
    written: dict[str, Any] = {"parameterValues": {}, "artifacts": {}}
    for name, port in loaded.outputs.items():
        value = named.get(name)
        if value is None and (port.optional or port.hint is Any):
            continue
        if value is None:
            raise InvalidInput(f"the step returned None, and its output {name!r} is declared {port.type_name}")
        if name in outputs.get("parameters", {}):
            written["parameterValues"][name] = encode_value(port, value)
        elif name in outputs.get("artifacts", {}):
            artifact = outputs["artifacts"][name]["artifacts"][0]
            hint, _ = strip_optional(port.hint)
            path = Path(local_path(artifact["uri"]))
            metadata = write_artifact(value, None if hint is Any else hint, path, loaded.settings)
            body = {"name": artifact.get("name", name), "uri": artifact["uri"], "metadata": metadata}
            written["artifacts"][name] = {"artifacts": [body]}
    return written


def _by_name(loaded: Loaded, result: Any) -> dict[str, Any]:
    """The results by output name: one value, or the fields of a NamedTuple (a plain tuple of that length will do)."""
    if list(loaded.outputs) == ["Output"]:
        return {"Output": result}
    if isinstance(result, tuple) and len(result) == len(loaded.outputs):
        return dict(zip(loaded.outputs, result, strict=True))
    if not loaded.outputs:
        return {}
    from mlfuncs.errors import InvalidInput

    names = ", ".join(loaded.outputs)
    raise InvalidInput(f"the step returned {type(result).__name__}, and its outputs are {names}: return the NamedTuple")


if __name__ == "__main__":
    main(sys.argv[1:])
