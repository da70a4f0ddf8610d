"""A Kubernetes namespace through the official client: apply, read, list, delete, logs; its errors become ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from mlfuncs.errors import Conflict, DeployFailed, Forbidden, MlfuncsError, NotFound, SpecError, Unavailable
from mlfuncs_runtime.manifests.workload import MANAGER

Manifest = dict[str, Any]

# kind -> where its objects are
PATHS: dict[str, str] = {
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "Service": "/api/v1/namespaces/{}/services",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Event": "/api/v1/namespaces/{}/events",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{}/poddisruptionbudgets",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "InterceptorRoute": "/apis/http.keda.sh/v1beta1/namespaces/{}/interceptorroutes",
    "ScaledObject": "/apis/keda.sh/v1alpha1/namespaces/{}/scaledobjects",
    "HTTPRoute": "/apis/gateway.networking.k8s.io/v1/namespaces/{}/httproutes",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "KnativeService": "/apis/serving.knative.dev/v1/namespaces/{}/services",
    "KnativeRevision": "/apis/serving.knative.dev/v1/namespaces/{}/revisions",
}
_TIMEOUT_S = 30.0


def kind_of(manifest: Mapping[str, Any]) -> str:
    """The manifest's key in PATHS; Knative's Service is not Kubernetes'."""
    knative = str(manifest["apiVersion"]).startswith("serving.knative.dev/")
    return f"Knative{manifest['kind']}" if knative else str(manifest["kind"])


class Cluster:
    """One namespace, with the credentials of the kubeconfig or of the pod that this runs in."""

    def __init__(self, namespace: str, api: client.ApiClient | None = None) -> None:
        self.namespace = namespace
        self._api = api or _connect()

    def apply(self, manifest: Manifest, dry_run: bool = False) -> Manifest:
        """Server-side apply under our field manager: fields of other managers, e.g. `replicas`, stay as they are."""
        query = {"fieldManager": MANAGER, "force": "true", **({"dryRun": "All"} if dry_run else {})}
        kind, name = kind_of(manifest), manifest["metadata"]["name"]
        try:
            return self._call("PATCH", kind, name, query, manifest)
        except NotFound as exc:  # an apply makes what is not there: it is the kind or the namespace that is missing
            raise SpecError(_missing(str(manifest["apiVersion"]), kind, self.namespace, exc)) from exc

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object, or None."""
        try:
            return self._call("GET", kind, name)
        except NotFound:
            return None

    def find(self, kind: str, labels: Mapping[str, str]) -> list[Manifest]:
        """The objects with these labels; none when the cluster does not know the kind."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        try:
            items: list[Manifest] = self._call("GET", kind, "", {"labelSelector": selector})["items"]
        except NotFound:
            return []
        return items

    def delete(self, kind: str, name: str) -> None:
        """Delete the object and what it owns; one that is gone is fine."""
        with contextlib.suppress(NotFound):
            self._call("DELETE", kind, name, {"propagationPolicy": "Background"})

    def events(self, name: str) -> list[str]:
        """What the cluster said about an object, oldest first."""
        try:
            items = self._call("GET", "Event", "", {"fieldSelector": f"involvedObject.name={name}"})["items"]
        except MlfuncsError:  # evidence only: not being allowed to see events is no failure
            return []
        return [f"{item.get('reason', '')}: {item.get('message', '')}" for item in sorted(items, key=_when)]

    def logs(self, pod: str, lines: int, previous: bool = False) -> list[str]:
        """The last lines of a pod's function; none when there are none yet."""
        query = {"tailLines": str(lines), "container": "function", **({"previous": "true"} if previous else {})}
        try:
            text = self._raw("GET", f"{PATHS['Pod'].format(self.namespace)}/{pod}/log", query)
        except MlfuncsError:
            return []
        return str(text).splitlines()

    def follow(self, pod: str, whole: bool = False) -> Iterator[str]:
        """Every further line of a pod's function, or every line from the first, until it ends."""
        path = f"{PATHS['Pod'].format(self.namespace)}/{pod}/log"
        query = {"follow": "true", "container": "function", **({} if whole else {"tailLines": "0"})}
        with _translated("pod log", pod):
            answer = self._request("GET", path, query, stream=True)
            rest = b""
            for part in answer.stream(amt=None):
                *lines, rest = (rest + part).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
            if rest:
                yield rest.decode("utf-8", "replace")

    def _call(
        self, method: str, kind: str, name: str, query: Mapping[str, str] | None = None, body: Any = None
    ) -> Manifest:
        path = PATHS[kind].format(self.namespace) + (f"/{name}" if name else "")
        values: Manifest = json.loads(self._raw(method, path, query or {}, body, (kind, name)))
        return values

    def _raw(
        self, method: str, path: str, query: Mapping[str, str], body: Any = None, what: tuple[str, str] = ("object", "")
    ) -> str:
        with _translated(*what):
            return bytes(self._request(method, path, query, body).data).decode("utf-8", "replace")

    def _request(self, method: str, path: str, query: Mapping[str, str], body: Any = None, stream: bool = False) -> Any:
        kind = "application/apply-patch+yaml" if method == "PATCH" else "application/json"
        answer, _status, _headers = self._api.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params={"Accept": "application/json, */*", "Content-Type": kind},
            body=body,  # a dict: the client writes JSON, which is YAML too
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=None if stream else _TIMEOUT_S,
        )
        return answer


