"""The decorator: a Python callable that is also a tracked run, an endpoint and a pipeline step."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from mlfuncs import adapters
from mlfuncs.spec import Batch, FunctionSpec, Pod, Resources, Scale, slugify

if TYPE_CHECKING:
    from mlfuncs.bundles.bundle import Bundle
    from mlfuncs.interface.signature import Signature
    from mlfuncs.runs.run import Run
    from mlfuncs.runs.run import Target as RunTarget
    from mlfuncs.runs.sweep import SweepResult
    from mlfuncs.serving.endpoints import Endpoint
    from mlfuncs.triggers import Trigger

P = ParamSpec("P")
R = TypeVar("R")


class _PlainCall:
    """What `function(...)` calls: the user's own callable, so that no frame of ours is in a traceback.

    A descriptor is resolved before the call, and its frame is gone when the user's code runs. While a Kubeflow
    pipeline body is traced, the call makes a pipeline task instead.
    """

    def __get__(self, instance: Function[Any, Any] | None, owner: type) -> Any:
        if instance is None:
            return self
        if "kfp" in sys.modules and adapters.load("pipelines:tracing")():
            return instance.component
        return instance.target


class Function(Generic[P, R]):
    """A decorated callable. Calling it is calling the plain Python function or class it wraps (`target`)."""

    def __init__(self, target: Callable[P, R], spec: FunctionSpec) -> None:
        functools.update_wrapper(self, target, updated=())
        self.target = target
        self.spec = spec
        if inspect.isclass(target):
            from mlfuncs.bundles.pickling import register_class

            register_class(self)

    if TYPE_CHECKING:

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    else:
        __call__ = _PlainCall()

    def __getattr__(self, name: str) -> Any:
        if name in ("target", "spec"):  # not set yet: an unpickler is making the object
            raise AttributeError(name)
        return getattr(self.target, name)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None or inspect.isclass(self.target) else self.target.__get__(instance, owner)

    def __instancecheck__(self, instance: Any) -> bool:
        return inspect.isclass(self.target) and isinstance(instance, self.target)

    def __subclasscheck__(self, subclass: type) -> bool:
        return inspect.isclass(self.target) and issubclass(subclass, self.target)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.target,)

    def __reduce__(self) -> Any:
        from mlfuncs.bundles.pickling import reduce_function

        return reduce_function(self)

    def __repr__(self) -> str:
        return f"<mlfuncs function {self.spec.name!r}{inspect.signature(self.target)}>"

    def _repr_html_(self) -> str:
        from mlfuncs.function_card import function_html

        return function_html(self)

    @property
    def signature(self) -> Signature:
        """The typed interface: JSON Schemas in and out, validation and encoding at the border."""
        from mlfuncs.interface.signature import Signature

        return Signature.of(self.target)

    @property
    def bundle(self) -> Bundle:
        """The function packed with its code, spec and locked requirements; built when first asked for."""
        from mlfuncs.bundles.bundle import build_bundle
        from mlfuncs.settings import read_settings

        return build_bundle(self.target, self.spec, read_settings())

    @property
    def version(self) -> str:
        """The bundle's digest: the same code, closure, spec and locked environment give the same digest anywhere."""
        return self.bundle.digest

    @property
    def component(self) -> Any:
        """The function as a kfp v2 component."""
        return adapters.load("pipelines:component")(self)

    @overload
    def run(self, /, *args: P.args, **kwargs: P.kwargs) -> Run: ...
    @overload
    def run(
        self, /, *args: Any, target: RunTarget, wait: bool = True, timeout_s: float | None = None, **kwargs: Any
    ) -> Run: ...
    def run(self, /, *args: Any, **kwargs: Any) -> Run:
        """Call the function as a tracked run in this process and return the finished run.

        With `target` "docker" or "kubernetes" it runs in a container, or as a Job, and takes `wait` and `timeout_s`
        too; a parameter of the function's own of such a name comes first (`ml.run(function, {...}, target=...)` has
        room for both). Raises RunFailed, from the user's own exception, when it raises.
        `ml.run(function, {...}, isolation="process")` gives it a process of its own, in the function's environment.
        """
        from mlfuncs.runs.run import run_function

        own = inspect.signature(self.target).parameters
        words = ("target", "wait", "timeout_s") if "target" in kwargs and "target" not in own else ()
        options = {word: kwargs.pop(word) for word in words if word in kwargs and word not in own}
        return run_function(self, args, kwargs, **options)

    def with_options(self, **options: Any) -> Function[P, R]:
        """The same callable under a spec with `options` (any argument of `ml.function`) replaced."""
        return Function(self.target, _replace_spec(self.spec, options))

    def sweep(self, **options: Any) -> SweepResult:
        """Run the function over many parameter settings; see `mlfuncs.runs.sweep.sweep`."""
        from mlfuncs.runs.sweep import sweep

        return sweep(self, **options)

    def deploy(self, name: str | None = None, *, target: str = "process", **options: Any) -> Endpoint:
        """Serve the function over HTTP and return its endpoint once it answers; see `mlfuncs.serving.endpoints.deploy`.

        For a class, `options` that are constructor arguments are bound to the one instance each worker makes.
        """
        from mlfuncs.serving.endpoints import deploy

        return deploy(self, name=name, target=target, **options)


