"""The cluster targets through the real kubernetes client, against an API server of the tests' own."""

import copy
import re
import time

import pytest
from kubernetes import client

import mlfuncs as ml
from mlfuncs.errors import DeployFailed, Forbidden, SpecError, Unavailable
from mlfuncs.serving import targets
from mlfuncs.settings import read_settings
from mlfuncs_runtime.images.builder import MemoryBuilder
from mlfuncs_runtime.kubernetes.cluster import Cluster
from mlfuncs_runtime.kubernetes.knative import KnativeTarget
from mlfuncs_runtime.kubernetes.target import KubernetesTarget
from tests.runtime import fake_kubernetes


@ml.function(requirements=[], scale=ml.Scale(min=1, max=3))
def churn(x: float) -> float:
    """Twice x."""
    return 2 * x


@pytest.fixture
def api():
    fake = fake_kubernetes.FakeKubernetes()
    fake.behaviour = lambda path, manifest: becomes_ready(fake, path, manifest)
    yield fake
    fake.close()


@pytest.fixture
def builder():
    return MemoryBuilder()


@pytest.fixture
def deploy(api, builder, monkeypatch):
    monkeypatch.setenv("MLFUNCS_IMAGE_REGISTRY", "registry.example/team")
    monkeypatch.setenv("MLFUNCS_KUBERNETES_NAMESPACE", "ml")

    def open_target(name, settings):
        configuration = client.Configuration(host=api.url)
        cluster = Cluster(settings.kubernetes_namespace, client.ApiClient(configuration))
        made = {"kubernetes": KubernetesTarget, "knative": KnativeTarget}[name](settings, cluster, builder)
        made.poll_s = 0.01
        return made

    monkeypatch.setattr("mlfuncs.serving.endpoints.open_target", open_target)
    return lambda target="kubernetes", function=churn, **options: function.deploy(target=target, **options)


def becomes_ready(fake, path, manifest):
    if "/deployments/" in path:
        manifest["status"] = {"observedGeneration": manifest["metadata"]["generation"], "readyReplicas": 1}
    if manifest["apiVersion"].startswith("serving.knative.dev"):
        manifest["status"] = {"url": "http://churn.ml.example.com"}
        template = manifest["spec"]["template"]["metadata"]["name"]
        fake.objects[f"/apis/serving.knative.dev/v1/namespaces/ml/revisions/{template}"] = {
            "metadata": {"name": template},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        }


def pod(revision, **status):
    labels = {"app.kubernetes.io/name": "churn", "app.kubernetes.io/part-of": "test", "mlfuncs.dev/revision": revision}
    return {"metadata": {"name": f"churn-{revision}-abc", "labels": labels}, "status": status}


def waiting(reason, message=""):
    state = {
        "image": "registry.example/x",
        "restartCount": 3,
        "state": {"waiting": {"reason": reason, "message": message}},
    }
    return {"containerStatuses": [state]}


FAULTS = {
    "the image .* cannot be pulled .*image_pull_secrets": waiting(
        "ImagePullBackOff", 'Back-off pulling image "registry.example/x": ErrImagePull: unauthorized: denied'
    ),
    "ends again and again.*\n.*ValueError: no model": waiting(
        "CrashLoopBackOff", "back-off 10s restarting failed container=function pod=churn-rev-2-abc_ml(1f)"
    ),
    "more memory than its limit": {
        "containerStatuses": [
            {"restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
             "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}
        ]
    },
    "cannot start .CreateContainerConfigError: secret .s. not found.*is its Secret there": waiting(
        "CreateContainerConfigError", 'secret "s" not found'
    ),
    "a volume cannot be mounted: MountVolume.SetUp failed .* secret .churn-secrets. not found; make": {
        "containerStatuses": [{"restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}}}]
    },
}  # fmt: skip
UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 1 node(s) had untolerated taint {gpu: yes}, 2 Insufficient cpu.",
        }
    ],
}
QUOTA = (
    'pods "churn-rev-2-5d-x" is forbidden: exceeded quota: compute, requested: requests.cpu=2, '
    "used: requests.cpu=3, limited: requests.cpu=4"
)
REFUSED = {  # what the API server says of pods that a ReplicaSet wants
    "set resources.cpu and resources.memory": (
        'pods "churn-rev-2-5d-x" is forbidden: failed quota: compute: must specify limits.memory for: function'
    ),
    "restricted standard": (
        'pods "churn-rev-2-5d-x" is forbidden: violates PodSecurity "restricted:latest": restricted volume types '
        '(volume "volume-0" uses restricted volume type "hostPath")'
    ),
    "LimitRange": 'pods "x" is forbidden: maximum memory usage per Container is 1Gi, but limit is 4Gi',
    "whoever runs that webhook": 'admission webhook "policy.example" denied the request: no owner label',
}


