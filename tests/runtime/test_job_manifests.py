"""The Job of a run and its order: golden files, the real schemas, pod security, and what does not fit."""

import kubernetes_validate
import pytest

import mlfuncs as ml
from mlfuncs.errors import SpecError
from mlfuncs.runs import elsewhere
from mlfuncs.spec import FunctionSpec
from mlfuncs_runtime.manifests.jobs import RunJob, render_order, render_run_job
from tests.runtime.rendered import check_golden, everything

EVERYTHING = everything(claims=["data"], resources=ml.Resources(cpu=2, memory="4Gi", gpu=1), timeout_s=60, retries=3)


def job_of(spec, timeout_s=None, **files):
    run = "0123456789abcdef0123"
    name = elsewhere.Job(run, spec.name, "ml").name
    environ = {"MLFUNCS_PROJECT": "shop", "MLFUNCS_TRUSTED_KEYS": "ed25519:a2V5"}
    return RunJob(name, spec.name, "shop", run, "ml", "i:1", spec, timeout_s, {"run": run}, files, environ)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_job_manifests_are_as_the_golden_files_say_and_valid(name):
    job = job_of(FunctionSpec(name="churn")) if name == "plain" else job_of(EVERYTHING, 90.5, **{"bundle.zip": b"zip"})
    documents = [render_run_job(job, suspended=True), render_order(job, "1234")]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    check_golden(f"job-{name}", documents)


def test_a_runs_pods_are_restricted_and_no_endpoints():
    (job,) = [render_run_job(job_of(EVERYTHING))]
    pod = job["spec"]["template"]
    context = pod["spec"]["containers"][0]["securityContext"]
    assert context["runAsNonRoot"] and context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] != "churn"


def test_an_order_too_large_for_its_object_says_where_to_put_it():
    with pytest.raises(SpecError, match="MLFUNCS_ARTIFACTS_URL"):
        render_order(job_of(FunctionSpec(name="f"), **{"bundle.zip": b"x" * 1_000_001}), "1")


def test_names_of_jobs_fit_into_a_label():
    assert len(elsewhere.Job("0" * 20, "a" * 63, "ml").name) == 63
