"""What a function says about itself while it runs: `log_metric`, `log_params`, `log_artifact`.

The run is found by context. Threads that the function starts belong to it as long as it is the only run of this
process; with several at once, start threads with `contextvars.copy_context().run`.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from mlfuncs.errors import Conflict, InvalidInput
from mlfuncs.runs.journal import ARTIFACT, METRIC, PARAMS, Journal

if TYPE_CHECKING:
    from mlfuncs.runs.values import Artifact
    from mlfuncs.settings import Settings


class ActiveRun:
    """A run that this process executes: where it logs to, under which settings and secrets."""

    def __init__(self, run_id: str, settings: Settings, journal: Journal, secrets: Mapping[str, str]) -> None:
        self.id = run_id
        self.settings = settings
        self.journal = journal
        self.secrets = dict(secrets)
        self.open = True


NAME_CHARACTERS = 500  # PostgreSQL indexes at most 2,704 bytes
_STEPS = 2**63  # what databases take as a whole number
_current: ContextVar[ActiveRun | None] = ContextVar("mlfuncs_run", default=None)
_active: dict[str, ActiveRun] = {}
_lock = threading.Lock()


def log_metric(name: str, value: SupportsFloat, step: SupportsIndex | None = None) -> None:
    """Keep a number under `name`, at `step` when there are several. Inside a run only.

    Returns at once; once it has returned, the value survives even the death of the process. Raises Conflict outside a
    run, InvalidInput for a value that is no number.
    """
    run = _require_run("log_metric")
    if type(value) is not float:
        value = _as_float(name, value)
    if step is not None:
        step = _as_step(name, step)
    run.journal.append(METRIC, _as_name("metric", name, run), value, step, time.time())


def log_params(params: Mapping[str, Any]) -> None:
    """Keep more parameters of the run, beside the function's own arguments. Inside a run only."""
    from mlfuncs.runs.values import describe

    run = _require_run("log_params")
    if not isinstance(params, Mapping):
        raise InvalidInput(f"log_params takes a dict of names and values, not {type(params).__name__}")
    shown = {_as_name("parameter", name, run): describe(value, run.secrets) for name, value in params.items()}
    run.journal.append(PARAMS, shown)


def log_artifact(name: str, value: Any) -> Artifact:
    """Store any value (table, figure, model, HTML, file path, ...) with the run and return its handle.

    Inside a run only. Raises ArtifactError when the value has no stored form.
    """
    from mlfuncs.runs.values import Artifact, masked_document, open_store

    run = _require_run("log_artifact")
    ref = open_store(run.settings).put(value)
    document = masked_document({"artifact": ref.to_dict()}, run.secrets)
    run.journal.append(ARTIFACT, "logged", _as_name("artifact", name, run), document)
    return Artifact(ref, run.settings)


def current_run() -> ActiveRun | None:
    """The run that this code belongs to, or None."""
    run = _current.get()
    if run is not None and run.open:
        return run
    with _lock:
        return next(iter(_active.values())) if len(_active) == 1 else None


@contextmanager
def activate(run: ActiveRun) -> Iterator[None]:
    """Make `run` the one that code in this context logs to, until the block ends."""
    with _lock:
        _active[run.id] = run
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)
        run.open = False
        with _lock:
            del _active[run.id]


def enclosing_run() -> ActiveRun | None:
    """The run whose context this is, not guessed from being the only one; the parent of a run started here."""
    run = _current.get()
    return run if run is not None and run.open else None


def _require_run(what: str) -> ActiveRun:
    run = current_run()
    if run is None:
        with _lock:
            several = len(_active)
        if several:
            raise Conflict(
                f"{what} cannot tell which of {several} runs this thread belongs to: start it with "
                "contextvars.copy_context().run"
            )
        raise Conflict(
            f"{what} was called outside a run: call it inside a function, and start the function with .run(...)"
        )
    return run


def _as_name(kind: str, name: Any, run: ActiveRun) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidInput(f"the name of a {kind} must be text that is not empty, not {name!r}")
    if not is_name(name):
        raise InvalidInput(
            f"the name of a {kind} must be at most {NAME_CHARACTERS} characters of Unicode without NUL, not "
            f"{name[:80]!r} ({len(name)} characters)"
        )
    if run.secrets:
        from mlfuncs.runs.values import masked

        return str(masked(name, run.secrets))
    return name


def is_name(text: str) -> bool:
    """Whether every database takes `text` as a name: not too long for an index, no NUL, no half of a surrogate pair."""
    if text.isascii():  # quick: names of metrics are checked at every call
        return len(text) <= NAME_CHARACTERS and "\0" not in text
    return len(text) <= NAME_CHARACTERS and not any(mark == "\0" or "\ud800" <= mark <= "\udfff" for mark in text)


def _as_float(name: str, value: Any) -> float:
    if not isinstance(value, str | bytes):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass  # said below
    raise InvalidInput(f"metric {name!r} must be a number, not {type(value).__name__} {str(value)[:80]!r}")


def _as_step(name: str, step: Any) -> int:
    try:
        whole = operator.index(step)
    except TypeError:
        raise InvalidInput(f"the step of metric {name!r} must be a whole number, not {step!r}") from None
    if not -_STEPS <= whole < _STEPS:
        raise InvalidInput(f"the step of metric {name!r} must be between -2**63 and 2**63 - 1, not {whole}")
    return whole