def test_a_deploy_pushes_the_image_applies_and_waits(deploy, api, builder):
    endpoint = deploy()
    assert endpoint.url == "http://churn.ml.svc.cluster.local"
    assert api.names("deployments") == ["churn-rev-1"] and api.names("services") == ["churn", "churn-rev-1"]
    assert len(builder.pushed) == 1 and builder.pushed[0].startswith("registry.example/team/test-churn:rev-1-")
    patches = [request for request in api.requests if request[0] == "PATCH"]
    assert all(query["fieldManager"] == "mlfuncs" for _, _, query, _ in patches)
    assert {kind for *_, kind in patches} == {"application/apply-patch+yaml"}


def test_a_new_revision_takes_over_and_the_old_objects_go(deploy, api):
    deploy()
    endpoint = deploy(timeout_s=30)
    assert api.names("deployments") == ["churn-rev-2"]
    service = api.objects["/api/v1/namespaces/ml/services/churn"]
    assert service["spec"]["selector"]["mlfuncs.dev/revision"] == "rev-2"
    endpoint.rollback()
    assert api.names("deployments") == ["churn-rev-1"]
    endpoint.delete()
    assert api.objects == {}


@pytest.mark.parametrize("message", FAULTS)
def test_a_failing_pod_is_named_and_what_served_still_serves(deploy, api, message):
    deploy()
    pods = "/api/v1/namespaces/ml/pods"

    def fails(path, manifest):
        if path.endswith("churn-rev-2"):
            manifest["status"] = {"observedGeneration": 99}
            api.objects[f"{pods}/churn-rev-2-abc"] = pod("rev-2", **FAULTS[message])

    api.behaviour = fails
    api.pod_logs["churn-rev-2-abc"] = "Traceback\nValueError: no model"
    said = 'MountVolume.SetUp failed for volume "secrets" : secret "churn-secrets" not found'
    api.objects["/api/v1/namespaces/ml/events/e"] = {"metadata": {}, "reason": "FailedMount", "message": said}
    with pytest.raises(DeployFailed, match=f"(?s){message}") as raised:
        deploy(timeout_s=30)
    assert "rev-1 still serves" in str(raised.value)
    assert api.names("deployments") == ["churn-rev-1"]
    assert api.objects["/api/v1/namespaces/ml/services/churn"]["spec"]["selector"]["mlfuncs.dev/revision"] == "rev-1"


@pytest.mark.parametrize("mend", REFUSED)
def test_a_refused_pod_is_named_and_what_served_still_serves(deploy, api, mend):
    deploy()

    def refuses(path, manifest):
        if path.endswith("deployments/churn-rev-2"):
            manifest["status"] = is_refused(REFUSED[mend])

    api.behaviour = refuses
    with pytest.raises(DeployFailed, match=rf"(?s)no pod can be made: .*{mend}.*rev-1 still serves"):
        deploy(timeout_s=30)
    assert api.names("deployments") == ["churn-rev-1"]


def is_refused(message):
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    return {"observedGeneration": 99, "conditions": [condition], "unavailableReplicas": 1}


