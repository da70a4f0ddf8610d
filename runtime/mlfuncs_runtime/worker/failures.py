"""What a caller is told when the user's code raises: the request id, and nothing of the code; the log has the rest."""

from __future__ import annotations

import logging
import os
from types import TracebackType

from mlfuncs.errors import DeadlineExceeded, HandlerFailed, InvalidInput, MlfuncsError, Overloaded, Unavailable

log = logging.getLogger("mlfuncs.worker")
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PASSED_ON = (InvalidInput, Overloaded, Unavailable, DeadlineExceeded)


class ChosenStatus(Exception):
    """The user's code chose its own status, by raising something like FastAPI's or Starlette's HTTPException."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


def handler_failure(exc: BaseException) -> Exception:
    """The error to answer with when the user's code raised `exc`; logs the traceback from the user's first frame on.

    InvalidInput, Overloaded, Unavailable and DeadlineExceeded are the code's own answer and pass unchanged, as does an
    exception with `status_code` and `detail`. Everything else is one of our faults or a plain 500.
    """
    if isinstance(exc, _PASSED_ON):
        return exc
    status = getattr(exc, "status_code", None)
    if isinstance(status, int) and 400 <= status <= 599 and hasattr(exc, "detail"):
        return ChosenStatus(status, str(exc.detail))
    trace = _users_part(exc.__traceback__)
    if isinstance(exc, MemoryError):
        log.error("out of memory in the function", exc_info=(type(exc), exc, trace))
        return HandlerFailed("the function ran out of memory; raise resources.memory or send less at once")
    log.error("the function raised %s", type(exc).__name__, exc_info=(type(exc), exc, trace))
    return HandlerFailed("the function raised an error; the request id finds its traceback in the endpoint's log")


def internal_failure(exc: BaseException) -> MlfuncsError:
    """The error to answer with when the worker itself failed; logs the whole traceback."""
    if isinstance(exc, MlfuncsError):
        return exc
    log.error("the worker failed to answer", exc_info=exc)
    return HandlerFailed("the worker failed to answer; the request id finds the traceback in the endpoint's log")


def bad_result(name: str, exc: MlfuncsError) -> HandlerFailed:
    """The error for a result that is not what the function's hints promise: the function's fault, not the caller's."""
    fields = "; ".join(f"{field['field']}: {field['message']}" for field in getattr(exc, "fields", ()))
    log.error("%s returned a value that its return hint does not allow: %s", name, fields or exc)
    return HandlerFailed(f"{name} returned a value that its return hint does not allow; the log names it")


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without this package's own frames at its head."""
    start = trace
    while start is not None and start.tb_frame.f_code.co_filename.startswith(_OURS):
        start = start.tb_next
    return start or trace
