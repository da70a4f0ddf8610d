"""Decorated functions as kfp v2 components, and the question whether a pipeline body is being traced."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfuncs.decorator import Function

_KFP_CONTEXT = "kfp.dsl.pipeline_context"


def is_tracing() -> bool:
    """Whether kfp is tracing a pipeline body now; asked on every plain call, so it must stay cheap."""
    context = sys.modules.get(_KFP_CONTEXT)
    return context is not None and context.Pipeline._default_pipeline is not None


def to_component(function: Function[Any, Any]) -> Any:
    """`function` as a kfp v2 component: calling it inside a pipeline body makes a task.

    While one pipeline is traced, a function is packed once. Raises SignatureError or BundleError.
    """
    from mlfuncs_pipelines.function_component import FunctionComponent

    context = sys.modules.get(_KFP_CONTEXT)
    traced = context.Pipeline._default_pipeline if context is not None else None
    if traced is None:
        return FunctionComponent(function)
    made: dict[int, Any] = traced.__dict__.setdefault("_mlfuncs_components", {})
    if id(function) not in made:
        made[id(function)] = FunctionComponent(function)
    return made[id(function)]