def _connect() -> client.ApiClient:
    try:
        config.load_incluster_config()
    except ConfigException:
        try:
            config.load_kube_config()
        except (ConfigException, OSError) as exc:
            raise Unavailable(
                f"no Kubernetes cluster is configured ({exc}): set KUBECONFIG to a file that 'kubectl' works with"
            ) from exc
    return client.ApiClient()


def _when(event: Manifest) -> str:
    """When an event was last seen; times of the API are RFC 3339 in UTC, which sort as text."""
    seen = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp")
    return str(seen or "")


_INSTALL = {  # API group -> what brings it
    "serving.knative.dev": "install Knative Serving, or use the target 'kubernetes'",
    "http.keda.sh": "install KEDA's HTTP add-on (0.14 or newer), or unset MLFUNCS_KUBERNETES_KEDA",
    "keda.sh": "install KEDA, or unset MLFUNCS_KUBERNETES_KEDA",
    "gateway.networking.k8s.io": "install the Gateway API, or unset MLFUNCS_KUBERNETES_GATEWAY",
}


def _missing(api_version: str, kind: str, namespace: str, exc: NotFound) -> str:
    said = _message(exc.__cause__) if isinstance(exc.__cause__, ApiException) else ""
    if f'namespaces "{namespace}"' in said:
        return (
            f"the cluster has no namespace {namespace!r}: apply 'mlfuncs render platform', or set "
            "MLFUNCS_KUBERNETES_NAMESPACE to one that it has"
        )
    mend = _INSTALL.get(api_version.partition("/")[0], "a newer cluster may")
    return f"the cluster does not know {kind.removeprefix('Knative')} of {api_version}: {mend}"


@contextlib.contextmanager
def _translated(kind: str, name: str) -> Iterator[None]:
    try:
        yield
    except ApiException as exc:
        raise _error(exc, kind, name) from exc
    except (HTTPError, OSError) as exc:
        raise Unavailable(f"the Kubernetes API does not answer ({exc}): check KUBECONFIG and the network") from exc


def _message(exc: ApiException) -> str:
    try:
        return str(json.loads(exc.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(exc.reason or exc.body)


def _error(exc: ApiException, kind: str, name: str) -> MlfuncsError:
    message = _message(exc)
    if exc.status == 401:
        return Forbidden(f"the cluster does not accept the credentials of KUBECONFIG: {message}")
    if exc.status == 403 and "exceeded quota" in message:
        return DeployFailed(f"{kind} {name!r}: {message}; lower resources or scale, or have the quota raised")
    if exc.status == 403:
        return Forbidden(f"{message}; have the Role of 'mlfuncs render platform' bound to this user in the namespace")
    if exc.status == 404:
        return NotFound(kind, name)
    if exc.status == 409:
        return Conflict(f"{kind} {name!r}: {message}")
    if exc.status in (400, 422) or "failed to create typed patch object" in message:  # that one comes as a 500
        return SpecError(f"the cluster refuses {kind} {name!r}: {message}")
    return Unavailable(f"the Kubernetes API failed on {kind} {name!r} (status {exc.status}): {message}")
