"""The kfp component of one decorated function, fitted to what each call gives it."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfp.dsl import base_component, importer_node, pipeline_channel, pipeline_task, structures
from kfp.dsl import for_loop as kfp_loops
from kfp.dsl.types import artifact_types, type_utils

from mlfuncs.bundles.bundle import Bundle, build_bundle
from mlfuncs.decorator import Function
from mlfuncs.errors import InvalidInput, MlfuncsError, SpecError
from mlfuncs.interface.signature import Signature
from mlfuncs.settings import Settings, read_settings
from mlfuncs.signing import KEY_VARIABLE, project_key
from mlfuncs_pipelines.ports import (
    SCHEMA_VERSION,
    Port,
    artifact_port,
    encode_constant,
    input_ports,
    output_ports,
    strip_optional,
    value_port,
)
from mlfuncs_pipelines.preflight import step_timeout_s

MODULE = "mlfuncs_pipelines.step"
INLINE_BYTES = 64 * 1024  # a bundle up to this size travels inside the pipeline file (guess: files stay readable)
_MEMORY_TYPES = {
    "NUMBER_INTEGER": "Integer",
    "NUMBER_DOUBLE": "Float",
    "STRING": "String",
    "BOOLEAN": "Boolean",
    "LIST": "List",
    "STRUCT": "Dict",
}
_ANYTHING = "system.Artifact"
_SIGNED = ("system.Model", _ANYTHING)


class FunctionComponent(base_component.BaseComponent):
    """A decorated function in kfp's eyes. Its `component_spec` is the interface as annotated; a call may refine it."""

    flags: tuple[str, ...] = ()  # more words for the step's entry point

    def __init__(self, function: Function[Any, Any]) -> None:
        self.function = function
        self.settings = read_settings()
        self.inputs = input_ports(self.signature)
        self.outputs = output_ports(self.signature)
        self.bundle = build_bundle(function.target, function.spec, self.settings)
        self._specs: dict[tuple[Port, ...], structures.ComponentSpec] = {}
        super().__init__(self._spec_for(tuple(self.inputs.values())))

    @property
    def signature(self) -> Signature:
        """The interface of the step."""
        return self.function.signature

    def __call__(self, *args: Any, **kwargs: Any) -> pipeline_task.PipelineTask:
        """A task of the pipeline that is being traced. Raises InvalidInput, naming the argument and both types."""
        given = self._bind(args, kwargs)
        ports, arguments = [], {}
        for name, port in self.inputs.items():
            if name not in given:
                ports.append(port)
                continue
            fitted, argument = self._fit(port, given[name])
            ports.append(fitted)
            if argument is not None:
                arguments[name] = argument
        task = _KfpComponent(self._spec_for(tuple(ports)))(**arguments)
        _apply_options(task, self.function)
        if self._may_pickle():
            _give_key(task, self.settings)
        return task

    def execute(self, **kwargs: Any) -> Any:
        """Run the plain function, as kfp asks for outside of a pipeline."""
        return self.function.target(**kwargs)

    def _may_pickle(self) -> bool:
        """Whether the step may write something that needs a signature: a model, or a value of any type."""
        return any(port.form == "artifact" and port.kind in _SIGNED for port in self.outputs.values())

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = [p.name for p in self.signature.parameters if p.kind == "positional"]
        if len(args) > len(names):
            message = f"{self.function.spec.name} takes {len(names)} positional arguments, and {len(args)} were given"
            raise InvalidInput(message)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in given:
            if name not in self.inputs or (name in kwargs and name in names[: len(args)]):
                reason = "twice" if name in self.inputs else "is not a parameter"
                known = ", ".join(self.inputs) or "none"
                raise InvalidInput(f"{self.function.spec.name}: {name!r} {reason}; its parameters: {known}")
        missing = [name for name, port in self.inputs.items() if not port.optional and name not in given]
        if missing:
            raise InvalidInput(f"{self.function.spec.name} needs a value for {', '.join(missing)}")
        return given

    def _fit(self, port: Port, value: Any) -> tuple[Port, Any]:
        """The port as this argument needs it, and the argument as kfp takes it."""
        if isinstance(value, pipeline_task.PipelineTask):
            raise self._clash(port, f"the task {value.name!r}", f"pass one of its outputs, like {value.name}.output")
        collected = isinstance(value, kfp_loops.Collected) and value.is_artifact_channel
        if collected or isinstance(value, pipeline_channel.PipelineArtifactChannel):
            return self._fit_artifact(port, value)
        if isinstance(value, pipeline_channel.PipelineChannel):
            return self._fit_parameter(port, value)
        if value is None:
            if port.optional:
                return port, None
            raise self._clash(port, "None", "give a value, or declare it optional")
        if port.form == "artifact":
            return self._fit_file(port, value)
        if pipeline_channel.extract_pipeline_channels_from_any(value):
            return port, value  # text or a list with outputs of other steps in it
        return port, encode_constant(port, value)

    def _fit_artifact(self, port: Port, channel: Any) -> tuple[Port, Any]:
        title = str(channel.channel_type).split("@")[0]
        is_list = bool(channel.is_artifact_list)
        hint, _ = strip_optional(port.hint)
        accepts_any = hint is Any or port.form != "artifact" or _ANYTHING in (title, port.kind)
        if port.form != "artifact" and hint is not Any and hint is not Path and title != _ANYTHING:
            raise self._clash(port, f"a {title}", "the step that makes it returns another type")
        if not accepts_any and title != port.kind:
            raise self._clash(port, f"a {title}", f"expected is a {port.kind}")
        if port.is_list and not is_list:
            raise self._clash(port, f"one {title}", "collect a list with dsl.Collected")
        if is_list and not port.is_list and hint is not Any and hint is not list:
            raise self._clash(port, f"a list of {title}", f"annotate it list[{port.type_name}]")
        return artifact_port(port, title, is_list), channel

    def _fit_parameter(self, port: Port, channel: Any) -> tuple[Port, Any]:
        found = type_utils.get_parameter_type_name(channel.channel_type)
        hint, _ = strip_optional(port.hint)
        if hint is Any:
            return value_port(port, found), channel
        if port.form == "artifact":
            if hint is Path or found == "STRING":
                return port, _import(channel, port)
            raise self._clash(port, f"a {found}", f"expected is a {port.kind}")
        if found == port.kind:
            return port, channel
        if _is_loop_item(channel) and found == "STRING":
            return dataclasses.replace(port, form="json", kind=found, default=None), channel  # any item, as its JSON
        if (found, port.kind) == ("NUMBER_INTEGER", "NUMBER_DOUBLE") or _is_loop_item(channel):
            return value_port(port, found), channel  # the step converts it
        raise self._clash(port, f"a {found}", f"expected is a {port.kind}")

    def _fit_file(self, port: Port, value: Any) -> tuple[Port, Any]:
        """A constant for an artifact: a path or URI, which an importer brings in."""
        if isinstance(value, str | Path):
            return port, _import(str(value), port)
        advice = "give the output of a step, or the path or URI of a file"
        raise self._clash(port, f"a {type(value).__name__}", advice)

    def _clash(self, port: Port, given: str, advice: str) -> MlfuncsError:
        message = (
            f"argument {port.name!r} of {self.function.spec.name} is {port.type_name} and is given {given}; {advice}"
        )
        return InvalidInput(message, [{"field": port.name, "message": f"{given} given for {port.type_name}"}])

    def _spec_for(self, ports: tuple[Port, ...]) -> structures.ComponentSpec:
        key = tuple(_key(port) for port in ports)
        if key not in self._specs:
            self._specs[key] = structures.ComponentSpec(
                name=self.function.spec.name,
                description=None,
                inputs={port.name: _input_spec(port) for port in ports} or None,
                outputs={port.name: _output_spec(port) for port in self.outputs.values()} or None,
                implementation=structures.Implementation(container=self._container(ports)),
            )
        return self._specs[key]

    def _container(self, ports: tuple[Port, ...]) -> structures.ContainerSpecImplementation:
        arguments = ["--bundle", self.bundle.digest, *self.flags]
        names = ",".join(port.name for port in ports if port.form == "json")
        if names:
            arguments += ["--json", names]
        inline = inline_bundle(self.bundle)
        if inline:
            arguments += ["--inline", inline]
        return structures.ContainerSpecImplementation(
            image=self.function.spec.base_image or base_image(self.settings),
            command=["python3", "-m", MODULE],
            args=[*arguments, "--executor_input", "{{$}}"],
            env={**pod_environment(self.settings), **self.function.spec.env},
        )


