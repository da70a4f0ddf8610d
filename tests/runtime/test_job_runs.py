"""Runs as Kubernetes Jobs: the real client, an API server of the tests' own, and the container's command as it is."""

import json
import subprocess
import sys
import textwrap
import time

import pytest
from kubernetes import client

import mlfuncs as ml
from mlfuncs.cli import main
from mlfuncs.errors import DeadlineExceeded, RunFailed, SpecError
from mlfuncs.loading import load_target
from mlfuncs.runs import elsewhere
from mlfuncs_runtime.images.builder import MemoryBuilder
from mlfuncs_runtime.kubernetes.cluster import Cluster
from mlfuncs_runtime.kubernetes.runs import KubernetesRuns
from tests.runtime import fake_kubernetes, local_jobs

SOURCE = """
    import os
    import sys
    import time
    from pathlib import Path
    from typing import Any, NamedTuple
    import numpy as np
    import mlfuncs as ml

    class NotFound(Exception):
        pass

    class Trained(NamedTuple):
        model: Any
        weights: np.ndarray
        auc: float

    class Model:
        def __init__(self, depth):
            self.depth = depth

        def fit(self, x):
            return self

        def get_params(self):
            return {"depth": self.depth}

        def predict(self):
            return self.depth * 2

    @ml.function(requirements=[])
    def train(depth: int, data: np.ndarray) -> Trained:
        for step in range(3):
            ml.log_metric("loss", 1 / (step + 1), step=step)
        print("training", depth, end="", flush=True)
        ml.log_artifact("data", data * 2)
        print(" done", file=sys.stderr)
        return Trained(Model(depth), data + depth, 0.9)

    @ml.function(requirements=[])
    def light(depth: int) -> dict[str, Any]:
        ml.log_metric("uid", os.getuid())
        print("in the image:", os.path.exists("/opt/mlfuncs"))
        return {"model": Model(depth), "rows": [depth] * 3}

    @ml.function(requirements=[], retries=2)
    def flaky(flag: str) -> str:
        path = Path(flag)
        tries = int(path.read_text()) if path.exists() else 0
        path.write_text(str(tries + 1))
        print("try", tries + 1)
        if tries < 2:
            raise NotFound("no luck")  # named as one of ours after which nothing is tried again
        return "at last"

    @ml.function(requirements=[])
    def wait(flag: str, seconds: float = 60.0) -> str:
        print("begun", flush=True)
        deadline = time.monotonic() + seconds
        while not Path(flag).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return "waited"

    @ml.function(requirements=[])
    def large() -> bytes:
        return os.urandom(9 << 20)

    @ml.function(requirements=[], secrets=["PASSPHRASE"])
    def tell() -> int:
        value = ml.secret("PASSPHRASE")
        print("it is", value)
        return len(value)

    @ml.function(requirements=[], retries=1)
    def die() -> None:
        os._exit(9)

    @ml.function(requirements=[])
    def about(target: str) -> str:
        return target
"""


@pytest.fixture
def api():
    fake = fake_kubernetes.FakeKubernetes()
    yield fake
    fake.close()


@pytest.fixture
def opened(api, monkeypatch):
    """Makes every KubernetesRuns use the API server of the test; the options that a test sets."""
    options = {"poll_s": 0.05, "patience_s": 300.0}

    def open_runs(settings):
        cluster = Cluster(settings.kubernetes_namespace, client.ApiClient(client.Configuration(host=api.url)))
        runs = KubernetesRuns(settings, cluster, MemoryBuilder())
        for name, value in options.items():
            setattr(runs, name, value)
        return runs

    found = elsewhere.adapters.load

    def load_adapter(name):
        return open_runs if name == "runs:kubernetes" else found(name)

    monkeypatch.setattr(elsewhere, "ASK_S", 0.0)
    monkeypatch.setattr(elsewhere.adapters, "load", load_adapter)
    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", "registry.example/base:1")
    monkeypatch.setenv("MLFUNCS_KUBERNETES_NAMESPACE", "ml")
    return options


@pytest.fixture
def jobs(api, opened, tmp_path):
    made = local_jobs.LocalJobs(api, tmp_path)
    yield made
    made.join()


@pytest.fixture
def function(tmp_path):
    path = tmp_path / "work.py"
    path.write_text(textwrap.dedent(SOURCE))
    return lambda name: load_target(f"{path}:{name}")


