"""Inside a Nuclio processor: serve a bundle, checked as everywhere, as a Nuclio handler."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlfuncs.artifacts import ArtifactRef, ArtifactStore
from mlfuncs.bundles import store as bundle_store
from mlfuncs.bundles.bundle import open_bundle
from mlfuncs.errors import InvalidInput, MlfuncsError
from mlfuncs.interface.signature import Signature, function_kind
from mlfuncs.objects import key_of
from mlfuncs.settings import Settings, read_settings

_PROBLEM = "application/problem+json"


def open_exported(exported: Mapping[str, Any], context: Any) -> Callable[[Any, Any], Any]:
    """A handler for the bundle in `exported`. Raises UntrustedError when its signature does not check out."""
    settings = _settings(exported)
    loaded = _load(exported, settings)
    target: Any = getattr(loaded, "target", loaded)
    if function_kind(target) == "nuclio":
        init = getattr(inspect.unwrap(target), "__globals__", {}).get("init_context")
        if callable(init):
            init(context)
        handler: Callable[[Any, Any], Any] = target
        return handler
    signature = Signature.of(target)
    call: Any = target(**_values(exported, settings)) if inspect.isclass(target) else target

    def handle(context: Any, event: Any) -> Any:
        try:
            values = signature.validate_json(_body(event))
            return _respond(context, signature.dump_json(call(**values)), 200, "application/json")
        except InvalidInput as exc:
            return _respond(context, _problem(exc), exc.status, _PROBLEM)
        except MlfuncsError as exc:
            context.logger.error(str(exc))
            return _respond(context, _problem(exc), exc.status, _PROBLEM)

    return handle


def _settings(exported: Mapping[str, Any]) -> Settings:
    home = Path(tempfile.mkdtemp(prefix="mlfuncs-"))
    return dataclasses.replace(
        read_settings(), home=home, project=exported["project"], trusted_keys=exported["trusted"]
    )


def _load(exported: Mapping[str, Any], settings: Settings) -> Any:
    folder = settings.home / "bundles" / exported["digest"] / exported["project"]
    folder.mkdir(parents=True)
    (folder / bundle_store.ARCHIVE).write_bytes(base64.b64decode(exported["archive"]))
    (folder / bundle_store.SIGNATURE).write_text(exported["signature"], encoding="ascii")
    return open_bundle(exported["digest"], settings).load()


def _values(exported: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The constructor's values: from what came along, else from the shared store; digests and signatures checked."""
    for digest, content in exported["artifacts"].items():
        path = settings.home / "artifacts" / key_of(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content))
    store = ArtifactStore.open(settings)
    return {name: store.get(ArtifactRef.from_dict(ref)) for name, ref in exported["init_args"].items()}


def _body(event: Any) -> bytes:
    body = event.body
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        return body.encode()
    import json

    return json.dumps(body).encode()  # the processor decodes application/json itself


def _problem(error: MlfuncsError) -> bytes:
    import json

    return json.dumps(error.to_problem()).encode()


def _respond(context: Any, body: bytes, status: int, kind: str) -> Any:
    return context.Response(body=body, headers={}, content_type=kind, status_code=status)
