"""The base image: from an installed wheel as from a checkout, and nothing private of the machine that built it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlfuncs.errors import NotFound
from mlfuncs_runtime.images.base import find_source

ROOT = Path(__file__).parents[2]
SOURCE = """
import mlfuncs as ml

@ml.function(requirements=[], scale=ml.Scale(min=1, max=1))
def double(x: float) -> float:
    return 2 * x
"""
LIST = """
import hashlib, json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from mlfuncs_runtime.images.base import find_source
digest = lambda path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
print(json.dumps({name: digest(path) for name, path in find_source().files.items()}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that users install."""
    folder = tmp_path_factory.mktemp("dist")
    _uv("build", "--wheel", "--quiet", "--out-dir", str(folder), str(ROOT))
    (path,) = folder.glob("*.whl")
    return path


def test_an_installed_wheel_builds_from_the_same_files_as_a_checkout(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path / "site-packages", "zip")
    listed = [
        json.loads(subprocess.run([sys.executable, "-P", "-c", LIST, place], capture_output=True, check=True).stdout)
        for place in (str(tmp_path / "site-packages"), str(ROOT))
    ]
    assert listed[0] == listed[1]
    assert {"Dockerfile", "LICENSE", "pyproject.toml", "runtime/mlfuncs_runtime/docker/entry.py"} <= set(listed[0])


@pytest.mark.slow
def test_an_installed_wheel_deploys_to_containers(wheel, tmp_path, docker_engine):
    _uv("venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv"))
    _uv("pip", "install", "--quiet", "--python", str(tmp_path / "venv/bin/python"), f"{wheel}[docker]")
    (tmp_path / "served.py").write_text(SOURCE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFUNCS_", "PYTHON"))}
    environ = {**kept, "HOME": str(tmp_path), "MLFUNCS_PORT": "0", "PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin"}

    def mlfuncs(*arguments):
        command = ["mlfuncs", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        mlfuncs("deploy", "served.py:double", "--target", "docker")
        assert json.loads(mlfuncs("invoke", "double", "--data", '{"x": 21}')) == 42.0
        mlfuncs("delete", "double")
    finally:
        mlfuncs("down")


@pytest.mark.slow
def test_a_base_is_made_over_another_python_image_with_extras(docker_engine, tmp_path):
    """As a GPU image would be: the same Dockerfile over another image, whose labels and variables stay."""
    own = f"mlfuncs-test/python-{os.getpid()}:cuda"
    subprocess.run(
        ["docker", "build", "--quiet", "--tag", own, "-"], check=True, capture_output=True, text=True,
        input="FROM python:3.11-slim\nLABEL com.example.cuda=12.4\nENV CUDA_HOME=/usr/local/cuda\n",
    )  # fmt: skip
    name = f"mlfuncs-test/base-{os.getpid()}:1"
    try:
        command = [sys.executable, "-m", "mlfuncs", "build", "base", "--python-image", own, "--tag", name]
        done = subprocess.run([*command, "--extras", "triggers"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (seen,) = json.loads(subprocess.run(["docker", "inspect", name], capture_output=True, check=True).stdout)
        assert seen["Config"]["Labels"]["com.example.cuda"] == "12.4" and seen["Created"].startswith("1980-01-01")
        assert seen["Config"]["Labels"]["org.opencontainers.image.title"] == "mlfuncs base"
        assert "CUDA_HOME=/usr/local/cuda" in seen["Config"]["Env"] and seen["Config"]["User"] == "10001:10001"
        python = ["docker", "run", "--rm", "--entrypoint", "/opt/mlfuncs/bin/python", name]
        subprocess.run([*python, "-c", "import redis, hiredis, mlfuncs_runtime"], check=True, capture_output=True)
    finally:
        subprocess.run(["docker", "rmi", "--force", name, own], capture_output=True, check=False)


@pytest.mark.slow
def test_a_rendered_dockerfile_finds_the_base_on_this_machine(docker_base, settings):
    named = [docker_base, settings.resolved_base_image]
    inspected = subprocess.run(["docker", "inspect", "--format", "{{.Id}}", *named], capture_output=True, check=True)
    assert len(set(inspected.stdout.split())) == 1


def test_an_extra_that_mlfuncs_does_not_have_is_refused():
    dataclasses.replace(find_source(), extras=("platform", "featurestore")).check_extras()
    with pytest.raises(NotFound, match="did you mean 'featurestore'"):
        dataclasses.replace(find_source(), extras=("featurstore",)).check_extras()


def test_the_base_is_named_after_all_that_it_is_made_of():
    source = find_source()
    assert source.tag("sha256:1") != source.tag("sha256:2")
    names = {entry.name for entry in source.context()}
    assert "Dockerfile" in names and "mlfuncs/spec.py" in names and not any("__pycache__" in name for name in names)


def _uv(*arguments):
    import uv

    subprocess.run([uv.find_uv_bin(), *arguments], check=True, capture_output=True)