class _KfpComponent(base_component.BaseComponent):
    """kfp's own way from a component spec to a task."""

    def execute(self, **kwargs: Any) -> Any:
        raise SpecError("a component runs inside a pipeline; call the decorated function itself instead")


def base_image(settings: Settings) -> str:
    """The image that steps run in: the one set, else this release's function base image in the own registry."""
    prefix = f"{settings.image_registry.rstrip('/')}/" if settings.image_registry and not settings.base_image else ""
    return prefix + settings.resolved_base_image


def pod_environment(settings: Settings) -> dict[str, str]:
    """The variables with which a pod finds and trusts what this project wrote."""
    environment = {
        "MLFUNCS_PROJECT": settings.project,
        "MLFUNCS_HOME": "/tmp/mlfuncs",
        "MLFUNCS_TRUSTED_KEYS": ",".join(filter(None, [project_key(settings).public, settings.trusted_keys])),
    }
    if "://" in settings.artifacts_url:
        environment["MLFUNCS_ARTIFACTS_URL"] = settings.artifacts_url
    return environment


def inline_bundle(bundle: Bundle) -> str:
    """The signed bundle as text for the command line; "" for one that is fetched by digest."""
    if bundle.path.stat().st_size > INLINE_BYTES:
        return ""
    files = {path.name: path for path in sorted(bundle.path.parent.iterdir()) if path.is_file()}
    body = {name: base64.b64encode(path.read_bytes()).decode() for name, path in files.items()}
    return base64.b64encode(json.dumps(body).encode()).decode()


