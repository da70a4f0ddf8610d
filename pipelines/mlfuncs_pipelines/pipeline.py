"""`@ml.pipeline`: kfp's own DSL around decorated functions; run here, compile, submit, schedule."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from mlfuncs.errors import InvalidInput, MlfuncsError, SpecError, StorageError
from mlfuncs.spec import slugify
from mlfuncs_pipelines.components import is_tracing

if TYPE_CHECKING:
    from mlfuncs_pipelines.ir import Pipeline as IrPipeline
    from mlfuncs_pipelines.kubeflow import KubeflowRun, Schedule
    from mlfuncs_pipelines.local_run import LocalRun

_NATIVE = {
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "STRING": str,
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


_RUN_OPTIONS = ("parallel", "cache", "ignore", "containers", "resume")


class Pipeline:
    """A pipeline body and its name. Calling it inside another pipeline's body nests it there."""

    def __init__(self, body: Callable[..., Any], name: str = "", description: str = "", **options: Any) -> None:
        functools.update_wrapper(self, body)
        self.body = body
        self.name = name or slugify(body.__name__)
        self.description = description or inspect.getdoc(body) or ""
        self._options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A task of the pipeline around it. Raises SpecError outside of one, where `run` is what is meant."""
        if not is_tracing():
            raise SpecError(
                f"pipeline {self.name} is not called but run: {self.name}.run(...), .compile(path), .submit()"
            )
        with _suspended():
            component = self.component
        signature = inspect.signature(self.body)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as exc:
            raise InvalidInput(f"pipeline {self.name}: {exc}") from None
        return component(**bound.arguments)

    def __repr__(self) -> str:
        return f"<mlfuncs pipeline {self.name!r}{inspect.signature(self.body)}>"

    @property
    def component(self) -> Any:
        """The pipeline as kfp's graph component, traced anew."""
        from kfp import dsl

        from mlfuncs_pipelines.tracing import kfp_body

        try:
            body = kfp_body(self.body, self.name)
            return dsl.pipeline(name=self.name, description=self.description or None, **self._options)(body)
        except MlfuncsError:
            raise
        except Exception as exc:
            raise SpecError(f"pipeline {self.name} cannot be compiled: {_reason(exc, self.body)}") from exc

    @property
    def ir(self) -> IrPipeline:
        """The compiled pipeline, checked. Raises InvalidPipeline with every problem."""
        from google.protobuf import json_format

        from mlfuncs_pipelines.ir import Pipeline as IrPipeline
        from mlfuncs_pipelines.ir_shape import Problem, canonical
        from mlfuncs_pipelines.references import check_references
        from mlfuncs_pipelines.validate import require_runnable

        component = self.component
        problems: list[Problem] = []
        spec = canonical(json_format.MessageToDict(component.pipeline_spec), "PipelineSpec", "", problems)
        platform = canonical(json_format.MessageToDict(component.platform_spec), "PlatformSpec", "", problems)
        pipeline = IrPipeline.of(spec, platform)
        return require_runnable(pipeline, [*problems, *check_references(pipeline)], f"pipeline {self.name}")

    def run(
        self,
        *,
        parallel: int | None = None,
        cache: bool = True,
        ignore: Sequence[str] = (),
        containers: str = "docker",
        resume: str = "",
        **params: Any,
    ) -> LocalRun:
        """Run on this machine and return the finished run.

        `parallel` steps at once; results of equal steps are reused unless `cache` is False, inputs named in `ignore`
        do not count for that; `resume` is the id of an earlier run of this pipeline to go on with, parameters and all:
        steps that failed or have changed since run, the others keep their results.
        Raises RunFailed when a step fails, SpecError for an option that cannot be, Conflict for a run to resume that
        still runs or was given other parameters.
        """
        from mlfuncs_pipelines.engine import Options
        from mlfuncs_pipelines.local_run import run_here

        given = self._encode(params, _RUN_OPTIONS)
        if isinstance(ignore, str):
            raise SpecError(f"ignore must be a list of inputs, not {ignore!r}; write ignore=[{ignore!r}]")
        return run_here(self, given, Options(parallel, cache, frozenset(ignore), containers), resume)

    def _repr_html_(self) -> str:
        from mlfuncs_pipelines.drawing import graph_svg

        return graph_svg(self.ir)

    def compile(self, path: str | Path) -> Path:
        """Write the pipeline as an IR YAML file, the same bytes for the same code, and return its path."""
        from kfp import compiler

        target = Path(path)
        component = self.component
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            compiler.Compiler().compile(component, str(target))
        except (OSError, ValueError) as exc:  # kfp's ValueError is about the name: a file ends in .yaml or .json
            reason = getattr(exc, "strerror", None) or exc
            raise StorageError(f"the pipeline cannot be written to {str(target)!r}: {reason}") from exc
        return target

    def submit(self, *, host: str = "", experiment: str = "Default", **params: Any) -> KubeflowRun:
        """Run on Kubeflow Pipelines and return the started run. `host` defaults to the setting kubeflow_host."""
        from mlfuncs_pipelines.kubeflow import submit

        return submit(self, self._encode(params, ("host", "experiment")), host=host, experiment=experiment)

    def schedule(self, cron: str, *, host: str = "", experiment: str = "Default", **params: Any) -> Schedule:
        """Run on Kubeflow Pipelines at the times of `cron` (five or six fields) and return the schedule."""
        from mlfuncs_pipelines.kubeflow import schedule

        given = self._encode(params, ("cron", "host", "experiment"))
        return schedule(self, cron, given, host=host, experiment=experiment)

    def _encode(self, params: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
        """The run's parameters as JSON. Raises InvalidInput, SpecError for one that is named like one of `options`."""
        from mlfuncs_pipelines.ports import encode_constant
        from mlfuncs_pipelines.tracing import pipeline_ports

        ports = pipeline_ports(self.body, self.name)
        hidden = [option for option in options if option in ports]
        if hidden:
            raise SpecError(
                f"pipeline {self.name} has a parameter {hidden[0]!r}, which is an option of this call; rename it, or "
                f"compile the pipeline and run the file: mlfuncs pipeline run {self.name}.yaml --param {hidden[0]}=..."
            )
        unknown = sorted(set(params) - set(ports))
        if unknown:
            known = ", ".join(ports) or "none"
            raise InvalidInput(f"pipeline {self.name} has no parameter {unknown[0]!r}; its parameters: {known}")
        return {name: value if value is None else encode_constant(ports[name], value) for name, value in params.items()}


@overload
def pipeline(body: Callable[..., Any], /) -> Pipeline: ...
@overload
def pipeline(
    *, name: str = "", description: str = "", pipeline_root: str | None = None, pipeline_config: Any = None
) -> Callable[[Callable[..., Any]], Pipeline]: ...
def pipeline(body: Any = None, /, **options: Any) -> Any:
    """Make a pipeline of a function that calls decorated functions and kfp components.

    >>> @pipeline
    ... def churn(days: int = 30): ...
    >>> churn.name
    'churn'
    """
    if body is None:
        return lambda decorated: pipeline(decorated, **options)
    given = {key: value for key, value in options.items() if value is not None}
    return Pipeline(body, **given)


@contextmanager
def _suspended() -> Iterator[None]:
    """No pipeline is being traced while the block runs, so that kfp can trace another one inside."""
    from kfp.dsl import pipeline_context, pipeline_task

    outer = pipeline_context.Pipeline._default_pipeline
    handler = pipeline_task.PipelineTask._register_task_handler
    pipeline_context.Pipeline._default_pipeline = None
    try:
        yield
    finally:
        pipeline_context.Pipeline._default_pipeline = outer
        pipeline_task.PipelineTask._register_task_handler = handler


def _reason(exc: Exception, body: Callable[..., Any]) -> str:
    """What went wrong, and the line of the body where it did."""
    frames = traceback.extract_tb(exc.__traceback__)
    lines = [frame for frame in frames if frame.filename == body.__code__.co_filename]
    place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno}: {lines[-1].line})" if lines else ""
    kind = "" if isinstance(exc, ValueError | RuntimeError) else f"{type(exc).__name__}: "
    return f"{kind}{exc}{place}"
