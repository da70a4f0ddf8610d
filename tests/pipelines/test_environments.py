"""What steps need from their surroundings: packages in environments of their own, Docker, or a refusal first."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from mlfuncs.settings import Settings
from mlfuncs_pipelines.engine import Options
from mlfuncs_pipelines.lightweight import recognise
from mlfuncs_pipelines.run_log import PipelineRun
from mlfuncs_pipelines.validate import InvalidPipeline
from mlfuncs_pipelines.venvs import environment_digest, python_for

Run = Callable[..., PipelineRun]
IMAGE = "python:3.11-slim"
HERE = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"  # such a step needs no other Python


def _has_docker() -> bool:
    found = shutil.which("docker")
    return bool(found) and subprocess.run([str(found), "version"], capture_output=True).returncode == 0


def _has_image(image: str) -> bool:
    return _has_docker() and subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0


@dsl.container_component
def shell(text: str, out: dsl.OutputPath(str)):
    return dsl.ContainerSpec(image=IMAGE, command=["sh", "-c", 'mkdir -p $(dirname $1); echo -n "$0" > $1', text, out])


@dsl.component(base_image=HERE)
def touch(path: str) -> str:
    open(path, "w").close()
    return path


@dsl.component(base_image=HERE, packages_to_install=["toolz==0.12.0"])
def versions() -> str:
    import sys

    import toolz

    return f"{toolz.__version__}|{sys.prefix}"


def test_containers_without_docker_are_refused_before_any_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dsl.pipeline(name="needs-docker")
    def needs_docker(path: str):
        touch(path=path)
        shell(text="a")
        shell(text="b")

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidPipeline) as caught:
        run(needs_docker, path=str(tmp_path / "touched"))
    assert len(caught.value.problems) == 2 and "no Docker here" in str(caught.value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.skipif(not _has_docker(), reason="no Docker Engine")
def test_an_image_that_cannot_be_had_is_told_before_any_step(run: Run, tmp_path: Path) -> None:
    @dsl.container_component
    def nowhere():
        return dsl.ContainerSpec(image="127.0.0.1:1/nowhere:1", command=["true"])

    @dsl.pipeline(name="needs-images")
    def needs_images(path: str):
        touch(path=path)
        nowhere()
        nowhere()

    with pytest.raises(InvalidPipeline, match=r"the image '127.0.0.1:1/nowhere:1' is not here and cannot be pulled: "):
        run(needs_images, path=str(tmp_path / "touched"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.skipif(not _has_image(IMAGE), reason=f"no Docker Engine with the image {IMAGE}")
def test_container_runs_in_docker(run: Run) -> None:
    @dsl.pipeline(name="in-docker")
    def in_docker() -> str:
        return shell(text="from a container").outputs["out"]

    assert run(in_docker).outputs == {"Output": "from a container"}


def test_packages_go_into_an_environment_of_their_own(run: Run, settings: Settings) -> None:
    @dsl.pipeline(name="packages")
    def packages() -> str:
        return versions().output

    before = subprocess.run([sys.executable, "-m", "pip", "list"], capture_output=True, text=True).stdout
    try:
        done = run(packages)
    except InvalidPipeline as exc:
        if "cannot be built" in str(exc) and ("dns" in str(exc).lower() or "connect" in str(exc).lower()):
            pytest.skip("no package index can be reached")
        raise
    version, prefix = done.outputs["Output"].split("|")
    assert version == "0.12.0" and prefix.startswith(str(settings.home / "environments"))
    after = subprocess.run([sys.executable, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert before == after  # the user's own environment is as it was
    folders = list((settings.home / "environments").glob("kfp-*/"))
    run(packages, Options(cache=False))
    assert list((settings.home / "environments").glob("kfp-*/")) == folders  # built once


def _executor(component: Any) -> dict[str, Any]:
    from google.protobuf import json_format

    spec = json_format.MessageToDict(component.pipeline_spec)
    return next(iter(spec["deploymentSpec"]["executors"].values()))


def test_a_package_that_is_here_needs_no_environment(settings: Settings) -> None:
    @dsl.component(base_image=HERE, packages_to_install=["packaging>=20", "click"])
    def here() -> str:
        return "x"

    found = recognise(_executor(here))
    assert found is not None and python_for(found, settings) == Path(sys.executable)


def test_what_pip_would_install_is_read_from_the_command() -> None:
    @dsl.component(
        base_image="python:3.9-slim",
        packages_to_install=["six==1.16.0", "pandas[performance]>=2 ; python_version > '3'"],
        pip_index_urls=["https://a.example/simple", "https://b.example/simple"],
    )
    def step() -> str:
        return "x"

    found = recognise(_executor(step))
    assert found is not None
    assert found.packages == ("six==1.16.0", "pandas[performance]>=2 ; python_version > '3'")
    assert found.index_options[:4] == (
        "--index-url",
        "https://a.example/simple",
        "--extra-index-url",
        "https://b.example/simple",
    )
    assert found.kfp_requirement.startswith("kfp==") and found.python == "3.9" and found.function == "step"


def test_other_packages_are_another_environment() -> None:
    @dsl.component(base_image=HERE, packages_to_install=["six"])
    def one() -> str:
        return "x"

    @dsl.component(base_image=HERE, packages_to_install=["toolz"])
    def two() -> str:
        return "x"

    digests = [environment_digest(found) for found in (recognise(_executor(one)), recognise(_executor(two))) if found]
    assert len(set(digests)) == 2


def test_containers_are_no_lightweight_components() -> None:
    assert recognise(_executor(shell)) is None and recognise({"importer": {}}) is None


def test_a_stand_in_for_another_python_that_does_not_run_is_passed_over(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyenv has a `python3.99` on PATH for a version that is not the one in use, and it only prints an error."""
    stand_in = tmp_path / "bin" / "python3.99"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\necho command not found >&2\nexit 127\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(stand_in.parent), prepend=":")

    @dsl.component(base_image="python:3.99")
    def newer() -> str:
        return "x"

    component = recognise(_executor(newer))
    assert component is not None and component.python == "3.99"
    assert python_for(component, settings) == Path(sys.executable)
