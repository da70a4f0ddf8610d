"""The base by spec: CUDA's libraries for functions with GPUs, an image that a function names, on every target."""

import json
import os
import subprocess
import sys

import pytest

import mlfuncs as ml
from mlfuncs.bundles.bundle import build_bundle
from mlfuncs.errors import DeployFailed, SpecError
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.settings import read_settings
from mlfuncs.spec import FunctionSpec, Resources
from mlfuncs_runtime.docker.container import ContainerPlan, container_body
from mlfuncs_runtime.images import base as base_module
from mlfuncs_runtime.images import prepare
from mlfuncs_runtime.images.base import BaseWish
from mlfuncs_runtime.images.builder import MemoryBuilder
from mlfuncs_runtime.images.function_image import ImageFunction, assemble, wished_base
from mlfuncs_runtime.kubernetes.images import push_run_image
from mlfuncs_runtime.manifests.nuclio import NuclioCode, render_nuclio
from mlfuncs_runtime.manifests.workload import Workload
from mlfuncs_runtime.rendering import render

GPU = Resources(gpu=1)


@ml.function(requirements=[], resources=GPU)
def score(x: float) -> float:
    """Twice x."""
    return 2 * x


@pytest.mark.parametrize(
    ("spec", "lock", "wish"),
    [
        (FunctionSpec("f"), (), BaseWish()),
        (FunctionSpec("f", resources=GPU), ("six==1",), BaseWish(cuda=True)),
        (FunctionSpec("f", resources=Resources(gpu=1, gpu_type="nvidia.com/mig-1g.5gb")), (), BaseWish(cuda=True)),
        (FunctionSpec("f", resources=Resources(gpu=1, gpu_type="amd.com/gpu")), (), BaseWish()),
        (FunctionSpec("f", resources=GPU), ("nvidia-cublas-cu12==12.8.4.1", "torch==2.9"), BaseWish()),
        (FunctionSpec("f", base_image="r.example/b:1"), (), BaseWish("r.example/b:1")),
    ],
)
def test_the_base_follows_from_gpus_lock_and_name(spec, lock, wish):
    assert BaseWish.of([(spec, lock)]) == wish
    assert FunctionSpec.from_dict(spec.to_dict()) == spec
    assert ("base_image" in spec.to_dict()) == bool(spec.base_image)  # digests of others stay as they were


def test_functions_of_one_image_agree_on_its_base():
    plain, gpu, named = FunctionSpec("a"), FunctionSpec("b", resources=GPU), FunctionSpec("c", base_image="r/b:1")
    assert BaseWish.of([(plain, ()), (gpu, ()), (named, ())]) == BaseWish("r/b:1", True)
    with pytest.raises(SpecError, match=r"these functions name r/b:1, r/b:2"):
        BaseWish.of([(named, ()), (FunctionSpec("d", base_image="r/b:2"), ())])
    with pytest.raises(SpecError, match="has a space"):
        FunctionSpec("e", base_image="r/b 1")