def until(holds, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return False


def test_a_run_as_a_job_is_a_run_like_any_other(jobs, function, api, capsys):
    import numpy as np

    run = function("train").run(target="kubernetes", depth=3, data=np.arange(4.0))
    assert run.status == "succeeded" and run.row.isolation == "kubernetes"
    assert run.outputs["weights"].load().tolist() == [3.0, 4.0, 5.0, 6.0] and run.outputs["auc"] == 0.9
    assert run.artifacts["data"].load().tolist() == [0.0, 2.0, 4.0, 6.0]
    assert run.outputs["model"].load().predict() == 6  # pickled in the pod, and trusted here
    assert [point.value for point in run.metric_history("loss")] == [1.0, 0.5, 1 / 3]
    assert run.logs == "training 3 done\n" and "training 3 done" in capsys.readouterr().out
    assert run.params["depth"] == 3 and run.versions["bundle"] and run.cpu_s > 0
    (job,) = api.names("jobs")
    assert job == f"train-{run.id}" and run.row.details["job"]["image"] == "registry.example/base:1"


def test_the_command_line_runs_a_job(jobs, function, tmp_path, capsys):
    main(["run", f"{tmp_path}/work.py:about", "--target", "kubernetes", "-p", 'target="moon"', "--json"])
    assert json.loads(capsys.readouterr().out)["outputs"] == {"output": "moon"}


def test_artifacts_go_through_a_shared_store_when_there_is_one(jobs, function, api, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setenv("MLFUNCS_ARTIFACTS_URL", f"local://{tmp_path}/shared")
    run = function("train").run(target="kubernetes", depth=1, data=np.arange(2.0))
    assert run.outputs["weights"].load().tolist() == [1.0, 2.0] and run.outputs["model"].load().predict() == 2
    (order,) = [value for key, value in api.objects.items() if "/configmaps/" in key]
    assert order["binaryData"] == {} and json.loads(order["data"]["order.json"])["shared"]


def test_attempts_are_the_jobs_and_each_leaves_its_log(jobs, function, tmp_path):
    run = function("flaky").run(target="kubernetes", flag=str(tmp_path / "flag"))
    assert run.output == "at last" and run.row.attempt == 3
    again = "attempt {} failed (NotFound: no luck); trying again\n"
    assert run.logs == f"try 1\n{again.format(1)}try 2\n{again.format(2)}try 3\n"


def test_the_time_limit_of_an_attempt_is_kept_in_the_pod(jobs, function, tmp_path, api):
    with pytest.raises(RunFailed, match="DeadlineExceeded: it ran longer than 1 s"):
        function("wait").run(target="kubernetes", timeout_s=1, flag=str(tmp_path / "never"))
    (job,) = [value for key, value in api.objects.items() if "/jobs/" in key]
    assert job["spec"]["activeDeadlineSeconds"] == 601


def test_cancel_deletes_the_job_and_stops_the_function(jobs, function, tmp_path, api):
    run = function("wait").run(target="kubernetes", wait=False, flag=str(tmp_path / "never"))
    assert until(lambda: "begun" in run.logs)
    run.cancel()
    assert run.status == "cancelled" and api.names("jobs") == []
    for process in jobs.processes.values():
        assert process.wait(60) == 143


def test_a_job_outlives_the_process_that_started_it_and_is_found_again(jobs, function, tmp_path, api):
    flag, source = tmp_path / "flag", tmp_path / "work.py"
    script = tmp_path / "client.py"
    script.write_text(
        textwrap.dedent(f"""
        import os
        from kubernetes import client
        from mlfuncs import adapters
        from mlfuncs.loading import load_target
        from mlfuncs_runtime.kubernetes.cluster import Cluster
        from mlfuncs_runtime.kubernetes.runs import KubernetesRuns
        real = adapters.load
        def open_runs(settings):
            api = client.ApiClient(client.Configuration(host={api.url!r}))
            return KubernetesRuns(settings, Cluster("ml", api))
        adapters.load = lambda name: open_runs if name == "runs:kubernetes" else real(name)
        run = load_target("{source}:wait").run(target="kubernetes", wait=False, flag={str(flag)!r})
        while "begun" not in run.logs:
            pass
        print("\\n" + run.id, flush=True)
        os.kill(os.getpid(), 9)
        """)
    )
    died = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode == -9, died.stderr
    run_id = died.stdout.split()[-1]
    assert ml.get_run(run_id).status == "running"
    with pytest.raises(DeadlineExceeded):
        ml.get_run(run_id).wait(0.1)
    flag.touch()
    run = ml.get_run(run_id).wait(60)
    assert (run.status, run.output, run.logs) == ("succeeded", "waited", "begun\n")


def test_a_run_that_nobody_follows_can_be_cancelled(jobs, function, tmp_path, api, monkeypatch):
    run = function("wait").run(target="kubernetes", wait=False, flag=str(tmp_path / "never"))
    assert until(lambda: "begun" in run.logs)
    other = ml.get_run(run.id)
    assert other.cancel().status == "cancelled" and api.names("jobs") == []
    assert run.wait(30).status == "cancelled"


def test_outputs_too_large_for_a_log_say_where_to_put_them(jobs, function):
    with pytest.raises(RunFailed, match=r"more than 8 MiB.*MLFUNCS_ARTIFACTS_URL"):
        function("large").run(target="kubernetes")


def test_a_secret_is_referred_to_and_masked_where_only_the_cluster_knows_it(jobs, function, api, tmp_path):
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "PASSPHRASE").write_text("open-sesame")
    environ = jobs.environ
    jobs.environ = lambda job, name: {**environ(job, name), "MLFUNCS_SECRETS_DIR": str(folder)}
    run = function("tell").run(target="kubernetes")
    assert run.output == 11 and run.logs == "it is ***\n"
    assert "open-sesame" not in json.dumps(api.objects) and "open-sesame" not in "".join(
        path.read_text() for path in tmp_path.glob("*.log")
    )
    (job,) = [value for key, value in api.objects.items() if "/jobs/" in key]
    (secrets,) = [v["secret"] for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "secrets"]
    assert secrets["secretName"] == "tell-secrets"


def test_what_no_attempt_can_mend_is_not_tried_again(jobs, function, api, tmp_path):
    mounted = jobs.mounted

    def tampered(job):
        archive = mounted(job) / "bundle.zip"
        archive.write_bytes(archive.read_bytes()[:-1] + b"x")
        return archive.parent

    jobs.mounted = tampered
    with pytest.raises(RunFailed, match="UntrustedError"):
        function("flaky").run(target="kubernetes", flag=str(tmp_path / "flag"))
    (run,) = ml.list_runs()
    assert run.row.attempt == 1 and not (tmp_path / "flag").exists()


def test_a_process_that_dies_is_tried_again_and_named(jobs, function):
    with pytest.raises(RunFailed, match="ProcessDied: its process died: it ended with exit code 9"):
        function("die").run(target="kubernetes")
    (run,) = ml.list_runs()
    assert run.row.attempt == 2 and "attempt 1 failed" in run.logs


def test_a_parameter_of_its_own_named_target_stays_the_functions(jobs, function):
    assert function("about").run(target="moon").output == "moon"
    assert ml.run(function("about"), {"target": "moon"}, target="kubernetes").output == "moon"


def test_targets_and_isolation_are_told_apart(function):
    with pytest.raises(SpecError, match="write target='docker'"):
        ml.run(function("about"), {"target": "x"}, isolation="docker")
    with pytest.raises(SpecError, match="'docker' or 'kubernetes', not 'moon'"):
        ml.run(function("about"), {"target": "x"}, target="moon")


# --- what a cluster refuses, with answers in the shapes that it gives


def pending(**status):
    """A cluster whose pods never start, for the reason in `status`."""

    def applied(api):
        def behaviour(path, manifest):
            if manifest["kind"] != "Job":
                return
            name = manifest["metadata"]["name"]
            labels = {"batch.kubernetes.io/job-name": name}
            api.objects[f"/api/v1/namespaces/ml/pods/{name}-x"] = {
                "metadata": {"name": f"{name}-x", "labels": labels},
                "status": {"phase": "Pending", **status},
            }

        api.behaviour = behaviour

    return applied


def waits(reason, message):
    state = {"image": "registry.example/base:1", "state": {"waiting": {"reason": reason, "message": message}}}
    return {"containerStatuses": [state]}


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient cpu.",
}
REFUSALS = {
    "cannot be pulled .ImagePullBackOff: Back-off pulling.*image_pull_secrets": pending(
        **waits("ImagePullBackOff", 'Back-off pulling image "registry.example/base:1"')
    ),
    "CreateContainerConfigError: secret .train-secrets. not found.*is its Secret there": pending(
        **waits("CreateContainerConfigError", 'secret "train-secrets" not found')
    ),
    "fits on no node: 0/3 nodes.*lower resources": pending(conditions=[UNSCHEDULABLE]),
    "a volume cannot be mounted: .*references non-existent secret key: KEY; make": pending(
        **waits("ContainerCreating", "")
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_pod_that_cannot_start_is_named_and_its_job_deleted(opened, function, api, message):
    import numpy as np

    opened["patience_s"] = 0.0
    said = 'MountVolume.SetUp failed for volume "secrets" : references non-existent secret key: KEY'
    api.objects["/api/v1/namespaces/ml/events/e"] = {"metadata": {}, "reason": "FailedMount", "message": said}
    REFUSALS[message](api)
    with pytest.raises(RunFailed, match=f"NotStarted: .*{message}"):
        function("train").run(target="kubernetes", depth=1, data=np.zeros(1))
    assert api.names("jobs") == []


def test_a_full_quota_is_borne_for_a_while_and_then_named(opened, function, api):
    said = 'Error creating: pods "about-x" is forbidden: exceeded quota: compute, requested: cpu=4, limited: cpu=2'
    api.objects["/api/v1/namespaces/ml/events/e"] = {
        "metadata": {"name": "e"},
        "reason": "FailedCreate",
        "message": said,
    }
    opened["patience_s"] = 0.3
    with pytest.raises(RunFailed, match=r"exceeded quota: compute.*have the quota raised"):
        ml.run(function("about"), {"target": "x"}, target="kubernetes")
    (run,) = ml.list_runs()
    assert run.logs.count("mlfuncs: waiting: no pod can be made: Error creating") == 1


def test_a_denied_role_is_named_with_the_role_to_bind(opened, function, api):
    api.faults["PATCH", "/jobs/"] = (403, 'jobs.batch is forbidden: User "dev" cannot patch resource "jobs"')
    with pytest.raises(RunFailed, match=r"Forbidden: .*cannot patch resource.*render platform"):
        ml.run(function("about"), {"target": "x"}, target="kubernetes")
    api.faults.clear()


def test_a_cluster_that_does_not_answer_for_a_while_is_waited_for(jobs, function, tmp_path, api):
    flag = tmp_path / "flag"
    run = function("wait").run(target="kubernetes", wait=False, flag=str(flag))
    assert until(lambda: "begun" in run.logs)
    api.faults["GET", "/jobs/"] = (503, "etcd leader changed")
    assert until(lambda: "etcd leader changed" in run.logs)
    api.faults.clear()
    flag.touch()
    assert run.wait(60).status == "succeeded"


def test_a_pod_killed_for_memory_is_named(opened, function, api):
    def behaviour(path, manifest):
        if manifest["kind"] != "Job" or manifest["spec"]["suspend"]:
            return
        name = manifest["metadata"]["name"]
        killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
        api.pod_streams[f"{name}-x"] = lambda: iter([b"half a line"])
        api.objects[f"/api/v1/namespaces/ml/pods/{name}-x"] = {
            "metadata": {"name": f"{name}-x", "labels": {"batch.kubernetes.io/job-name": name}},
            "status": {"phase": "Failed", "containerStatuses": [{"state": killed}]},
        }
        over = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "reached"}
        manifest["status"] = {"conditions": [over]}

    api.behaviour = behaviour
    with pytest.raises(RunFailed, match=r"ProcessDied: its pod failed: it needs more memory.*raise resources\.memory"):
        ml.run(function("about"), {"target": "x"}, target="kubernetes")


@pytest.mark.slow
def test_the_pod_is_the_image_and_what_the_manifest_says(opened, function, api, tmp_path, monkeypatch, docker_base):
    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", docker_base)
    jobs = local_jobs.DockerJobs(api, tmp_path)
    try:
        run = function("light").run(target="kubernetes", depth=3)
        assert run.outputs["rows"] == [3, 3, 3] and run.outputs["model"].load().predict() == 6
        assert run.metrics == {"uid": 10001} and run.logs == "in the image: True\n"
    finally:
        jobs.join()
