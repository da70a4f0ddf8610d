"""The user's callable made ready to serve: constructed, classified, and warmed when it says how."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from mlfuncs.decorator import Function
from mlfuncs.errors import InvalidInput, SpecError

if TYPE_CHECKING:
    from mlfuncs.interface.signature import Signature

Kind = Literal["function", "class", "nuclio"]
Style = Literal["sync", "async", "stream", "async_stream"]


@dataclass(frozen=True)
class Handler:
    """What answers requests. `call` takes named values; a Nuclio handler takes (context, event)."""

    kind: Kind
    style: Style
    call: Callable[..., Any]
    signature: Signature
    owner: Any  # the instance of a class, else the function: where `warmup` and `app` are looked up
    name: str

    def warm(self) -> Awaitable[None] | None:
        """Run the owner's own `warmup()` when it has one; an async one is returned, to be awaited on the server's loop.

        A handler without one is never called with made-up values: it may charge a card or write a row. The validators
        and encoders around it are built here in any case.
        """
        if self.kind != "nuclio":
            with contextlib.suppress(InvalidInput):
                self.signature.validate_json(b"{}")
            if not self.style.endswith("stream"):
                self.signature.output_schema()
        warmup = getattr(self.owner, "warmup", None)
        result = warmup() if callable(warmup) else None
        return result if inspect.isawaitable(result) else None

    @property
    def user_app(self) -> Any:
        """The ASGI application (FastAPI's, say) under the owner's `app`, for paths of the user's own; or None."""
        app = getattr(self.owner, "app", None)
        return app if callable(app) and not isinstance(app, type) else None


def make_handler(target: Any, init_args: Mapping[str, Any] | None = None) -> Handler:
    """The handler for a function, class or Nuclio handler; a class is constructed here with `init_args`.

    Raises SpecError when `init_args` do not fit, SignatureError when the signature has no interface.
    """
    from mlfuncs.interface.signature import Signature, function_kind

    target = target.target if isinstance(target, Function) else target
    kind = function_kind(target)
    name = getattr(target, "__name__", type(target).__name__)
    signature = Signature.of(target)
    if kind == "class":
        owner = _construct(target, dict(init_args or {}))
        return Handler("class", _style(owner.__call__), owner.__call__, signature, owner, name)
    if init_args:
        raise SpecError(f"{name!r} is a function: it takes no constructor argument {sorted(init_args)[0]!r}")
    call = target
    if not inspect.isroutine(target) and hasattr(target, "__call__"):  # noqa: B004 - an instance used as a function
        call = target.__call__
    return Handler("nuclio" if kind == "nuclio" else "function", _style(call), call, signature, target, name)


def _construct(target: type, init_args: dict[str, Any]) -> Any:
    try:
        inspect.signature(target).bind(**init_args)
    except TypeError as exc:
        raise SpecError(f"{target.__name__}'s constructor does not take the arguments bound at deploy: {exc}") from exc
    return target(**init_args)


def _style(call: Callable[..., Any]) -> Style:
    inner = inspect.unwrap(call)
    if inspect.isasyncgenfunction(inner):
        return "async_stream"
    if inspect.isgeneratorfunction(inner):
        return "stream"
    return "async" if inspect.iscoroutinefunction(inner) else "sync"


def item_type(handler: Handler) -> Any:
    """The T of a streaming handler's `Iterator[T]`; Any when the hint does not say."""
    returns = handler.signature.returns
    origin = get_origin(returns)
    is_stream = inspect.isclass(origin) and issubclass(origin, Iterable | AsyncIterable)
    return get_args(returns)[0] if is_stream and get_args(returns) else Any


class ItemSignature:
    """A streaming handler's signature with one item in the place of its whole result."""

    def __init__(self, handler: Handler) -> None:
        from mlfuncs.interface.validation import Writer

        self._signature = handler.signature
        self._writer = Writer(f"one item of {handler.name}", item_type(handler))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._signature, name)

    def output_schema(self) -> dict[str, Any]:
        """The JSON Schema of one item: the T of `Iterator[T]`, else any value."""
        return dict(self._writer.schema)

    def dump_json(self, value: Any) -> bytes:
        """One item as JSON. Raises InvalidInput when it is of another type."""
        return self._writer.write(value)
