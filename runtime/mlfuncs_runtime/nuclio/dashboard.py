"""A Nuclio dashboard: functions by nuclio-jupyter's own calls, and API gateways, which it has no calls for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import requests
from nuclio.auth import AuthInfo
from nuclio.deploy import VERIFY_CERT, delete_func, deploy_config, find_dashboard_url, get_deploy_status, get_function
from nuclio.utils import DeployError

from mlfuncs.errors import DeployFailed, Forbidden, NotFound, Unavailable

_TIMEOUT_S = 60.0


class Dashboard:
    """Raises Unavailable, Forbidden or DeployFailed, as the dashboard answers."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url = url.rstrip("/")
        self._namespace = namespace

    def function(self, name: str) -> dict[str, Any] | None:
        """The function with its status, or None."""
        with self._translated(name):
            answer = get_function(self._api, name)
        if answer.status_code in (401, 403):
            raise Forbidden(f"the Nuclio dashboard {self.url} refuses {name!r}: {answer.text}; check its credentials")
        found: dict[str, Any] | None = answer.json() if answer.ok else None
        return found

    def deploy(self, name: str, project: str, config: dict[str, Any]) -> None:
        """Create or update a function, and its project when there is none. Returns before it is built."""
        logging.getLogger("nuclio").setLevel(logging.WARNING)
        with self._translated(name):
            deploy_config(config, self.url, name=name, project=project, create_new=True, watch=False)

    def state(self, name: str, since_ms: float) -> tuple[str, float, list[str]]:
        """The function's state, the time of the last line of its log, and the lines since `since_ms`."""
        with self._translated(name):
            state, _address, last, said = get_deploy_status(self._api, name, since_ms, resolve_address=False)
        return str(state), last, list(said)

    def delete(self, name: str) -> None:
        """Delete a function; one that is gone is fine."""
        if self.function(name) is not None:
            with self._translated(name), contextlib.redirect_stdout(None):
                delete_func(name, self.url)

    def put_gateway(self, config: Mapping[str, Any]) -> None:
        """Create or update an API gateway."""
        name, project = config["metadata"]["name"], config["metadata"]["labels"]["nuclio.io/project-name"]
        body = {"metadata": config["metadata"], "spec": config["spec"], "status": {}}  # its update wants a status
        known = self._request("GET", f"/{name}").ok
        answer = self._request("PUT" if known else "POST", f"/{name}" if known else "", body, project)
        self._check(answer, name)

    def gateway_state(self, name: str) -> tuple[str, str]:
        """The API gateway's state ("ready", "error", "waitingForProvisioning", ...) and what went wrong."""
        answer = self._request("GET", f"/{name}")
        self._check(answer, name)
        status = answer.json().get("status") or {}
        return str(status.get("state") or ""), str(status.get("last_error") or "")

    def delete_gateway(self, name: str) -> None:
        """Delete an API gateway; one that is gone is fine."""
        if self._request("GET", f"/{name}").ok:
            meta = {"metadata": {"name": name, "namespace": self._namespace}}
            self._check(self._request("DELETE", "", meta), name)

    @property
    def _api(self) -> str:
        return str(find_dashboard_url(self.url))

    def _request(self, method: str, path: str, body: Any = None, project: str = "") -> requests.Response:
        headers = {"X-Nuclio-Api-Gateway-Namespace": self._namespace}
        if project:
            headers["X-Nuclio-Project-Name"] = project
        with self._translated("api gateway"):
            return requests.request(
                method, f"{self._api}/api_gateways{path}", json=body, headers=headers, timeout=_TIMEOUT_S,
                verify=VERIFY_CERT, auth=AuthInfo.from_envvar().to_requests_auth(),
            )  # fmt: skip

    def _check(self, answer: requests.Response, name: str) -> None:
        if answer.status_code in (401, 403):
            raise Forbidden(f"the Nuclio dashboard {self.url} refuses API gateway {name!r}: {answer.text}")
        if not answer.ok:
            raise DeployFailed(f"Nuclio did not take API gateway {name!r} (status {answer.status_code}): {answer.text}")

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """nuclio-jupyter's errors as ours."""
        try:
            yield
        except DeployError as exc:
            answer = getattr(exc, "response", None)
            said = getattr(answer, "text", "") or str(exc)
            if getattr(answer, "status_code", 0) in (401, 403):
                raise Forbidden(
                    f"the Nuclio dashboard {self.url} refuses {name!r}: {said}; check its credentials"
                ) from exc
            raise DeployFailed(f"Nuclio did not take {name!r}: {exc}: {said}") from exc
        except KeyError as exc:
            raise NotFound("Nuclio function", name) from exc
        except (requests.RequestException, OSError) as exc:
            if str(exc).endswith(("401", "403")):  # "nuclio API call failed. status code: 403"
                raise Forbidden(f"the Nuclio dashboard {self.url} refuses: {exc}; check its credentials") from exc
            raise Unavailable(
                f"the Nuclio dashboard {self.url} does not answer ({exc}): check MLFUNCS_NUCLIO_DASHBOARD"
            ) from exc
