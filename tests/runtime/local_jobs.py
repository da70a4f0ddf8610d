"""What a cluster does with Jobs, on this machine: the container's own command, started for each attempt.

The pods are processes or containers; their logs are served while they run. `FakeKubernetes` is the API server.
"""

import base64
import os
import subprocess
import sys
import threading
import time

JOBS, PODS = "/apis/batch/v1/namespaces/{}/jobs", "/api/v1/namespaces/{}/pods"
ORDER_DIR = "/run/mlfuncs/order"


class LocalJobs:
    """Runs the Jobs that are applied to `api`; `folder` keeps mounts and logs."""

    def __init__(self, api, folder):
        self.api, self.folder = api, folder
        self.processes, self.threads, self.gone = {}, {}, set()
        api.behaviour, api.deleted = self.applied, self.removed

    def applied(self, path, manifest):
        if manifest["kind"] == "Job" and not manifest["spec"]["suspend"] and path not in self.threads:
            self.threads[path] = threading.Thread(target=self.run, args=(path, manifest))
            self.threads[path].start()

    def removed(self, path):
        self.gone.add(path)
        if path in self.processes:
            self.processes[path].terminate()

    def join(self):
        for path, thread in self.threads.items():
            self.removed(path)
            thread.join(30)

    def run(self, path, job):
        spec = job["spec"]
        for attempt in range(spec["backoffLimit"] + 1):
            code = self.run_pod(path, job, f"{job['metadata']['name']}-{attempt}", attempt)
            if path in self.gone:
                return
            if code == 0:
                return self.over(job, "Complete", "")
            if code in spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]:
                return self.over(job, "Failed", "PodFailurePolicy")
        self.over(job, "Failed", "BackoffLimitExceeded")

    def over(self, job, kind, reason):
        job["status"] = {"conditions": [{"type": kind, "status": "True", "reason": reason, "message": reason}]}

    def run_pod(self, path, job, name, attempt):
        namespace, template = job["metadata"]["namespace"], job["spec"]["template"]
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(job, name), stdout=output, stderr=output, env=self.environ(job, name)
            )
        self.processes[path] = process
        pod = {
            "metadata": {
                "name": name,
                "labels": {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": job["metadata"]["name"]},
                "creationTimestamp": f"2026-01-01T00:00:0{attempt}Z",
            },
            "status": {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]},
        }
        self.api.pod_streams[name] = lambda: follow(log, process)
        self.api.objects[f"{PODS.format(namespace)}/{name}"] = pod
        code = process.wait()
        ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}
        pod["status"] = {"containerStatuses": [{"state": {"terminated": ended}}]}
        if path in self.gone:
            self.api.objects.pop(f"{PODS.format(namespace)}/{name}")
        return code

    def mounted(self, job):
        """The directory with what the ConfigMap mounts."""
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        order = self.api.objects[f"/api/v1/namespaces/{namespace}/configmaps/{name}"]
        assert order["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
        folder = self.folder / f"{name}-order"
        folder.mkdir(exist_ok=True)
        for key, text in order["data"].items():
            (folder / key).write_text(text)
        for key, content in order.get("binaryData", {}).items():
            (folder / key).write_bytes(base64.b64decode(content))
        return folder

    def container(self, job):
        (container,) = job["spec"]["template"]["spec"]["containers"]
        return container

    def command(self, job, name):
        folder = self.mounted(job)
        arguments = [str(folder) if word == ORDER_DIR else word for word in self.container(job)["args"]]
        return [sys.executable, "-P", "-m", "mlfuncs_runtime.docker.entry", *arguments]

    def environ(self, job, name):
        """The variables of the image and of the container, and nothing of this process's but where programs are."""
        own = {item["name"]: item["value"] for item in self.container(job)["env"]}
        return {"PATH": os.environ["PATH"], "HOME": "/tmp", "MLFUNCS_HOME": str(self.folder / name), **own}


class DockerJobs(LocalJobs):
    """The same with containers, confined as the manifest says."""

    def command(self, job, name):
        container, folder = self.container(job), self.mounted(job)
        context = container["securityContext"]
        command = ["docker", "run", "--rm", "--network", "none", "--volume", f"{folder}:{ORDER_DIR}:ro"]
        command += ["--read-only"] if context["readOnlyRootFilesystem"] else []
        command += ["--user", str(context["runAsUser"]), "--cap-drop", context["capabilities"]["drop"][0]]
        command += ["--security-opt", "no-new-privileges", "--tmpfs", "/tmp"]
        for item in container["env"]:
            command += ["--env", f"{item['name']}={item['value']}"]
        return [*command, container["image"], *container["args"]]

    def environ(self, job, name):
        return dict(os.environ)


def follow(log, process):
    """The log's bytes as they come, until the process has ended and everything is read."""
    with log.open("rb") as file:
        while True:
            ended = process.poll() is not None
            part = file.read(65536)
            if part:
                yield part
            elif ended:
                return
            else:
                time.sleep(0.01)
