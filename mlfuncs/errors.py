"""Every error that mlfuncs raises on purpose, as one tree.

    MlfuncsError                    500  the root: catch this to catch all of ours
    ├── InvalidInput                422  a value does not fit its declared type (`fields` names where)
    ├── SpecError                   400  a definition (function, view, pipeline, setting) cannot be right
    │   └── SignatureError          400  a function's signature cannot become an interface
    ├── NotFound                    404  nothing has that name (`near` lists names that are close)
    ├── Conflict                    409  the name is taken, or the state does not allow the change
    ├── Unauthorized                401  no token, or a wrong one
    ├── Forbidden                   403  the caller is known and may not do this
    ├── TooLarge                    413  a body, header or message is over its bound
    ├── Overloaded                  429  over a limit now; try again after `retry_after_s`
    ├── Unavailable                 503  a part is away; try again after `retry_after_s`
    │   └── RegistryUnavailable     503  the registry's database does not answer
    ├── DeadlineExceeded            504  the time allowed is over
    ├── UntrustedError              403  a digest or signature does not check out; nothing was loaded
    ├── BundleError                 400  the function cannot be packed or unpacked
    ├── EnvironmentFailed           500  requirements cannot be resolved or installed
    ├── ArtifactError               500  a value cannot be stored or read back
    ├── MissingExtra                501  an optional part is not installed
    ├── SecretMissing               500  a named secret has no value here
    ├── SchemaTooNew                409  the registry was written by a newer mlfuncs
    ├── StorageError                500  a directory or file cannot be read or written
    ├── HandlerFailed               500  a served function raised; the request id finds the traceback in the log
    ├── RunFailed                   500  a tracked run raised; carries the run's id
    └── DeployFailed                500  a revision did not become ready; the old one still serves

A message says what happened, names the offending value, and says how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar


class MlfuncsError(Exception):
    """The root of all errors raised on purpose; `status` is the HTTP status it maps to."""

    status: ClassVar[int] = 500

    def __reduce__(self) -> Any:
        """Rebuilt without its constructor, which may make the message of other arguments than the ones pickle has."""
        return rebuild, (type(self), self.args, self.__dict__)

    @property
    def title(self) -> str:
        """The error's class name, as the `title` of an RFC 9457 problem document."""
        return type(self).__name__

    def to_problem(self, request_id: str | None = None) -> dict[str, Any]:
        """An RFC 9457 problem document: title, status, detail, and the request id when there is one."""
        problem: dict[str, Any] = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": str(self),
        }
        if request_id:
            problem["request_id"] = request_id
        return problem


def rebuild(kind: type[MlfuncsError], args: tuple[Any, ...], state: Mapping[str, Any]) -> MlfuncsError:
    """The error that another process raised (a pool's worker, an endpoint), its message as it was there."""
    error: MlfuncsError = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidInput(MlfuncsError):
    """A value does not fit its declared type; `fields` is a list of {"field", "message"} in input order."""

    status = 422

    def __init__(self, message: str, fields: Iterable[dict[str, str]] = ()) -> None:
        super().__init__(message)
        self.fields = list(fields)

    def to_problem(self, request_id: str | None = None) -> dict[str, Any]:
        return {**super().to_problem(request_id), "errors": self.fields}


class SpecError(MlfuncsError):
    """A definition (function, view, pipeline or setting) cannot be right."""

    status = 400


class SignatureError(SpecError):
    """A function's signature cannot become an interface."""


class NotFound(MlfuncsError):
    """Nothing has that name; `near` lists the known names that are close to it."""

    status = 404

    def __init__(self, kind: str, name: str, known: Iterable[str] = (), hint: str = "") -> None:
        known = list(known)
        self.kind, self.name = kind, name
        self.near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        others = f"; known: {', '.join(sorted(known)[:10])}" if known else ""
        super().__init__(f"no {kind} is named {name!r}{did_you_mean(name, known) or others} {hint}".strip())

    def to_problem(self, request_id: str | None = None) -> dict[str, Any]:
        return {**super().to_problem(request_id), "near": self.near}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name goes on with: the names that are close to it; empty when none is.

    >>> did_you_mean("scal", ["scale", "batch"]), did_you_mean("x", ["scale", "batch"])
    ("; did you mean 'scale'?", '')
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else ""


class Conflict(MlfuncsError):
    """The name is taken, or the present state does not allow the change."""

    status = 409


class Unauthorized(MlfuncsError):
    """No token came with the request, or a wrong one."""

    status = 401


class Forbidden(MlfuncsError):
    """The caller is known and may not do this."""

    status = 403


class TooLarge(MlfuncsError):
    """A body, header or message is over its bound."""

    status = 413


class Overloaded(MlfuncsError):
    """Over a limit now; the caller may try again after `retry_after_s` seconds."""

    status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(MlfuncsError):
    """A part that is needed is away; the caller may try again after `retry_after_s` seconds."""

    status = 503

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RegistryUnavailable(Unavailable):
    """The registry's database does not answer."""


class DeadlineExceeded(MlfuncsError):
    """The time allowed for the request is over."""

    status = 504


class UntrustedError(MlfuncsError):
    """A digest or a signature does not check out; nothing in the object was loaded."""

    status = 403


class BundleError(MlfuncsError):
    """The function cannot be packed into a bundle, or the bundle cannot be unpacked."""

    status = 400


class EnvironmentFailed(MlfuncsError):
    """Requirements cannot be resolved or installed."""


class ArtifactError(MlfuncsError):
    """A value cannot be stored as an artifact, or an artifact cannot be read back."""


class MissingExtra(MlfuncsError):
    """An optional part is not installed; the message names the `pip install` line that brings it."""

    status = 501

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional part that is not installed: pip install 'mlfuncs[{extra}]'")
        self.extra = extra


class SecretMissing(MlfuncsError):
    """A secret named in a spec has no value here."""


class SchemaTooNew(MlfuncsError):
    """The registry was written by a newer mlfuncs than this one."""

    status = 409


class StorageError(MlfuncsError):
    """A directory or file cannot be read or written."""


class HandlerFailed(MlfuncsError):
    """A served function raised, or returned what its hints do not allow; the traceback is in the log only."""


class RunFailed(MlfuncsError):
    """A tracked run raised; `run_id` finds its traceback and logs."""

    def __init__(self, message: str, run_id: str = "") -> None:
        super().__init__(message)
        self.run_id = run_id


class DeployFailed(MlfuncsError):
    """A revision did not become ready; what served before still serves."""
