"""The target "knative": endpoints as Knative Services, applied by whoever deploys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlfuncs_runtime.kubernetes.cluster import Manifest
from mlfuncs_runtime.kubernetes.evidence import explain_pods
from mlfuncs_runtime.kubernetes.pod_failures import Failure
from mlfuncs_runtime.kubernetes.target import REVISION, KubernetesTarget, condition_of, wanted_revisions
from mlfuncs_runtime.manifests.knative import render_knative

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow


class KnativeTarget(KubernetesTarget):
    """One Knative Service an endpoint; its revisions, traffic and scale to zero are Knative's."""

    KINDS: tuple[str, ...] = ("KnativeService",)

    def _split_warning(self, traffic: dict[str, int]) -> str:
        return ""  # Knative weighs

    def url(self, row: EndpointRow) -> str:
        """The address that Knative gave the Service."""
        service = self._cluster.get("KnativeService", row.name) or {}
        inside = f"http://{row.name}.{self._cluster.namespace}.svc.cluster.local"
        return str((service.get("status") or {}).get("url") or inside)

    def _manifests(self, row: EndpointRow) -> list[Manifest]:
        """The Service with its newest wished revision as the template; earlier ones are kept by Knative."""
        wanted = wanted_revisions(row)
        if not wanted:
            return []
        newest = max(wanted, key=lambda revision: int(revision.rpartition("-")[2]))
        (service,) = render_knative(self._workload(row, newest))
        service["spec"]["template"] = self._known_template(row.name, service["spec"]["template"])
        return [service]

    def _known_template(self, name: str, template: Manifest) -> Manifest:
        """The template of a revision as the cluster has it, when it has: Knative takes no other under that name.

        An endpoint's next rollout may come from a newer mlfuncs, which renders the same revision differently.
        """
        now = ((self._cluster.get("KnativeService", name) or {}).get("spec") or {}).get("template") or {}
        if (now.get("metadata") or {}).get("name") == template["metadata"]["name"] and _is_same(now["spec"], template):
            kept: Manifest = now
            return kept
        made = self._cluster.get("KnativeRevision", template["metadata"]["name"]) or {}
        return {**template, "spec": made["spec"]} if _is_same(made.get("spec") or {}, template) else template

    def _take_back(self, row: EndpointRow) -> None:
        """After a failure: the Service's template is what serves again."""
        for manifest in self._manifests(row):
            self._cluster.apply(manifest)
        self._prune(row)

    def _ready(self, row: EndpointRow, revision: str) -> Failure | None:
        name = f"{row.name}-{revision}"
        found = self._cluster.get("KnativeRevision", name)
        if found is None:
            service = self._cluster.get("KnativeService", row.name) or {}
            said = condition_of(service, "ConfigurationsReady")
            if said and said["status"] == "False":
                return Failure(f"{revision}: {said.get('reason', '')}: {said.get('message', '')}")
            return Failure(f"{revision}: waiting for Knative to make it", final=False)
        ready = condition_of(found, "Ready")
        if ready and ready["status"] == "True":
            return None
        pods = self._cluster.find("Pod", {**self._labels(row), REVISION: revision})
        failure = explain_pods(self._cluster, {}, pods)
        if failure is None and ready and ready["status"] == "False":
            failure = Failure(f"{revision}: {ready.get('reason', '')}: {ready.get('message', '')}")
        return failure or Failure(f"{revision}: {(ready or {}).get('reason') or 'starting'}", final=False)


def _is_same(spec: Manifest, template: Manifest) -> bool:
    """Whether a revision's spec is of the template's revision, by the tag of its image, which comes from bundle and
    config; not of one of that name that was deleted and is still there."""
    tags = [str(one["containers"][0]["image"]).rpartition(":")[2] for one in (spec, template["spec"]) if one]
    return len(tags) == 2 and tags[0] == tags[1]