def test_images_of_endpoints_and_runs_and_rendered_ones_stand_on_it(settings, monkeypatch):
    function = ImageFunction("score", score.bundle.digest, RevisionConfig(score.spec))
    image = assemble([function], MemoryBuilder().base(print, wished_base([function], settings)), settings)
    assert image.base.name == "memory/base-cuda" and image.environ["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert render(score, "docker", settings).text.startswith(f"FROM {settings.resolved_base_image}-cuda\n")
    named = score.with_options(base_image="r.example/base:1")
    assert render(named, "docker", settings).text.startswith("FROM r.example/base:1\n")
    monkeypatch.setenv("MLFUNCS_IMAGE_REGISTRY", "r.example/team")
    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", "r.example/base:0")
    settings, builder = read_settings(), MemoryBuilder()
    plain = score.with_options(resources=Resources())
    names = [
        push_run_image(build_bundle(one.target, one.spec, settings), one.spec, settings, builder, print)
        for one in (plain, score, named)
    ]
    assert names[0] == "r.example/base:0" and len(set(names)) == 3 and builder.pushed == names[1:]


def test_nuclios_own_build_gets_the_libraries_or_the_named_base():
    def build(spec):
        workload = Workload("f", "p", "rev-1", "", spec)
        return render_nuclio(workload, NuclioCode("d", b"", "s", "t", ["six==1"]))["spec"]["build"]

    commands = build(FunctionSpec("f", resources=GPU))["commands"]
    assert "'mlfuncs[cuda]==" in commands[0] and commands[1].endswith("mlfuncs_runtime.images.prepare --libraries")
    named = build(FunctionSpec("f", resources=GPU, base_image="r.example/b:1"))
    assert named["baseImage"] == "r.example/b:1" and "cuda" not in "".join(named["commands"])
    assert "baseImage" not in build(FunctionSpec("f"))


def test_containers_ask_the_engine_for_the_gpus():
    body = container_body(ContainerPlan("i", "r", "/f", "1:1", Resources(gpu=2)))
    assert body["HostConfig"]["DeviceRequests"] == [{"Driver": "nvidia", "Count": 2, "Capabilities": [["gpu"]]}]
    with pytest.raises(SpecError, match=r"GPUs of NVIDIA alone.*'amd.com/gpu'"):
        container_body(ContainerPlan("i", "r", "/f", "1:1", Resources(gpu=1, gpu_type="amd.com/gpu")))


def test_a_python_image_of_another_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("FOR_PYTHON", "3.7")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(SystemExit, match=f"has Python {own}, and the functions are packed for 3.7"):
        prepare.main(str(tmp_path / "none.toml"), str(tmp_path / "core.txt"))


@pytest.fixture
def small_cuda(tmp_path, monkeypatch):
    """The extra "cuda" with one small library of its nine, which are gigabytes."""
    text = base_module.find_source().files["pyproject.toml"].read_text()
    before, _, rest = text.partition("\ncuda = [")
    small = f'{before}\ncuda = ["nvidia-cuda-runtime-cu12>=12.4"]\nother = [{rest}'
    (tmp_path / "pyproject.toml").write_text(small)
    real = base_module.find_source

    def find_source():
        source = real()
        return base_module.BaseSource(
            {**source.files, "pyproject.toml": tmp_path / "pyproject.toml"}, source.python_image
        )

    monkeypatch.setattr("mlfuncs_runtime.images.docker_builder.find_source", find_source)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a base is built
def test_a_function_with_a_gpu_finds_cuda_in_its_image(docker_engine, home, monkeypatch, small_cuda):
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    monkeypatch.setenv("MLFUNCS_PORT", "0")
    settings, kept = read_settings(), None
    builder, name = DockerBuilder(settings), f"gpu-{os.getpid()}"
    try:
        kept = builder.base(print, BaseWish(cuda=True))
        load = "import ctypes; ctypes.CDLL('libcudart.so.12').cudaRuntimeGetVersion"
        run = ["docker", "run", "--rm", "--read-only", "--network", "none", "--entrypoint", "python", kept.name]
        subprocess.run([*run, "-c", load], capture_output=True, check=True)
        # built over an image that is a base already: nothing is made
        assert builder.base(print, BaseWish(kept.name)).id == kept.id
        with pytest.raises(DeployFailed, match="install NVIDIA's container toolkit"):
            # named, for the supervisor knows nothing of `small_cuda`
            score.with_options(base_image=kept.name).deploy(target="docker", name=name)
        listed = ["docker", "inspect", "--format", "{{json .Config}}"]
        images = ["docker", "images", "-q", f"mlfuncs/test-{name}"]
        (image,) = subprocess.run(images, capture_output=True, text=True, check=True).stdout.split()
        config = json.loads(subprocess.run([*listed, image], capture_output=True, check=True).stdout)
        assert config["Labels"]["org.opencontainers.image.base.digest"] == kept.id
        assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in config["Env"]
    finally:
        from mlfuncs_runtime.process_target import ProcessTarget

        ProcessTarget(settings).stop()
        subprocess.run(f"docker images -q 'mlfuncs/test-{name}' | xargs -r docker rmi -f", shell=True, check=False)
        tags = [kept.name, f"{settings.resolved_base_image}-cuda"] if kept else []
        subprocess.run(["docker", "rmi", "--force", *tags], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a base is built
def test_a_base_is_made_over_the_python_image_that_a_function_names(docker_engine, settings):
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    own, made = f"mlfuncs-test/named-{os.getpid()}:1", None
    subprocess.run(
        ["docker", "build", "--quiet", "--tag", own, "-"], check=True, capture_output=True, text=True,
        input="FROM python:3.11-slim\nENV DRIVER_OF_MINE=7\n",
    )  # fmt: skip
    try:
        made = DockerBuilder(settings).base(print, BaseWish(own))
        assert "DRIVER_OF_MINE=7" in made.config["Env"]
        assert "mlfuncs_runtime.docker.entry" in made.config["Entrypoint"]
    finally:
        subprocess.run(["docker", "rmi", "--force", own, *([made.name] if made else [])], capture_output=True)
