"""`mlfuncs build` and `render` from the command line, the platform's manifests, and builds inside a cluster."""

import io
import json
import tarfile
import textwrap
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubernetes import client

from mlfuncs.cli import main
from mlfuncs.errors import NotFound, SpecError
from mlfuncs.loading import load_target
from mlfuncs_runtime.images.builder import MemoryBuilder
from mlfuncs_runtime.kubernetes.cluster import Cluster
from mlfuncs_runtime.manifests.platform import render_compose, render_platform
from mlfuncs_runtime.rendering import TARGETS, build_image, differences, render
from tests.runtime import fake_kubernetes

GOLDEN = Path(__file__).parent / "golden" / "manifests"


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "double.py"
    path.write_text(
        textwrap.dedent("""
        import mlfuncs as ml

        @ml.function(requirements=[], scale=ml.Scale(buffer=1))
        def double(x: float) -> float:
            return 2 * x
        """)
    )
    return f"{path}:double"


def run(capsys, *arguments):
    try:
        main(list(arguments))
    except SystemExit as exc:
        assert not exc.code, capsys.readouterr().err
    return capsys.readouterr()


@pytest.mark.parametrize("place", ["knative", "kubernetes", "nuclio", "job"])
def test_render_prints_yaml_and_warns_on_the_side(target, capsys, place):
    printed = run(capsys, "render", target, "--target", place)
    documents = list(yaml.safe_load_all(printed.out))
    assert all(document["metadata"]["name"].startswith("double") for document in documents)
    assert "scale.buffer" in printed.err or place in ("nuclio", "job")


def test_render_docker_is_a_dockerfile_whose_context_build_writes(target, capsys, tmp_path):
    printed = run(capsys, "render", target, "--target", "docker").out
    assert printed.startswith("FROM mlfuncs/base:") and "ADD " in printed
    run(capsys, "build", target, "--context", str(tmp_path / "context.tar.gz"))
    with tarfile.open(tmp_path / "context.tar.gz") as archive:
        assert archive.extractfile("Dockerfile").read().decode().strip() == printed.strip()
        (layer,) = [name for name in archive.getnames() if name.endswith(".tar")]
        with tarfile.open(fileobj=io.BytesIO(archive.extractfile(layer).read())) as members:
            assert "opt/function/functions/double.json" in members.getnames()


def test_json_has_the_documents(target, capsys):
    values = json.loads(run(capsys, "render", target, "--target", "knative", "--json").out)
    assert values["documents"][0]["kind"] == "Service" and values["warnings"]


def test_an_unknown_target_is_named_with_those_that_exist(target, settings):
    with pytest.raises(NotFound, match="did you mean 'knative'"):
        render(load_target(target), "knativ", settings)
    assert "docker" in TARGETS


def test_build_names_the_image_after_its_digest_and_pushes_when_asked(target, settings):
    builder = MemoryBuilder()
    built = build_image([load_target(target)], None, False, settings, print, builder)
    assert built.reference == f"mlfuncs/test-double:{built.id[7:19]}" and not builder.pushed
    pushed = build_image([load_target(target)], "host:5000/a/b", True, settings, print, builder)
    assert pushed.reference == "host:5000/a/b:latest" and builder.pushed == ["host:5000/a/b:latest"]
    assert pushed.repo_digest.startswith("host:5000/a/b@sha256:") and pushed.id == built.id


def test_diff_says_what_an_apply_would_change_and_changes_nothing(target, settings):
    fake = fake_kubernetes.FakeKubernetes()
    try:
        cluster = Cluster("default", client.ApiClient(client.Configuration(host=fake.url)))
        documents = render(load_target(target), "kubernetes", settings).documents
        first = differences(documents, settings, cluster)
        assert {item["change"] for item in first} == {"create"} and fake.objects == {}
        for document in documents:
            cluster.apply(document)
        assert {item["change"] for item in differences(documents, settings, cluster)} == {"none"}
        documents[2]["spec"]["template"]["spec"]["containers"][0]["image"] = "other:1"
        (changed,) = [item for item in differences(documents, settings, cluster) if item["change"] == "change"]
        assert any("other:1" in line for line in changed["diff"])
    finally:
        fake.close()


def test_the_platform_is_one_namespace_with_least_rights(capsys, monkeypatch):
    monkeypatch.setenv("MLFUNCS_KUBERNETES_NAMESPACE", "ml")
    documents = list(yaml.safe_load_all(run(capsys, "render", "platform").out))
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    assert not [document for document in documents if document["kind"].startswith("Cluster")]
    (role,) = [document for document in documents if document["kind"] == "Role"]
    assert not any("*" in rule["verbs"] + rule["resources"] for rule in role["rules"])
    assert not any("secrets" in rule["resources"] for rule in role["rules"])
    assert documents[0]["metadata"]["name"] == "ml"
    deny, allow = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress"]}
    function = yaml.safe_load((GOLDEN / "knative-plain.yaml").read_text())["spec"]["template"]["metadata"]["labels"]
    assert allow["podSelector"]["matchLabels"].items() <= function.items()
    assert {port["port"] for rule in allow["ingress"] for port in rule["ports"]} >= {8080, 8012}  # Nuclio's, Knative's


def test_the_platform_does_not_take_over_the_default_namespace():
    with pytest.raises(SpecError, match="MLFUNCS_KUBERNETES_NAMESPACE"):
        render_platform("default")


def test_compose_publishes_on_loopback_only_and_has_no_password_in_it():
    compose = render_compose("shop")
    assert compose["services"]["platform"]["ports"] == ["127.0.0.1:8080:8080"]
    text = yaml.safe_dump(compose)
    assert "${MLFUNCS_TOKEN:?" in text
    assert "${POSTGRES_PASSWORD:?" in text and "${REDIS_PASSWORD:?" in text
    assert compose["services"]["platform"]["read_only"]
