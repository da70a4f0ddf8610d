"""Images in a real registry: pushed, known by one digest wherever they are built, pulled, verified where they run."""

import json
import shutil
import socket
import subprocess
import textwrap
import time
import urllib.request

import pytest

from mlfuncs.errors import Unavailable
from mlfuncs.loading import load_target
from mlfuncs.settings import read_settings
from mlfuncs_runtime.images.docker_builder import DockerBuilder
from mlfuncs_runtime.rendering import build_image
from tests.ports import free_port

pytestmark = pytest.mark.slow
SOURCE = """
    import mlfuncs as ml

    @ml.function(requirements=["six==1.17.0"])
    def double(x: float) -> float:
        return 2 * x

    @ml.function(requirements=["six==1.17.0"])
    def negate(x: float) -> float:
        return -x
"""


@pytest.fixture
def registry(require, tmp_path):
    """The address of a registry of this test's own."""
    program = shutil.which("docker-registry")
    require("docker-registry", program)
    address = f"127.0.0.1:{free_port()}"
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
    }
    (tmp_path / "registry.yml").write_text(json.dumps(config))
    with open(tmp_path / "registry.log", "wb") as log:
        server = subprocess.Popen([program, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/v2/", timeout=60)
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "registry.log").read_text()
            time.sleep(0.05)
    yield address
    server.terminate()
    server.wait(60)


@pytest.fixture
def build(docker_base, tmp_path, home, monkeypatch, registry):
    """Builds both functions in one image from a home of that name and pushes it; what was built."""
    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", docker_base)
    (tmp_path / "served.py").write_text(textwrap.dedent(SOURCE))
    made = []

    def build_and_push(name, tag):
        monkeypatch.setenv("MLFUNCS_HOME", str(home / name))
        functions = [load_target(f"{tmp_path}/served.py:{function}") for function in ("double", "negate")]
        made.append(f"{registry}/team/served:{tag}")
        return build_image(functions, made[-1], True, read_settings(), print)

    yield build_and_push
    subprocess.run(["docker", "rmi", "--force", *made], capture_output=True, check=False)


def test_two_homes_push_the_same_digest_and_a_third_machine_runs_it(build, home, registry, docker_base):
    first = build("one", "1")
    shutil.copytree(home / "one" / "keys", home / "two" / "keys")  # the team's signing key
    second = build("two", "2")
    assert first.id == second.id
    assert first.repo_digest == second.repo_digest and first.repo_digest.startswith(f"{registry}/team/served@sha256:")
    docker("rmi", "--force", first.reference, second.reference)
    assert not DockerBuilder(read_settings()).has(first.reference)
    docker("pull", "--quiet", first.repo_digest)
    image = json.loads(docker("inspect", first.repo_digest))[0]
    assert image["Id"] == first.id
    assert image["Config"]["Labels"]["dev.mlfuncs.functions"] == "double,negate"
    python = ["run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", "--entrypoint", "python"]
    seen = json.loads(docker(*python, first.repo_digest, "-c", textwrap.dedent(INSIDE)))
    assert seen["results"] == {"double": 4.0, "negate": -2.0}
    assert seen["bills"] == {"double": "pkg:pypi/six@1.17.0", "negate": "pkg:pypi/six@1.17.0"}
    assert all("UntrustedError" in refused for refused in seen["refused"])


def test_a_registry_that_is_away_is_named(build, registry, docker_base, home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    (builder := DockerBuilder(read_settings())).tag(docker_base, f"{address}/nobody:1")
    try:
        with pytest.raises(Unavailable, match=address):
            builder.push(f"{address}/nobody:1", print)
    finally:
        docker("rmi", f"{address}/nobody:1")


INSIDE = """
    import dataclasses, json, pathlib
    from mlfuncs.bundles.bundle import open_bundle
    from mlfuncs.settings import read_settings
    from mlfuncs_runtime.docker.inside import lend_bundles
    root, settings = pathlib.Path("/opt/function"), read_settings()
    lend_bundles([root], settings.home)
    results, bills, refused = {}, {}, []
    for path in (root / "functions").glob("*.json"):
        config = json.loads(path.read_text())
        results[path.stem] = open_bundle(config["bundle"], settings).load()(2.0)
        bill = json.loads((root / "sbom" / f"{path.stem}.cdx.json").read_text())
        bills[path.stem] = next(c["purl"] for c in bill["components"] if c["name"] == "six")
        try:
            open_bundle(config["bundle"], dataclasses.replace(settings, trusted_keys=""))
        except Exception as exc:
            refused.append(type(exc).__name__)
    print(json.dumps({"results": results, "bills": bills, "refused": refused or ["nothing"]}))
"""


def docker(*arguments):
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()