@pytest.fixture
def waits_for_room(api):
    """Makes pods of rev-2 wait for a node, or for a quota; what it returns makes room."""

    def make(reason):
        def keeps_waiting(path, manifest):
            if path.endswith("deployments/churn-rev-2"):
                manifest["status"] = is_refused(QUOTA) if reason == "quota" else {"observedGeneration": 99}
                if reason != "quota":
                    api.objects["/api/v1/namespaces/ml/pods/churn-rev-2-abc"] = pod("rev-2", **UNSCHEDULABLE)
            else:
                becomes_ready(api, path, manifest)

        def make_room():
            found = api.objects["/apis/apps/v1/namespaces/ml/deployments/churn-rev-2"]
            api.objects.pop("/api/v1/namespaces/ml/pods/churn-rev-2-abc", None)
            found["status"] = {"observedGeneration": 99, "readyReplicas": 1}

        api.behaviour = keeps_waiting
        return make_room

    return make


WAITING = {"node": "fits on no node: 0/3 nodes.*2 Insufficient cpu.*lower resources", "quota": "have the quota raised"}


@pytest.mark.parametrize("reason", WAITING)
def test_a_deploy_waits_for_a_node_or_a_quota_and_then_serves(deploy, api, waits_for_room, monkeypatch, reason):
    deploy()
    make_room, looks = waits_for_room(reason), []
    ready = KubernetesTarget._ready

    def look(self, row, revision):
        looks.append(ready(self, row, revision))
        if len(looks) == 3:
            make_room()
        return looks[-1]

    monkeypatch.setattr(KubernetesTarget, "_ready", look)
    endpoint = deploy(timeout_s=30)
    assert endpoint.status().revision == "rev-2" and api.names("deployments") == ["churn-rev-2"]
    assert all(re.search(WAITING[reason], failure.reason) for failure in looks[:3])


@pytest.mark.parametrize("reason", WAITING)
def test_a_deploy_that_waited_in_vain_says_for_what_and_what_served_still_serves(deploy, api, waits_for_room, reason):
    deploy()
    waits_for_room(reason)
    with pytest.raises(DeployFailed, match=rf"(?s)not ready after 0.3 s \(.*{WAITING[reason]}.*rev-1 still serves"):
        deploy(timeout_s=30, wait_s=0.3)
    assert api.names("deployments") == ["churn-rev-1"]
    assert api.objects["/api/v1/namespaces/ml/services/churn"]["spec"]["selector"]["mlfuncs.dev/revision"] == "rev-1"


def test_traffic_waits_until_as_many_pods_are_ready_as_the_function_wants_at_least(deploy, api):
    with pytest.raises(DeployFailed, match=r"rev-1: 1 of 2 pods ready"):  # its autoscaler has not looked at it yet
        deploy(function=churn.with_options(scale=ml.Scale(min=2, max=3)), wait_s=0.2)


def test_the_newest_of_a_pods_events_is_the_evidence(api):
    said = {"old": ("2026-01-01T10:00:00Z", "no secret"), "new": ("2026-01-01T10:00:05Z", "no claim")}
    for name, (seen, message) in sorted(said.items()):  # the API lists by name
        event = {"metadata": {"name": name}, "lastTimestamp": seen, "reason": "FailedMount", "message": message}
        api.objects[f"/api/v1/namespaces/ml/events/{name}"] = event
    cluster = Cluster("ml", client.ApiClient(client.Configuration(host=api.url)))
    assert cluster.events("churn") == ["FailedMount: no secret", "FailedMount: no claim"]


def test_an_apply_that_is_refused_half_way_leaves_what_served_and_nothing_new(deploy, api):
    endpoint = deploy()
    said = 'horizontalpodautoscalers.autoscaling is forbidden: User "dev" cannot patch resource'
    api.faults["PATCH", "/horizontalpodautoscalers/churn-rev-2"] = (403, said)
    with pytest.raises(Forbidden, match=r"cannot patch resource.*render platform"):
        deploy(timeout_s=30)
    assert api.names("deployments") == ["churn-rev-1"] and endpoint.status().traffic == {"rev-1": 100}
    assert api.objects["/api/v1/namespaces/ml/services/churn"]["spec"]["selector"]["mlfuncs.dev/revision"] == "rev-1"


