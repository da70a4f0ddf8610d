"""Endpoints as the user sees them: deploy, call, watch, and move traffic between revisions."""

from __future__ import annotations

import functools
import hashlib
import html
import os
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import Conflict, InvalidInput, NotFound, SpecError, Unavailable
from mlfuncs.serving import client
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.serving.rollouts import check_traffic, rollback_traffic, serving_revision, start_rollout
from mlfuncs.serving.targets import EndpointStatus, Target, open_target
from mlfuncs.settings import Settings, read_settings

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow, Endpoints

CALL_URL = "MLFUNCS_CALL_URL"  # set in every worker: where "{name}" is reached from there
TOKENS_AT_ONCE = 2  # the one in use and its successor
_WAIT_S = 300.0

Desired = dict[str, Any]


def deploy(function: Any, *, name: str | None = None, target: str = "process", **options: Any) -> Endpoint:
    """Serve `function` and return its endpoint once it answers.

    `options` override the function's own (scale, batch, resources, timeout_s, env, secrets, features, labels), give the
    constructor's arguments of a class, and say: `traffic`, the new revision's percentage of requests (100); `wait_s`,
    how long to wait (300); `rate_per_s`, `burst`, `cors_origins`, `sticky_header`, `sticky_cookie`, `queue_size`,
    `queue_bytes`, `body_bytes`. Raises DeployFailed when the new revision does not become ready; what served before
    still serves then.
    """
    from mlfuncs.decorator import function_of
    from mlfuncs.progress import progress
    from mlfuncs.serving.deployment import STEPS, add_revision, read_options

    function = function_of(function)
    deployment = read_options(function, name, target, options)
    settings = read_settings()
    place = open_target(target, settings)
    with progress(f"Deploying {deployment.name}", total=len(STEPS)) as bar:

        def report(note: str) -> None:
            bar.update(note=note, done=STEPS.index(note) if note in STEPS else None)

        row, revision, rollout = add_revision(function, deployment, settings, report)
        report(STEPS[-1])
        place.apply(row)
        place.wait(row, rollout, deployment.wait_s, report)
        bar.update(note=f"{revision.revision} serves", done=len(STEPS))
    return Endpoint(deployment.name, settings, revision=revision.revision, parameters=_parameters(row))


def endpoint(name: str, *, token: str = "") -> Endpoint:
    """The endpoint of that name; inside a worker, what another endpoint is called through. Raises NotFound.

    `token` is sent with every call, for an endpoint that asks for one (default: MLFUNCS_TOKEN).
    """
    settings = read_settings()
    if os.environ.get(CALL_URL):  # in a worker: no look at the registry; an unknown name shows when it is called
        return Endpoint(name, settings, token=token)
    row = _endpoints(settings).get(name)
    return Endpoint(name, settings, token=token, parameters=_parameters(row))


def list_endpoints() -> EndpointList:
    """The project's endpoints by name, with what runs for each."""
    settings = read_settings()
    return EndpointList(Endpoint(row.name, settings).status() for row in _endpoints(settings).list())


