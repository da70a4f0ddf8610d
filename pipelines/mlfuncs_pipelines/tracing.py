"""A pipeline body made readable for kfp: its parameters and results in the types that kfp's own parser knows."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from mlfuncs.errors import SpecError
from mlfuncs.interface.hints import resolved_hints
from mlfuncs_pipelines.ports import Port, classify, encode_constant, output_port, strip_optional

_NATIVE: dict[str, Any] = {
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "STRING": str,
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}
_FROM_DEFAULT = (bool, int, float, str, list, dict)


def pipeline_ports(body: Callable[..., Any], name: str) -> dict[str, Port]:
    """The pipeline's parameters. Raises SpecError for a type that no parameter can have."""
    hints = resolved_hints(body)
    return {
        parameter.name: _parameter_port(parameter, hints.get(parameter.name, Any), name)
        for parameter in inspect.signature(body).parameters.values()
    }


def kfp_body(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`body` under annotations that kfp reads. A result without an annotation gets the type of what is returned."""
    ports = pipeline_ports(body, name)
    parameters = [_kfp_parameter(port) for port in ports.values()]
    hints = resolved_hints(body)
    returns = _kfp_return(hints["return"]) if hints.get("return") not in (None, type(None)) else None
    if returns is None and "return" not in hints:
        returns = _traced_return(body, parameters, name)

    @functools.wraps(body)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _no_plain_conditions(name):
            result = _channel(body(*args, **kwargs))
        return result if returns is not None else None

    del wrapped.__wrapped__  # kfp would look through to the body's own annotations
    return _annotate(wrapped, parameters, returns)


@contextmanager
def _no_plain_conditions(name: str) -> Iterator[None]:
    """Refuse `if x > 3:` in a body: kfp's comparison of a value that is not known yet is always true."""
    from kfp.dsl import pipeline_channel

    def refuse(operation: Any) -> bool:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("kfp."):
            return True  # kfp compares its channels for its own ends
        left = getattr(operation.left_operand, "name", operation.left_operand)
        raise SpecError(
            f"pipeline {name}: a plain `if` cannot look at {left!r}, which is not known before the pipeline runs: "
            "write `with dsl.If(...)` (`from kfp import dsl`)"
        )

    compared: Any = pipeline_channel.ConditionOperation
    before = compared.__dict__.get("__bool__")
    compared.__bool__ = refuse
    try:
        yield
    finally:
        if before is None:
            del compared.__bool__
        else:
            compared.__bool__ = before


def _annotate(function: Any, parameters: list[inspect.Parameter], returns: Any) -> Any:
    empty = inspect.Signature.empty
    function.__signature__ = inspect.Signature(parameters, return_annotation=empty if returns is None else returns)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    if returns is not None:
        function.__annotations__["return"] = returns
    return function


def _parameter_port(parameter: inspect.Parameter, hint: Any, name: str) -> Port:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise SpecError(f"pipeline {name}: *{parameter.name} cannot be a parameter; name each one")
    if hint is Any:
        default = parameter.default
        hint = next((kind for kind in _FROM_DEFAULT if type(default) is kind), str)
    inner, optional = strip_optional(hint)
    form, kind = classify(inner)
    if form == "artifact":
        raise SpecError(
            f"pipeline {name}: parameter {parameter.name!r} is {getattr(inner, '__name__', inner)}, and a pipeline "
            "takes plain values only: take the path or URI as text and read it in the first step"
        )
    port = Port(parameter.name, hint, form, kind, optional=optional)
    if parameter.default is inspect.Parameter.empty:
        return port
    default = None if parameter.default is None else encode_constant(port, parameter.default)
    return Port(parameter.name, hint, form, kind, optional=True, default=default)


def _kfp_parameter(port: Port) -> inspect.Parameter:
    annotation = _NATIVE[port.kind]
    nullable = port.optional and port.default is None
    return inspect.Parameter(
        port.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=port.default if port.optional else inspect.Parameter.empty,
        annotation=typing.Optional[annotation] if nullable else annotation,  # noqa: UP045 - kfp reads this one only
    )


def _kfp_return(hint: Any) -> Any:
    """The return annotation in kfp's types: a native type, an artifact class, or a NamedTuple of them."""
    if inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint)
        return NamedTuple(hint.__name__, [(field, _kfp_type(hints.get(field, Any))) for field in hint._fields])
    return _kfp_type(hint)


def _kfp_type(hint: Any) -> Any:
    from kfp.dsl.types import artifact_types

    if hasattr(hint, "schema_title"):
        return hint
    port = output_port("Output", hint)
    if port.form != "artifact":
        return _NATIVE[port.kind]
    return artifact_types._SCHEMA_TITLE_TO_TYPE.get(port.kind, artifact_types.Artifact)


def _traced_return(body: Callable[..., Any], parameters: list[inspect.Parameter], name: str) -> Any:
    """The type of what a body without a return annotation gives back, found by tracing it once."""
    from kfp.dsl import pipeline_channel, pipeline_context
    from kfp.dsl.types import artifact_types, type_utils

    channels = {
        parameter.name: pipeline_channel.create_pipeline_channel(
            name=parameter.name,
            channel_type=type_utils.get_canonical_type_name_for_type(_plain(parameter.annotation)),
        )
        for parameter in parameters
    }
    with pipeline_context.Pipeline(name), _no_plain_conditions(name):
        result = _channel(body(**channels))
    if result is None:
        return None
    if not isinstance(result, pipeline_channel.PipelineChannel):
        raise SpecError(f"pipeline {name} returns {result!r}; return the output of a step, or annotate a NamedTuple")
    if isinstance(result, pipeline_channel.PipelineArtifactChannel):
        title = str(result.channel_type).split("@")[0]
        return artifact_types._SCHEMA_TITLE_TO_TYPE.get(title, artifact_types.Artifact)
    return _NATIVE[type_utils.get_parameter_type_name(result.channel_type)]


def _channel(result: Any) -> Any:
    """What kfp takes as a pipeline's result: a task stands for its only output."""
    from kfp.dsl import pipeline_task

    if isinstance(result, pipeline_task.PipelineTask):
        return result.output
    if isinstance(result, tuple) and hasattr(result, "_make"):
        return result._make(_channel(value) for value in result)
    return result


def _plain(annotation: Any) -> Any:
    return strip_optional(annotation)[0]