def test_a_full_quota_for_objects_and_bad_credentials_are_named(deploy, api):
    said = 'services "churn" is forbidden: exceeded quota: objects, requested: count/services=1, limited: 0'
    api.faults["PATCH", "/services/"] = (403, said)
    with pytest.raises(DeployFailed, match=r"exceeded quota: objects.*have the quota raised"):
        deploy()
    api.faults["PATCH", "/services/"] = (401, "Unauthorized")
    with pytest.raises(Forbidden, match="does not accept the credentials of KUBECONFIG"):
        deploy()


def test_a_quota_and_a_denied_role_are_named(deploy, api):
    message = 'deployments.apps "churn-rev-1" is forbidden: User "dev" cannot patch resource "deployments"'
    api.faults["PATCH", "/deployments/"] = (403, message)
    with pytest.raises(Forbidden, match=r"cannot patch resource.*render platform"):
        deploy()
    api.faults.clear()

    def over_quota(path, manifest):
        if "/deployments/" in path:
            condition = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: compute"}
            manifest["status"] = {"observedGeneration": 99, "conditions": [condition]}

    api.behaviour = over_quota
    with pytest.raises(DeployFailed, match="exceeded quota: compute; lower resources"):
        deploy(wait_s=0.3)


def test_kinds_and_namespaces_that_the_cluster_lacks_are_named(deploy, api, monkeypatch):
    unknown = "the server could not find the requested resource"
    api.faults["PATCH", "/serving.knative.dev/"] = (404, unknown)
    with pytest.raises(SpecError, match=r"does not know Service of serving.knative.dev/v1: install Knative Serving"):
        deploy("knative", name="other")
    api.faults["PATCH", "/httproutes/"] = (404, unknown)
    monkeypatch.setenv("MLFUNCS_KUBERNETES_GATEWAY", "public")
    with pytest.raises(SpecError, match=r"HTTPRoute .*: install the Gateway API"):
        deploy()
    api.faults["PATCH", "/serviceaccounts/"] = (404, 'namespaces "ml" not found')
    with pytest.raises(SpecError, match="no namespace 'ml': apply 'mlfuncs render platform'"):
        deploy()


def test_a_field_that_the_clusters_version_of_a_kind_lacks_is_the_specs_fault(deploy, api):
    said = "failed to create typed patch object (ml/churn; apps/v1): .spec.x: field not declared in schema"
    api.faults["PATCH", "/deployments/"] = (500, said)
    with pytest.raises(SpecError, match=r"\.spec\.x: field not declared in schema"):
        deploy()


def test_a_deployment_that_never_gets_ready_is_given_up(deploy, api):
    api.behaviour = lambda path, manifest: None
    with pytest.raises(DeployFailed, match=r"not ready after 0.2 s \(rev-1: 0 of 1 pods ready\)"):
        deploy(wait_s=0.2)
    assert api.names("deployments") == []


def test_an_object_of_another_name_is_left_alone(deploy, api):
    other = {"app.kubernetes.io/name": "other", "app.kubernetes.io/part-of": "test"}
    key = "/apis/apps/v1/namespaces/ml/deployments/other-rev-1"
    api.objects[key] = {"metadata": {"name": "other-rev-1", "labels": other}}
    deploy()
    deploy(timeout_s=30)
    assert key in api.objects