class Endpoint:
    """One endpoint: call it, look at it, and move its traffic. `revision` is the one that serves most requests."""

    def __init__(
        self,
        name: str,
        settings: Settings | None = None,
        *,
        token: str = "",
        revision: str = "",
        parameters: tuple[str, ...] | None = None,
    ) -> None:
        self.name = name
        self._settings = settings or read_settings()
        self._token = token or self._settings.token
        self._revision = revision
        self._bound = parameters

    def __repr__(self) -> str:
        known = self.__dict__.get("url")  # not looked up here: that may start what serves it
        return f"<mlfuncs endpoint {self.name!r}{f' at {known}' if known else ''}>"

    def _repr_html_(self) -> str:
        return status_html(self.status())

    @functools.cached_property
    def url(self) -> str:
        """Where it answers: `POST url` calls it, `url/docs` shows its interface."""
        pattern = os.environ.get(CALL_URL)
        return pattern.replace("{name}", self.name) if pattern else self._target.url(self._row())

    @property
    def revision(self) -> str:
        """The revision this object's deploy made, else the one with most of the traffic."""
        return self._revision or serving_revision(self._row().desired.get("traffic") or {})

    def invoke(self, /, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """The endpoint's answer to these arguments, which bind as in a call of the function.

        `timeout_s` (default: 60 s, or what the running request has left) bounds the whole call. Raises InvalidInput
        for arguments that do not fit, and otherwise the error that the endpoint answered with.
        """
        return self.invoke_json(self._bind(args, kwargs), timeout_s=timeout_s)

    def invoke_json(self, body: Any, *, timeout_s: float | None = None) -> Any:
        """The answer to `body`, any value that can be JSON, sent as it is: a whole body model, or an event."""
        content = client.encode(body)
        try:
            return client.invoke(self.url, content, token=self._token, timeout_s=timeout_s)
        except NotFound as exc:
            if not os.environ.get(CALL_URL) and not self._row().desired.get("traffic"):
                raise Unavailable(
                    f"endpoint {self.name!r} has no revision that serves: its deploy failed or is under way; see "
                    f"'mlfuncs status' and 'mlfuncs logs {self.name}', and deploy again"
                ) from exc
            raise
        except Unavailable as exc:
            if exc.retry_after_s or os.environ.get(CALL_URL):  # it may have been read, or is not ours to start
                raise
            self._start_again()
            return client.invoke(self.url, content, token=self._token, timeout_s=timeout_s)

    def status(self) -> EndpointStatus:
        """What runs now: state, replicas, traffic and load."""
        return self._target.status(self._row())

    def logs(self, n: int = 100, *, follow: bool = False) -> Logs:
        """The last `n` lines its workers wrote; with `follow`, iterating goes on with every new line."""
        row = self._row()
        return Logs(lambda: self._target.logs(row, n, follow))

    def traffic(self, shares: Mapping[str, int], *, wait_s: float = _WAIT_S) -> None:
        """Split requests by relative shares, e.g. {"rev-3": 90, "rev-4": 10}; returns when it is in force."""
        shares = dict(shares)
        self._roll_out(lambda _desired, _row: shares, wait_s)

    def promote(self, revision: str | None = None, *, wait_s: float = _WAIT_S) -> None:
        """Give all requests to `revision` (default: the latest)."""
        self._roll_out(lambda _desired, row: {revision or row.latest.revision: 100}, wait_s)

    def rollback(self, *, wait_s: float = _WAIT_S) -> None:
        """Give all requests back to the revision that had them all before the last change, or before a canary's splits.

        Raises Conflict when there is none.
        """
        self._roll_out(lambda desired, _row: rollback_traffic(desired, self.name), wait_s)

    def mirror(self, revision: str, percent: int = 100) -> None:
        """Copy that percentage of requests to `revision`, whose answers nobody sees; 0 ends it."""
        if not isinstance(percent, int) or isinstance(percent, bool) or not 0 <= percent <= 100:
            raise SpecError(f"mirror takes a percentage, a whole number from 0 to 100, not {percent!r}")

        def change(desired: Desired, row: EndpointRow) -> Desired:
            row.revision(revision)
            kept = {name: share for name, share in (desired.get("mirror") or {}).items() if name != revision}
            return {**desired, "mirror": {**kept, revision: percent} if percent else kept}

        self._change(change)

    def tag(self, tag: str, revision: str | None) -> str:
        """The URL at which `revision` alone answers under this tag; None as revision removes the tag."""
        from mlfuncs.spec import check_name

        check_name("tag", tag)

        def change(desired: Desired, row: EndpointRow) -> Desired:
            tags = {name: value for name, value in (desired.get("tags") or {}).items() if name != tag}
            return {**desired, "tags": {**tags, tag: row.revision(revision).revision} if revision else tags}

        self._change(change)
        return f"{self.url}--{tag}"

    def create_token(self) -> str:
        """A new bearer token for callers, shown this once: only its digest is kept.

        From the first token on a call without one is refused. Two are valid at once, so that callers can change over;
        raises Conflict at a third.
        """
        token = f"mlf_{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(token.encode()).hexdigest()

        def add(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
            if len(tokens) >= TOKENS_AT_ONCE:
                raise Conflict(f"endpoint {self.name!r} has {len(tokens)} tokens; revoke one with revoke_token()")
            return [*tokens, {"sha256": digest, "created_at": time.time()}]

        self._change_tokens(add)
        return token

    def revoke_token(self, token: str | None = None) -> None:
        """Refuse `token` from now on (default: the older one). Raises NotFound when it is not valid now."""
        digest = hashlib.sha256(token.encode()).hexdigest() if token else None

        def remove(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
            kept = [known for known in tokens if known["sha256"] != digest] if digest else tokens[1:]
            if len(kept) == len(tokens):
                raise NotFound(f"token of endpoint {self.name!r}", "***", hint="(revoked before, or never given)")
            return kept

        self._change_tokens(remove)

    def delete(self) -> None:
        """Take the endpoint away: no new request, those in flight are answered, then its processes end."""
        row = _endpoints(self._settings).delete(self.name)
        self._target_of(row).delete(row)

    @property
    def _target(self) -> Target:
        return self._target_of(self._row())

    def _target_of(self, row: EndpointRow) -> Target:
        return open_target(row.target, self._settings)

    def _row(self) -> EndpointRow:
        return _endpoints(self._settings).get(self.name)

    def _start_again(self) -> None:
        """Start what serves the endpoint, and look its address up again."""
        row = self._row()
        self._target_of(row).apply(row)
        self.__dict__.pop("url", None)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        names = self._bound if self._bound is not None else _parameters(self._row())
        if len(args) > len(names):
            raise InvalidInput(f"endpoint {self.name!r} takes {len(names)} arguments, and {len(args)} were given")
        values = dict(zip(names, args, strict=False))
        if twice := sorted(set(values) & set(kwargs)):
            raise InvalidInput(f"endpoint {self.name!r} got two values for {twice[0]!r}")
        return {**values, **kwargs}

    def _change(self, change: Callable[[Desired, EndpointRow], Desired]) -> EndpointRow:
        row = _endpoints(self._settings).update(self.name, change)
        self._target_of(row).apply(row)
        return row

    def _roll_out(self, shares: Callable[[Desired, EndpointRow], Mapping[str, int]], wait_s: float) -> None:
        rollout = uuid.uuid4().hex

        def change(desired: Desired, row: EndpointRow) -> Desired:
            wanted = check_traffic(shares(desired, row), [r.revision for r in row.revisions], row.name)
            return start_rollout(desired, rollout, wanted)

        row = self._change(change)
        self._revision = ""
        self._target_of(row).wait(row, rollout, wait_s, lambda _note: None)

    def _change_tokens(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        def apply(desired: Desired, _row: EndpointRow) -> Desired:
            options = dict(desired.get("options") or {})
            access = dict(options.get("access") or {})
            access["tokens"] = change(list(access.get("tokens") or []))
            return {**desired, "options": {**options, "access": access}}

        self._change(apply)


class Logs:
    """Lines of a log, to iterate over or to print."""

    def __init__(self, read: Callable[[], Iterator[str]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return self._read()

    def __str__(self) -> str:
        return "\n".join(self)

    __repr__ = __str__


class EndpointList(list[EndpointStatus]):
    """Endpoints that show themselves as a table."""

    def _repr_html_(self) -> str:
        from mlfuncs.display import table_html

        rows, columns = self._table()
        return table_html(rows, columns, caption="Endpoints")

    def __str__(self) -> str:
        from mlfuncs.display import Table

        rows, columns = self._table()
        return str(Table(columns, rows))

    __repr__ = __str__

    def _table(self) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
        """Rows and columns; without the one for messages while nobody has one."""
        rows = tuple(status_row(status) for status in self)
        has_message = any(row["message"] for row in rows)
        return rows, tuple(column for column in STATUS_COLUMNS if column != "message" or has_message)


STATUS_COLUMNS = ("name", "state", "revision", "replicas", "traffic", "url", "message")


def status_row(status: EndpointStatus) -> dict[str, Any]:
    """An endpoint's status as a row of a table."""
    ready = sum(replica.state == "ready" for replica in status.replicas)
    return {
        "name": status.name,
        "state": status.state,
        "revision": status.revision,
        "replicas": f"{ready}/{len(status.replicas)}",
        "traffic": ", ".join(f"{revision} {share}" for revision, share in status.traffic.items()),
        "url": status.url,
        "message": (status.message.splitlines() or [""])[0],
    }


def status_html(status: EndpointStatus) -> str:
    """An endpoint's status as a card."""
    from mlfuncs.display import Markup, card_html, table_html

    address = html.escape(status.url, quote=True)
    link = f'<a href="{address}/docs" target="_blank">{address}</a>'
    facts = {
        "url": Markup(link, status.url),
        "revision": status.revision,
        "traffic": status_row(status)["traffic"],
        "message": status.message or None,
    }
    rows = [{"replica": r.id, "revision": r.revision, "state": r.state, "pid": r.pid} for r in status.replicas]
    body = table_html(rows, ("replica", "revision", "state", "pid")) if rows else ""
    return card_html(f"Endpoint {status.name}", status.state, facts, body)


def _endpoints(settings: Settings) -> Endpoints:
    from mlfuncs.registry import open_registry

    return open_registry(settings).endpoints


def _parameters(row: EndpointRow) -> tuple[str, ...]:
    return RevisionConfig.from_dict(row.latest.config).parameters if row.revisions else ()
