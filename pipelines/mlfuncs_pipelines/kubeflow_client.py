"""The way to a Kubeflow Pipelines API: kfp's client with time-outs, a token, and our errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlfuncs.errors import Forbidden, MlfuncsError, NotFound, SpecError, Unauthorized, Unavailable
from mlfuncs.settings import Settings, read_settings

_TIMEOUTS_S = (5.0, 60.0)  # to connect, and to answer
_POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
_BY_STATUS: dict[int, type[MlfuncsError]] = {401: Unauthorized, 403: Forbidden, 400: SpecError, 409: SpecError}


def host_of(host: str, settings: Settings) -> str:
    """The URL of the Pipelines API, given or set. Raises SpecError."""
    found = (host or settings.kubeflow_host or os.environ.get("KF_PIPELINES_ENDPOINT", "")).rstrip("/")
    if not found:
        raise SpecError("no Kubeflow host: give host=..., or set MLFUNCS_KUBEFLOW_HOST to the Pipelines URL")
    if not found.startswith(("http://", "https://")):
        raise SpecError(f"the Kubeflow host {found!r} is not a URL; write it like https://kubeflow.example/pipeline")
    return found


def connect(host: str, settings: Settings | None = None) -> Any:
    """A kfp client for `host` that gives up on a host which does not answer.

    The token is the setting kubeflow_token, else the one that Kubernetes mounts into a pod. Raises Unavailable,
    Unauthorized or SpecError before anything is sent.
    """
    import kfp

    settings = settings or read_settings()
    token = settings.kubeflow_token or (_POD_TOKEN.read_text().strip() if _POD_TOKEN.exists() else "")
    _probe(host, token)
    with warnings.catch_warnings(), _quiet(), translated(host):
        warnings.simplefilter("ignore")
        namespace = settings.kubernetes_namespace if settings.kubernetes_namespace != "default" else "kubeflow"
        client = kfp.Client(host=host, existing_token=token or None, namespace=namespace)
    rest = client._run_api.api_client.rest_client
    original = rest.request

    def request(*arguments: Any, **options: Any) -> Any:
        options["_request_timeout"] = options.get("_request_timeout") or _TIMEOUTS_S
        return original(*arguments, **options)

    rest.request = request
    return client


@contextlib.contextmanager
def translated(host: str) -> Iterator[None]:
    """kfp's and urllib3's errors as ours."""
    import kfp_server_api
    import urllib3

    try:
        with _quiet():
            yield
    except kfp_server_api.ApiException as exc:
        raise _refused(exc, host) from exc
    except (urllib3.exceptions.HTTPError, TimeoutError) as exc:
        raise Unavailable(f"Kubeflow at {host} does not answer: {_reason(exc)}", 30) from exc


def _refused(exc: Any, host: str) -> MlfuncsError:
    try:
        message = json.loads(exc.body).get("error") or json.loads(exc.body).get("message") or exc.body
    except (TypeError, ValueError, AttributeError):
        message = exc.reason
    text = f"Kubeflow at {host} refused ({exc.status}): {message}"
    if exc.status in (401, 403):
        text += "; set MLFUNCS_KUBEFLOW_TOKEN to a token that may do this"
    if exc.status == 404:
        return NotFound("object on Kubeflow", str(message))
    return _BY_STATUS.get(exc.status or 0, Unavailable)(text)


def _probe(host: str, token: str) -> None:
    import urllib3

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{host}/apis/v2beta1/healthz"
    timeout = urllib3.Timeout(connect=_TIMEOUTS_S[0], read=15.0)
    try:
        answer = urllib3.PoolManager(retries=False).request("GET", url, headers=headers, timeout=timeout)
    except urllib3.exceptions.HTTPError as exc:
        advice = "check the address and that it can be reached from here (a port-forward, a VPN)"
        raise Unavailable(f"Kubeflow at {host} does not answer: {_reason(exc)}; {advice}", 30) from exc
    if answer.status in (401, 403):
        error = Unauthorized if answer.status == 401 else Forbidden
        raise error(f"Kubeflow at {host} refuses the token ({answer.status}); set MLFUNCS_KUBEFLOW_TOKEN")
    if answer.status >= 500:
        raise Unavailable(f"Kubeflow at {host} answers {answer.status}", 30)
    if answer.status != 200 or not answer.data.lstrip().startswith(b"{"):
        raise SpecError(f"{host} is not the Kubeflow Pipelines API ({answer.status} at /apis/v2beta1/healthz)")


def _reason(exc: BaseException) -> str:
    inner = getattr(exc, "reason", None)
    return str(inner or exc)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """kfp's client prints links; ours are in the returned objects."""
    return contextlib.redirect_stdout(io.StringIO())
