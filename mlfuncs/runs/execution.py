"""Calling the user's function as a run: its context, its limits measured, its end described."""

from __future__ import annotations

import inspect
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from mlfuncs.errors import InvalidInput
from mlfuncs.interface.signature import function_kind
from mlfuncs.runs.outputs import encode_outputs
from mlfuncs.runs.tracking import ActiveRun, activate
from mlfuncs.runs.usage import Meter
from mlfuncs.spec import FunctionSpec


@dataclass(frozen=True)
class Outcome:
    """How a call ended. `final` is what a run's journal keeps; `raised` the exception, its traceback the user's own."""

    final: dict[str, Any]
    raised: BaseException | None = None


def execute(target: Any, values: Mapping[str, Any], returns: Any, spec: FunctionSpec, run: ActiveRun) -> Outcome:
    """Call `target` with `values` as `run`; whatever it raises becomes the outcome."""
    meter, started_at = Meter(), time.time()
    raised: BaseException | None = None
    outputs: dict[str, Any] = {}
    with activate(run), _environment(spec.env):
        try:
            outputs = encode_outputs(invoke(target, values), returns, run)
        except BaseException as exc:  # noqa: BLE001 - a user's function may raise anything, SystemExit included
            raised = exc.with_traceback(_users_part(exc.__traceback__))
    used = meter.read()
    final = {
        "status": _status(raised),
        "error": None if raised is None else describe_error(raised, run.secrets),
        "started_at": started_at,
        "finished_at": time.time(),
        "cpu_s": used.cpu_s,
        "peak_memory_mib": used.peak_memory_mib,
        "outputs": outputs,
    }
    return Outcome(final, raised)


def invoke(target: Any, values: Mapping[str, Any]) -> Any:
    """The result of a function, of a class's instance made without arguments, or of a coroutine function.

    What a generator yields comes back as a list: the call is over when the last item is there.
    """
    kind = function_kind(target)
    if kind == "nuclio":
        raise InvalidInput(f"{target.__name__} is a Nuclio handler, which has no parameters to run with: deploy it")
    if kind == "class":
        _check_constructor(target)
        target = target()
    result = target(**values)
    if inspect.isawaitable(result):
        result = _run_coroutine(result)
    if inspect.isasyncgen(result):
        return _run_coroutine(_collect(result))
    return list(result) if inspect.isgenerator(result) else result


async def _collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def describe_error(error: BaseException, secrets: Mapping[str, str]) -> dict[str, str]:
    """Type, message and traceback of an exception as text, secret values masked."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    message = "" if isinstance(error, KeyboardInterrupt) else str(error)
    if isinstance(error, SystemExit):
        message = f"the function ended the process with exit code {error.code!r}; return a value instead"
    if isinstance(error, KeyboardInterrupt):
        message = "it was interrupted"
    if secrets:
        from mlfuncs.secrets import Redactor

        redactor = Redactor(secrets.values())
        text, message = redactor.text(text), redactor.text(message)
    return {"type": type(error).__name__, "message": message, "traceback": text}


def _status(raised: BaseException | None) -> str:
    if raised is None:
        return "succeeded"
    return "cancelled" if isinstance(raised, KeyboardInterrupt) else "failed"


def _check_constructor(target: type) -> None:
    for parameter in inspect.signature(target).parameters.values():
        if parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise InvalidInput(
                f"{target.__name__} needs the constructor argument {parameter.name!r}, and a run makes the instance "
                "without arguments: give it a default, or deploy the class with it"
            )


def _run_coroutine(awaitable: Awaitable[Any]) -> Any:
    import asyncio  # a tenth of the memory of a warm process, each page of which a fork costs

    async def main() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    return _in_thread(main)


def _in_thread(main: Any) -> Any:
    """Run a coroutine on a loop of its own while this thread's loop (a notebook's) is busy calling us."""
    import asyncio
    import contextvars

    result: list[Any] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            result.append(asyncio.run(main()))
        except BaseException as exc:  # noqa: BLE001 - raised again below, in the caller's thread
            raised.append(exc)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return result[0]


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the user's first frame on; whole when no frame is the user's."""
    part = trace
    while part is not None and part.tb_frame.f_code.co_filename == __file__:
        part = part.tb_next
    return part if part is not None else trace


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """The spec's variables in the environment while the block runs."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
