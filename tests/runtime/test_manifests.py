"""Manifests: golden files, the real schemas of Kubernetes' core types, and what each platform cannot say."""

import dataclasses

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.errors import SpecError
from mlfuncs.spec import FunctionSpec, Pod, Scale
from mlfuncs_runtime.manifests.knative import knative_warnings, render_knative, scale_annotations, to_percentages
from mlfuncs_runtime.manifests.kubernetes import kubernetes_warnings, render_kubernetes
from mlfuncs_runtime.manifests.platform import render_platform
from mlfuncs_runtime.manifests.routing import KubernetesOptions
from mlfuncs_runtime.manifests.workload import Workload, container
from tests.runtime.rendered import check_golden, everything

EVERYTHING = everything(scale=Scale(min=1, max=4, concurrency=8, target=6, scale_down_delay_s=30))
WORKLOADS = {
    "plain": Workload("churn", "shop", "rev-1", "registry.example/churn:1", FunctionSpec(name="churn")),
    "everything": Workload(
        "churn",
        "shop",
        "rev-3",
        "registry.example/churn:3",
        EVERYTHING,
        "ml",
        {"rev-2": 90, "rev-3": 10},
        {"new": "rev-3"},
    ),
}
RENDERERS = {
    "knative": render_knative,
    "kubernetes": render_kubernetes,
    "gateway": lambda workload: render_kubernetes(workload, KubernetesOptions(gateway="infra/public", domain="ml.io")),
    "keda": lambda workload: render_kubernetes(workload, KubernetesOptions(keda="keda")),
    "keda-gateway": lambda workload: render_kubernetes(
        workload, KubernetesOptions(keda="keda", gateway="public", domain="ml.io")
    ),
}


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_manifests_are_as_the_golden_files_say(name, renderer):
    check_golden(f"{renderer}-{name}", RENDERERS[renderer](WORKLOADS[name]))