@overload
def function(target: Callable[P, R], /) -> Function[P, R]: ...
@overload
def function(
    *,
    name: str | None = None,
    requirements: Sequence[str] | None = None,
    resources: Resources | None = None,
    scale: Scale | None = None,
    batch: Batch | None = None,
    timeout_s: float = 60.0,
    retries: int = 0,
    env: Mapping[str, str] | None = None,
    secrets: Sequence[str] = (),
    features: Sequence[str] = (),
    feature_sample_rate: float = 0.0,
    labels: Mapping[str, str] | None = None,
    pod: Pod | None = None,
    triggers: Sequence[Trigger] = (),
    base_image: str = "",
) -> Callable[[Callable[P, R]], Function[P, R]]: ...
def function(target: Any = None, /, **options: Any) -> Any:
    """Make a function or class deployable, runnable and chainable; see the README for the whole of it.

    >>> @function
    ... def double(x: float) -> float:
    ...     return 2 * x
    >>> double(4)
    8

    Raises SpecError for an option that cannot be right, SignatureError for a signature with no interface.
    """
    if target is None:
        return lambda decorated: function_of(decorated, **options)
    return function_of(target, **options)


def function_of(target: Any, **options: Any) -> Function[Any, Any]:
    """`target` (a function, class, or Function) as a Function, under `options` of `ml.function`."""
    from mlfuncs.interface.signature import check_signature

    if isinstance(target, Function):
        return target.with_options(**options) if options else target
    check_signature(target)
    return Function(target, _replace_spec(FunctionSpec(name=slugify(_name_of(target))), options))


def _name_of(target: Any) -> str:
    """What `target` is called; a lambda is called as the one variable of its module that holds it, else "lambda"."""
    name = str(getattr(target, "__name__", type(target).__name__))
    if name != "<lambda>":
        return name
    held = [key for key, value in target.__globals__.items() if value is target and not key.startswith("_")]
    return held[0] if len(held) == 1 else "lambda"


def _replace_spec(spec: FunctionSpec, options: Mapping[str, Any]) -> FunctionSpec:
    import dataclasses

    from mlfuncs.errors import SpecError, did_you_mean

    known = [field.name for field in dataclasses.fields(FunctionSpec)]
    for key in options:
        if key not in known:
            near = did_you_mean(key, known)
            raise SpecError(f"unknown option {key!r} of ml.function{near}; known: {', '.join(sorted(known))}")
    return dataclasses.replace(spec, **{key: value for key, value in options.items() if value is not None})
