"""Image builds inside a cluster: golden Jobs, what a builder cannot read, and a context that BuildKit really builds."""

import functools
import http.server
import json
import os
import subprocess
import time
import urllib.request

import kubernetes_validate
import pytest

from mlfuncs.errors import SpecError
from mlfuncs.loading import load_target
from mlfuncs.settings import read_settings
from mlfuncs_runtime.manifests.builds import BuildJob, render_build_job
from mlfuncs_runtime.rendering import build_context, render
from tests.runtime.private_index import serving
from tests.runtime.rendered import check_golden

SOURCE = """
import mlfuncs as ml


@ml.function(requirements=["six==1.17.0"])
def double(x: float) -> float:
    import six

    return 2 * x + len(six.__version__) - 6
"""


@pytest.fixture
def target(tmp_path):
    (tmp_path / "served.py").write_text(SOURCE)
    return f"{tmp_path}/served.py:double"


@pytest.mark.parametrize("tool", ["buildkit", "kaniko"])
def test_build_jobs_are_valid_and_as_the_golden_files_say(tool):
    build = BuildJob("churn", "builds", "https://store.example/contexts/1.tar.gz", "r.example/churn:1", "login")
    job = render_build_job(build, tool)
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    check_golden(f"build-{tool}", [job])
    assert job["spec"]["template"]["spec"]["volumes"][1]["secret"]["secretName"] == "login"


def test_a_context_that_buildkit_cannot_read_and_a_restricted_namespace_are_named(target, monkeypatch):
    monkeypatch.setenv("MLFUNCS_ARTIFACTS_URL", "memory://bucket/store")
    function, settings = load_target(target), read_settings()
    with pytest.raises(SpecError, match=r"over http\(s\) alone, not 'memory://bucket/store/contexts/.*'kaniko'"):
        render(function, "buildkit", settings)
    rendered = render(function, "kaniko", settings)
    assert "--context=memory://bucket/store/contexts/" in json.dumps(rendered.documents)
    assert "a namespace of their own" in "".join(rendered.warnings)


@pytest.mark.slow
def test_buildkit_builds_a_context_over_http_and_the_image_serves(docker_base, target, tmp_path, monkeypatch):
    """By the BuildKit inside the Docker Engine, as the Job's asks its own: the same frontend, the same context."""
    import docker

    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", docker_base)
    (tmp_path / "contexts").mkdir()
    build_context([load_target(target)], str(tmp_path / "contexts" / "double.tar.gz"), read_settings())
    name = f"mlfuncs-test/buildkit-{os.getpid()}:1"
    files = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    container = ""
    try:
        with serving("127.0.0.1", files) as port:
            job = BuildJob("double", "ml", f"http://127.0.0.1:{port}/contexts/double.tar.gz", name)
            options = render_build_job(job)["spec"]["template"]["spec"]["containers"][0]["args"]
            (context,) = [option.removeprefix("context=") for option in options if option.startswith("context=")]
            api = docker.from_env(timeout=300).api
            asked = {"version": "2", "remote": context, "t": name}  # 2: BuildKit
            answer = api._post(api._url("/build"), params=asked)
            assert answer.ok and f"Successfully tagged {name}" in answer.text, answer.text[-2000:]
        run = ["docker", "run", "-d", "--read-only", "--tmpfs", "/tmp", "-p", "127.0.0.1::8080", name]
        container = _output(run)
        address = _output(["docker", "port", container, "8080"]).splitlines()[0]
        assert _asked(f"http://{address}/", {"x": 21}, container) == b"42.0"
    finally:
        subprocess.run(["docker", "rm", "--force", container or "none"], capture_output=True, check=False)
        subprocess.run(["docker", "rmi", "--force", name], capture_output=True, check=False)


def _output(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _asked(url, body, container):
    """The answer, once the container gives one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), method="POST")
            return urllib.request.urlopen(request, timeout=10).read()
        except OSError:
            assert time.monotonic() < deadline, _output(["docker", "logs", container])
            time.sleep(0.1)