def test_a_split_needs_a_gateway_and_is_warned_of_without_one(deploy, api, monkeypatch):
    deploy()
    with pytest.warns(UserWarning, match="a Service cannot weigh, so rev-1 gets all of it"):
        deploy(timeout_s=30, traffic=20)
    monkeypatch.setenv("MLFUNCS_KUBERNETES_GATEWAY", "infra/public@ml.example.com")
    endpoint = deploy(timeout_s=40, traffic=20)
    assert endpoint.url == "http://churn.ml.example.com"
    route = api.objects["/apis/gateway.networking.k8s.io/v1/namespaces/ml/httproutes/churn"]
    weights = {backend["name"]: backend["weight"] for backend in route["spec"]["rules"][0]["backendRefs"]}
    assert weights == {"churn-rev-1": 64, "churn-rev-2": 16, "churn-rev-3": 20}
    monkeypatch.delenv("MLFUNCS_KUBERNETES_GATEWAY")
    deploy(timeout_s=50)
    assert api.names("httproutes") == []


def test_with_keda_a_revision_at_zero_is_ready(deploy, api, monkeypatch):
    monkeypatch.setenv("MLFUNCS_KUBERNETES_KEDA", "keda")

    def scaled_to_zero(path, manifest):
        becomes_ready(api, path, manifest)
        if "/deployments/" in path:
            manifest["spec"]["replicas"] = 0
            manifest["status"]["readyReplicas"] = 0

    api.behaviour = scaled_to_zero
    idle = churn.with_options(scale=ml.Scale(min=0, max=3))
    endpoint = deploy(function=idle)
    assert endpoint.url == "http://churn.ml.svc.cluster.local:8080"
    assert api.names("interceptorroutes") == api.names("scaledobjects") == ["churn-rev-1"]
    assert api.names("horizontalpodautoscalers") == []
    service = api.objects["/api/v1/namespaces/ml/services/churn"]
    assert service["spec"]["externalName"] == "keda-add-ons-http-interceptor-proxy.keda.svc.cluster.local"
    deploy(function=idle, timeout_s=30)
    assert api.names("interceptorroutes") == ["churn-rev-2"]


def test_a_role_without_kinds_that_the_cluster_lacks_is_enough(deploy, api):
    for kind in ("scaledobjects", "interceptorroutes", "httproutes"):
        api.faults["GET", f"/{kind}"] = (403, f"cannot list resource {kind!r}")
    deploy()
    assert deploy(timeout_s=30).revision == "rev-2"


def test_knative_moves_traffic_when_its_revision_is_ready(deploy, api):
    endpoint = deploy("knative")
    assert endpoint.url == "http://churn.ml.example.com"
    deploy("knative", timeout_s=30, traffic=20)
    service = api.objects["/apis/serving.knative.dev/v1/namespaces/ml/services/churn"]
    split = {target["revisionName"]: target["percent"] for target in service["spec"]["traffic"]}
    assert split == {"churn-rev-1": 80, "churn-rev-2": 20}
    endpoint.promote()
    service = api.objects["/apis/serving.knative.dev/v1/namespaces/ml/services/churn"]
    assert [target["revisionName"] for target in service["spec"]["traffic"]] == ["churn-rev-2"]


@pytest.fixture
def knative(api):
    """Knative's rules for revisions that are named: a template changes only with its name, a revision never."""
    names = "/apis/serving.knative.dev/v1/namespaces/ml"
    seen = {}

    def takes(path, manifest):
        becomes_ready(api, path, manifest)
        if not path.endswith("/services/churn"):
            return
        template = copy.deepcopy(manifest["spec"]["template"])
        name = template["metadata"]["name"]
        assert seen.get("template", template) == template or seen["template"]["metadata"]["name"] != name, (
            "Saw the following changes without a name change"
        )
        assert seen.setdefault(name, template["spec"]) == template["spec"], f"revision {name} already exists"
        seen["template"] = template
        api.objects[f"{names}/revisions/{name}"]["spec"] = template["spec"]

    api.behaviour = takes
    return seen


