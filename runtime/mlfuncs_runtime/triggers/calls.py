"""One call of an endpoint for a trigger, and what its failure means."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from enum import StrEnum

from mlfuncs.errors import MlfuncsError, Unavailable
from mlfuncs.serving import client
from mlfuncs.serving.request_context import CURRENT_REQUEST, RequestContext

_LONGEST_HOLD_S = 60.0
_AWAY_S = 1.0  # nothing listens: the router is being started again
_MISPLACED_S = 15.0  # no such endpoint now, or not allowed: the message is not at fault


class Fault(StrEnum):
    """Whose fault a failed call is."""

    HOLD = "hold"  # nobody can serve now: wait, and do not count it as a try
    FAILED = "failed"  # it may go better next time
    REFUSED = "refused"  # the message can never be served as it is


@dataclass(frozen=True)
class Failure:
    """A failed call: what kind, why, and the seconds to wait when it is to hold."""

    fault: Fault
    reason: str
    wait_s: float = 0.0


@dataclass(frozen=True)
class Callee:
    """Where a trigger calls: the endpoint's URL, how long a call may take, and the token to show."""

    url: str
    timeout_s: float
    token: str = ""

    def call(self, body: bytes, request_id: str) -> None:
        """Call once. Raises the MlfuncsError that the endpoint answered with.

        `request_id` is the same at every try of a message, and is the `X-Request-Id` that the handler sees. The trace
        id comes from it, so that all tries are one trace.
        """
        trace = hashlib.sha256(request_id.encode()).hexdigest()
        context = RequestContext(request_id, time.monotonic() + self.timeout_s, f"00-{trace[:32]}-{trace[32:48]}-01")
        mark = CURRENT_REQUEST.set(context)
        try:
            client.invoke(self.url, body, token=self.token, timeout_s=self.timeout_s)
        finally:
            CURRENT_REQUEST.reset(mark)


def judge_failure(error: MlfuncsError) -> Failure:
    """What a failed call means.

    >>> judge_failure(Unavailable("nobody listens", retry_after_s=0.0)).fault.value
    'hold'
    """
    reason = f"{error.title}: {error}"
    status = getattr(error, "answered", None)
    wait_s = min(_LONGEST_HOLD_S, float(getattr(error, "retry_after_s", 1.0)))
    if status in (429, 503):
        return Failure(Fault.HOLD, reason, max(wait_s, 0.05))
    if status is None and isinstance(error, Unavailable) and not error.retry_after_s:
        return Failure(Fault.HOLD, reason, _AWAY_S)
    if status in (401, 403, 404):
        return Failure(Fault.HOLD, reason, _MISPLACED_S)
    if status is not None and 400 <= status < 500 and status not in (408, 409, 425):
        return Failure(Fault.REFUSED, reason)
    return Failure(Fault.FAILED, reason)