@pytest.mark.parametrize("name", WORKLOADS)
def test_core_types_are_valid_for_kubernetes(name):
    for manifest in render_kubernetes(WORKLOADS[name]):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_meet_the_restricted_standard(name):
    deployment = next(m for m in render_kubernetes(WORKLOADS[name]) if m["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    context = pod["containers"][0]["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] > 0 and context["readOnlyRootFilesystem"]
    assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False


def test_the_drain_fits_into_the_grace_period():
    deployment = next(m for m in render_kubernetes(WORKLOADS["plain"]) if m["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + WORKLOADS["plain"].drain_s


def test_secrets_are_referred_to_never_written():
    text = yaml.safe_dump_all(render_kubernetes(WORKLOADS["everything"]))
    assert "secretName: churn-secrets" in text and "kind: Secret" not in text


def test_every_selector_finds_its_own_pods_only():
    for manifest in render_kubernetes(WORKLOADS["everything"]):
        if manifest["kind"] == "Deployment":
            wanted = manifest["spec"]["selector"]["matchLabels"]
            assert wanted.items() <= manifest["spec"]["template"]["metadata"]["labels"].items()
            assert wanted["mlfuncs.dev/revision"] == "rev-3"


def test_the_main_service_selects_the_revision_with_the_largest_share():
    services = {m["metadata"]["name"]: m for m in render_kubernetes(WORKLOADS["everything"]) if m["kind"] == "Service"}
    assert services["churn"]["spec"]["selector"]["mlfuncs.dev/revision"] == "rev-2"
    assert services["churn-rev-3"]["spec"]["selector"]["mlfuncs.dev/revision"] == "rev-3"


def test_knative_says_what_is_for_the_whole_cluster_only():
    spec = FunctionSpec(name="f", scale=Scale(initial=0, buffer=2, grace_s=5, window_s=2), timeout_s=900)
    warnings = "\n".join(knative_warnings(Workload("f", "p", "rev-1", "i", spec)))
    for word in (
        "config-autoscaler",
        "allow-zero-initial-scale",
        "scale.buffer=2",
        "scale.window_s=2",
        "timeout_s=900",
    ):
        assert word in warnings
    assert knative_warnings(WORKLOADS["plain"]) == []


def test_knative_gets_values_that_it_takes():
    assert scale_annotations(Scale(window_s=2))["autoscaling.knative.dev/window"] == "6s"
    assert scale_annotations(Scale(target=0.001))["autoscaling.knative.dev/target"] == "0.01"
    spec = FunctionSpec(
        name="f",
        env={"PORT": "9", "K_SERVICE": "x", "MINE": "1"},
        scale=Scale(concurrency=5000, target=0.001),
        pod=Pod(
            volumes={"/d": {"nfs": {"server": "s", "path": "/"}}, "/m": {"persistentVolumeClaim": {"claimName": "m"}}}
        ),
    )
    workload = Workload("f", "p", "rev-1", "i", spec)
    template = render_knative(workload)[0]["spec"]["template"]["spec"]
    assert template["containerConcurrency"] == 1000
    names = [item["name"] for item in template["containers"][0]["env"]]
    assert "MINE" in names and not {"PORT", "K_SERVICE"} & set(names)
    warnings = "\n".join(knative_warnings(workload))
    for word in ("concurrency=5000", "target=0.001", "env PORT", "env K_SERVICE", "no nfs", "persistent-volume-write"):
        assert word in warnings


def test_kubernetes_says_that_zero_needs_keda():
    assert any("KEDA" in warning for warning in kubernetes_warnings(WORKLOADS["plain"]))
    assert not any(
        "KEDA" in warning for warning in kubernetes_warnings(WORKLOADS["plain"], KubernetesOptions(keda="keda"))
    )


def test_a_split_without_a_gateway_is_warned_of_and_with_one_weighed():
    plain, weighed = KubernetesOptions(), KubernetesOptions(gateway="infra/public", domain="ml.io")
    assert "rev-2 gets all of it" in "\n".join(kubernetes_warnings(WORKLOADS["everything"], plain))
    assert not any("weigh" in warning for warning in kubernetes_warnings(WORKLOADS["everything"], weighed))
    (route,) = [m for m in render_kubernetes(WORKLOADS["everything"], weighed) if m["kind"] == "HTTPRoute"]
    assert {b["name"]: b["weight"] for b in route["spec"]["rules"][0]["backendRefs"]} == {
        "churn-rev-2": 90,
        "churn-rev-3": 10,
    }
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "infra"}]


def test_only_the_revision_that_serves_has_the_endpoints_names_at_the_interceptor():
    def hosts(revision):
        workload = dataclasses.replace(WORKLOADS["everything"], revision=revision)
        objects = render_kubernetes(workload, KubernetesOptions(keda="keda"))
        (route,) = [m for m in objects if m["kind"] == "InterceptorRoute"]
        return set(route["spec"]["rules"][0]["hosts"])

    assert "churn.ml" in hosts("rev-2") and hosts("rev-3") == {"churn-rev-3.ml"}
    assert not hosts("rev-2") & hosts("rev-3")


def test_keda_behind_a_gateway_is_granted_by_the_platform():
    options = KubernetesOptions(keda="keda", gateway="public")
    assert any("ReferenceGrant" in warning for warning in kubernetes_warnings(WORKLOADS["plain"], options))
    (grant,) = [m for m in render_platform("ml", options) if m["kind"] == "ReferenceGrant"]
    assert grant["metadata"]["namespace"] == "keda" and grant["spec"]["from"][0]["namespace"] == "ml"


def test_a_gateway_that_cannot_be_one_is_named(settings):
    bad = dataclasses.replace(settings, kubernetes_gateway="a/b/c")
    with pytest.raises(SpecError, match="a/b/c"):
        KubernetesOptions.of(bad)


@given(st.dictionaries(st.from_regex(r"rev-[1-9]", fullmatch=True), st.integers(1, 10_000), min_size=1))
def test_percentages_sum_to_100_and_stay_within_one_of_the_share(shares):
    percentages = to_percentages(shares)
    total = sum(shares.values())
    assert sum(percentages.values()) == 100
    assert all(abs(percentages[name] - 100 * share / total) < 1 for name, share in shares.items())


def test_a_function_may_take_long_to_load_before_its_liveness_is_asked():
    for workload in WORKLOADS.values():
        probe = container(workload)["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 600
        served = render_knative(workload)[0]["spec"]["template"]["spec"]["containers"][0]
        assert "port" not in served["startupProbe"]["httpGet"]  # Knative's own to say


def test_labels_of_free_text_become_annotations_and_impossible_ones_are_named():
    spec = FunctionSpec(name="f", labels={"team": "growth", "owner": "Ann & Bob", "note": "x" * 64, "empty": ""})
    workload = Workload("f", "p", "rev-1", "i", spec)
    for manifest in [*render_kubernetes(workload), *render_knative(workload)]:
        made = manifest["metadata"]
        assert (made["labels"]["team"], made["labels"]["empty"]) == ("growth", "")
        assert made["annotations"] == {"owner": "Ann & Bob", "note": "x" * 64}
    for key in ("a team", "-x", "x/y/z", "A.example/x", "y" * 64):
        with pytest.raises(SpecError, match="is none for Kubernetes"):
            render_kubernetes(Workload("f", "p", "rev-1", "i", FunctionSpec(name="f", labels={key: "v"})))


def test_a_name_that_no_service_can_have_is_refused_before_anything_is_applied():
    with pytest.raises(SpecError, match=r"'2f': a Kubernetes Service's name begins with a letter"):
        render_kubernetes(Workload("2f", "p", "rev-1", "i", FunctionSpec(name="2f")))


def test_names_and_labels_of_the_longest_endpoint_fit():
    workload = Workload("f" * 53, "p" * 63, "rev-9999", "i", FunctionSpec(name="f", secrets=("KEY",)))
    objects = render_kubernetes(workload)
    names = [manifest["metadata"]["name"] for manifest in objects] + [workload.secret_name]
    values = [value for manifest in objects for value in manifest["metadata"]["labels"].values()]
    assert max(map(len, names + values)) <= 63


def test_the_containers_port_stays_what_probes_and_services_know():
    workload = Workload("f", "p", "rev-1", "i", FunctionSpec(name="f", env={"PORT": "9000"}))
    assert {"name": "PORT", "value": "8080"} in container(workload)["env"]
    assert any("env PORT" in warning for warning in kubernetes_warnings(workload))


def test_gpus_are_asked_and_limited_alike():
    asked = container(WORKLOADS["everything"])["resources"]
    assert asked["requests"]["nvidia.com/gpu"] == asked["limits"]["nvidia.com/gpu"] == "1"
    assert asked["requests"]["cpu"] == "1500m" and "cpu" not in asked["limits"]