def test_knative_takes_known_revisions_from_a_release_that_renders_them_differently(deploy, knative, monkeypatch):
    endpoint = deploy("knative")
    deploy("knative", timeout_s=30, traffic=20)
    monkeypatch.setattr("mlfuncs_runtime.manifests.workload.READY_PATH", "/-/another")
    endpoint.promote()  # the Service's own template
    endpoint.rollback()  # a revision that only exists
    assert knative["template"]["metadata"]["name"] == "churn-rev-1"
    deploy("knative", timeout_s=40)
    ready = knative["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"]
    assert (knative["template"]["metadata"]["name"], ready) == ("churn-rev-3", "/-/another")


def test_knative_gets_its_template_back_after_a_deploy_that_failed(deploy, api, knative):
    deploy("knative")
    takes = api.behaviour

    def fails(path, manifest):
        takes(path, manifest)
        name = manifest["spec"]["template"]["metadata"]["name"]
        if name == "churn-rev-2":
            condition = {"type": "Ready", "status": "False", "reason": "ExitCode1", "message": "no model"}
            api.objects[f"/apis/serving.knative.dev/v1/namespaces/ml/revisions/{name}"]["status"] = {
                "conditions": [condition]
            }

    api.behaviour = fails
    with pytest.raises(DeployFailed, match=r"ExitCode1: no model; rev-1 still serves"):
        deploy("knative", timeout_s=30)
    service = api.objects["/apis/serving.knative.dev/v1/namespaces/ml/services/churn"]
    assert service["spec"]["template"]["metadata"]["name"] == "churn-rev-1"
    assert [target["revisionName"] for target in service["spec"]["traffic"]] == ["churn-rev-1"]


def test_a_revision_of_an_endpoint_that_was_deleted_is_not_taken_for_the_new_ones(deploy, api, knative):
    deploy("knative").delete()  # the cluster removes its revisions some time later
    knative.clear()
    with pytest.raises(DeployFailed):  # of the image that served before: Knative refuses, and is asked with the new one
        api.behaviour = lambda path, manifest: None
        api.objects["/apis/serving.knative.dev/v1/namespaces/ml/revisions/churn-rev-1"]["status"] = {}
        deploy("knative", timeout_s=30, wait_s=0.2)
    patched = [body for *_, body in api.applied if body["kind"] == "Service"]
    images = [body["spec"]["template"]["spec"]["containers"][0]["image"] for body in patched]
    assert images[0] != images[-1]


def test_knative_says_why_a_revision_is_not_ready(deploy, api):
    def fails(path, manifest):
        condition = {"type": "Ready", "status": "False", "reason": "ContainerMissing", "message": "no such image"}
        api.objects["/apis/serving.knative.dev/v1/namespaces/ml/revisions/churn-rev-1"] = {
            "metadata": {"name": "churn-rev-1"},
            "status": {"conditions": [condition]},
        }

    api.behaviour = fails
    with pytest.raises(DeployFailed, match="ContainerMissing: no such image"):
        deploy("knative")


def test_status_and_logs_come_from_the_pods(deploy, api):
    endpoint = deploy()
    api.objects["/api/v1/namespaces/ml/pods/churn-rev-1-abc"] = pod(
        "rev-1", conditions=[{"type": "Ready", "status": "True"}]
    )
    api.pod_logs["churn-rev-1-abc"] = "one\ntwo"
    status = endpoint.status()
    assert (status.state, status.revision, len(status.replicas)) == ("ready", "rev-1", 1)
    assert list(endpoint.logs()) == ["one", "two"]


def test_without_a_registry_or_a_cluster_the_message_says_what_to_set(deploy, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFUNCS_IMAGE_REGISTRY")
    with pytest.raises(SpecError, match="MLFUNCS_IMAGE_REGISTRY"):
        deploy()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(Unavailable, match="KUBECONFIG"):
        targets.open_target("kubernetes", read_settings())


def test_an_api_server_that_is_away_is_named():
    cluster = Cluster("ml", client.ApiClient(client.Configuration(host="http://127.0.0.1:9")))
    started = time.monotonic()
    with pytest.raises(Unavailable, match="does not answer"):
        cluster.get("Pod", "x")
    assert time.monotonic() - started < 20