def _apply_options(task: pipeline_task.PipelineTask, function: Function[Any, Any]) -> None:
    """The spec's resources, retries and secrets, as kfp says them."""
    spec = function.spec
    resources = spec.resources
    if resources.cpu is not None:
        task.set_cpu_limit(f"{resources.cpu:g}").set_cpu_request(f"{resources.cpu:g}")
    if resources.memory is not None:
        task.set_memory_limit(resources.memory).set_memory_request(resources.memory)
    if resources.gpu:
        task.set_accelerator_type(resources.gpu_type).set_accelerator_limit(resources.gpu)
    if spec.retries:
        task.set_retry(spec.retries, backoff_duration="1s", backoff_factor=2.0)
    limit = step_timeout_s(spec)
    if limit is not None:
        from kfp import kubernetes

        kubernetes.set_timeout(task, math.ceil(limit))  # whole seconds of the pod's life
    if spec.secrets:
        from kfp import kubernetes

        for name in spec.secrets:
            secret = name.lower().replace("_", "-")
            kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={name: name})


def key_secret(settings: Settings) -> str:
    """The name of the Kubernetes Secret with the key that pods sign with; it need not be there."""
    return f"mlfuncs-signing-{settings.project}"


def _give_key(task: pipeline_task.PipelineTask, settings: Settings) -> None:
    from kfp import kubernetes

    kubernetes.use_secret_as_env(
        task, secret_name=key_secret(settings), secret_key_to_env={"signing.pem": KEY_VARIABLE}, optional=True
    )


def _import(uri: Any, port: Port) -> Any:
    classes = artifact_types._SCHEMA_TITLE_TO_TYPE
    made = importer_node.importer(artifact_uri=uri, artifact_class=classes.get(port.kind, artifact_types.Artifact))
    return made.output


def _is_loop_item(channel: Any) -> bool:
    """kfp guesses the type of a loop's item, and of its parts."""
    return isinstance(channel, kfp_loops.LoopParameterArgument | kfp_loops.LoopArgumentVariable)


def _key(port: Port) -> Any:
    return (port.name, port.form, port.kind, port.is_list)


def _input_spec(port: Port) -> structures.InputSpec:
    if port.form == "artifact":
        kind = f"{port.kind}@{SCHEMA_VERSION}"
        return structures.InputSpec(type=kind, optional=port.optional, is_artifact_list=port.is_list)
    return structures.InputSpec(type=_MEMORY_TYPES[port.kind], default=port.default, optional=port.optional)


def _output_spec(port: Port) -> structures.OutputSpec:
    if port.form == "artifact":
        return structures.OutputSpec(type=f"{port.kind}@{SCHEMA_VERSION}")
    return structures.OutputSpec(type=_MEMORY_TYPES[port.kind])
