"""A request's way in, when its head is new: where it leads, who may call it, and which revision answers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlfuncs.errors import NotFound, Unauthorized
from mlfuncs_runtime.router.access import cors_headers, is_token_valid, preflight_headers
from mlfuncs_runtime.router.http import RequestHead
from mlfuncs_runtime.router.pages import answer_page
from mlfuncs_runtime.router.refusals import too_large
from mlfuncs_runtime.router.request import Plan, Request

if TYPE_CHECKING:
    from mlfuncs_runtime.router.client import Client
    from mlfuncs_runtime.router.core import Core
    from mlfuncs_runtime.router.endpoint import Endpoint


def plan_of(core: Core, request: Request, client: Client) -> Plan | None:
    """Check a request and choose where it goes. None: the platform has answered it.

    Raises MlfuncsError when the request is refused.
    """
    head = request.head
    try:
        place = core.places.find(head.target)
    except NotFound:
        _check_token(head, core.options.token_sha256)
        raise
    endpoint = place.endpoint
    if endpoint is None:
        if place.path != b"/-/healthz":
            _check_token(head, core.options.token_sha256)
        answer_page(client, request, place.path)
        return None
    access = endpoint.route.access
    extra = b""
    if head.origin and access.cors_origins:
        if head.method == b"OPTIONS" and _answer_preflight(request, client, endpoint):
            return None
        extra = request.extra = cors_headers(access, head.origin)
    is_ours = _check_token(head, (*core.options.token_sha256, *access.token_sha256))
    if head.length > endpoint.route.limits.body_bytes:
        endpoint.reject("body")
        raise too_large(endpoint.route.limits.body_bytes)
    revision, cookie = _choose_revision(head, endpoint, place.revision)
    revision = revision or endpoint.split.only or ""
    state = endpoint.revision(revision) if revision else None
    plan = Plan(head, endpoint, state, place.path, b"" if is_ours else head.authorization)
    plan.extra = extra
    request.extra = extra + cookie
    if cookie or head.length > core.short_body:
        plan.is_lasting = False
    return plan


def _check_token(head: RequestHead, tokens: tuple[str, ...]) -> bool:
    """Whether the caller's token is one of ours. Raises Unauthorized when it must be and is not."""
    if tokens and not is_token_valid(head.authorization, tokens):
        what = "a wrong token came with" if head.authorization else "no token came with"
        raise Unauthorized(f"{what} the request: send 'Authorization: Bearer <token>'")
    return bool(tokens)


def _answer_preflight(request: Request, client: Client, endpoint: Endpoint) -> bool:
    headers = request.head.headers
    wanted = {name.lower(): value for name, value in headers if name.lower().startswith(b"access-control")}
    method = wanted.get(b"access-control-request-method")
    if method is None:
        return False
    asked = wanted.get(b"access-control-request-headers", b"")
    access = endpoint.route.access
    client.reply(request, 204, b"", preflight_headers(access, request.head.origin, method, asked))
    return True


def _choose_revision(head: RequestHead, endpoint: Endpoint, tagged: str) -> tuple[str, bytes]:
    """(revision, header line that makes the caller stick to it); empty: the shares decide, request by request."""
    split, route = endpoint.split, endpoint.route
    if tagged or split.only is not None or not route.traffic:
        return tagged, b""
    if route.sticky_header:
        name = route.sticky_header.lower().encode()
        for key, value in head.headers:
            if key.lower() == name:
                return split.of(value), b""
    if not route.sticky_cookie:
        return "", b""
    wanted = route.sticky_cookie.encode()
    for pair in head.cookie.split(b";"):
        name, _, value = pair.strip().partition(b"=")
        if name == wanted and value:
            return split.of(value), b""
    value = os.urandom(8).hex().encode()
    given = (wanted, value, head.prefix, endpoint.name.encode())
    return split.of(value), b"Set-Cookie: %s=%s; Path=%s/%s; HttpOnly; SameSite=Lax\r\n" % given
