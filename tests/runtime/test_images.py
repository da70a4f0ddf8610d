"""Function images: the same input gives the same digest, nothing of the building machine is in them, and they run."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest

from mlfuncs.bundles.bundle import open_bundle
from mlfuncs.errors import SpecError, StorageError
from mlfuncs.loading import load_target
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.settings import Settings, read_settings
from mlfuncs_runtime.images.builder import MemoryBuilder
from mlfuncs_runtime.images.context import write_context
from mlfuncs_runtime.images.function_image import ImageFunction, assemble, shared_lock
from mlfuncs_runtime.images.image import layers_in, write_archive
from mlfuncs_runtime.images.layers import Entry, undated_layer, write_layer
from mlfuncs_runtime.images.prepare import compile_below
from mlfuncs_runtime.images.sbom import cyclonedx
from mlfuncs_runtime.kubernetes.images import push_run_image
from mlfuncs_runtime.rendering import build_image
from tests.runtime.private_index import CREDENTIALS, PASSWORD, USER, Index, fill, serving_index

ROOT = Path(__file__).parents[2]
SOURCE = """
    import mlfuncs as ml

    @ml.function(requirements=["six==1.17.0"])
    def double(x: float) -> float:
        import six
        return {factor} * x

    @ml.function(requirements=["six==1.17.0"])
    def negate(x: float) -> float:
        return -x

    @ml.function(requirements=["six==1.16.0"])
    def other(x: float) -> float:
        return x
"""


@pytest.fixture
def functions(tmp_path, home):
    def load(*names, factor=2):
        path = tmp_path / f"served{factor}.py"
        path.write_text(textwrap.dedent(SOURCE).format(factor=factor))
        loaded = [load_target(f"{path}:{name}") for name in names]
        return [ImageFunction(f.spec.name, f.bundle.digest, RevisionConfig(f.spec)) for f in loaded]

    return load


def paths_in(layer):
    with tarfile.open(layer.path) as archive:
        return {member.name for member in archive if member.isfile()}


def test_a_layer_does_not_depend_on_times_owners_or_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("b")
    first = write_layer([Entry("/opt/f/1", one), Entry("/opt/f/2", two)], tmp_path / "layers")
    os.utime(one, (1, 1))
    one.chmod(0o600)
    second = write_layer([Entry("/opt/f/2", two), Entry("/opt/f/1", one)], tmp_path / "layers")
    assert first == second and first.digest == hashlib.sha256(first.path.read_bytes()).hexdigest()


def test_a_layer_that_a_builder_made_loses_what_differs_between_two_builds(tmp_path):
    def built(name, when, order):
        folder = tmp_path / name
        (folder / "opt").mkdir(parents=True)
        (folder / "opt" / "b").write_text("b")
        (folder / "opt" / "a").write_text("a")
        (folder / "opt" / "a").chmod(0o755)
        (folder / "opt" / "c").hardlink_to(folder / "opt" / "a")
        (folder / "opt" / "d").symlink_to("a")
        with tarfile.open(tmp_path / f"{name}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for path in order:
                os.utime(folder / path, (when, when), follow_symlinks=False)
                archive.add(folder / path, path, recursive=False)
        return undated_layer(tmp_path / f"{name}.tar", tmp_path / "layers")

    first = built("one", 1_700_000_000.25, ["opt", "opt/a", "opt/b", "opt/c", "opt/d"])
    second = built("two", 1_800_000_000.75, ["opt", "opt/d", "opt/b", "opt/a", "opt/c"])
    assert first == second
    with tarfile.open(first.path) as archive:
        found = {member.name: member for member in archive}
        assert archive.extractfile("opt/c").read() == b"a" and found["opt/a"].mode == 0o755
        assert found["opt/c"].islnk() and found["opt/d"].linkname == "a"


def test_byte_code_of_a_base_does_not_depend_on_when_it_is_written(tmp_path):
    written = []
    for when in (1_700_000_000, 1_800_000_000):
        source = tmp_path / "src" / "module.py"
        source.parent.mkdir(exist_ok=True)
        source.write_text('NAMES = ["x", "y"]\n\n\ndef f(x, y={"a": 1}):\n    return f"{x} {y}"\n')
        os.utime(source, (when, when))
        (source.parent / "template.py").write_text("{% not Python %}\n")
        compile_below(str(source.parent))
        (made,) = source.parent.glob("__pycache__/*.pyc")
        written.append(made.read_bytes())
        shutil.rmtree(made.parent)
    assert written[0] == written[1]


def test_the_same_functions_give_the_same_image_and_a_change_only_its_own_layer(functions, settings):
    base = MemoryBuilder().base(print)
    first = assemble(functions("double"), base, settings)
    shutil.rmtree(settings.home / "images")  # the wheels are installed and compiled anew
    again = assemble(functions("double"), base, settings)
    assert first.id == again.id
    changed = assemble(functions("double", factor=3), base, settings)
    assert changed.id != first.id
    assert changed.layers[0].digest == first.layers[0].digest
    assert changed.layers[-1].size_bytes < 100_000


def test_runs_share_an_image_of_their_requirements_which_is_pushed_once(tmp_path, home, monkeypatch):
    monkeypatch.setenv("MLFUNCS_IMAGE_REGISTRY", "registry.example/team")
    settings, builder, names = read_settings(), MemoryBuilder(), []
    for factor in (2, 3):  # another code, the same requirements
        path = tmp_path / f"served{factor}.py"
        path.write_text(textwrap.dedent(SOURCE).format(factor=factor))
        function = load_target(f"{path}:double")
        names.append(push_run_image(function.bundle, function.spec, settings, builder, print))
    assert names[0] == names[1] and builder.pushed == names[:1]
    with tarfile.open(fileobj=io.BytesIO(builder.archives[names[0]])) as archive:
        (layer,) = [name for name in archive.getnames() if name.endswith("layer.tar")]
        with tarfile.open(fileobj=archive.extractfile(layer)) as wheels:
            assert "opt/function/site-packages/six.py" in wheels.getnames()
    other = load_target(f"{path}:other")  # of six 1.16
    assert push_run_image(other.bundle, other.spec, settings, builder, print) not in names


def test_an_image_has_bundle_signature_bill_and_compiled_wheels(functions, settings):
    (function,) = functions("double")
    wheels, own = assemble([function], MemoryBuilder().base(print), settings).layers
    place = f"opt/function/bundles/{function.bundle}/test"
    assert {f"{place}/bundle.zip", f"{place}/bundle.sig", "opt/function/functions/double.json"} <= paths_in(own)
    assert "opt/function/site-packages/six.py" in paths_in(wheels)
    assert any(name.endswith(".pyc") for name in paths_in(wheels))
    with tarfile.open(own.path) as archive:
        bill = json.load(archive.extractfile("opt/function/sbom/double.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    assert "pkg:pypi/six@1.17.0" in [component.get("purl") for component in bill["components"]]


def test_functions_share_an_image_when_their_pins_agree(functions, settings):
    image = assemble(functions("double", "negate"), MemoryBuilder().base(print), settings)
    names = paths_in(image.layers[-1])
    assert {"opt/function/functions/double.json", "opt/function/functions/negate.json"} <= names
    with pytest.raises(SpecError, match=r"six==1.1[67].0 and .* needs six==1.1[67].0"):
        shared_lock({f.name: open_bundle(f.bundle, settings) for f in functions("double", "other")})


@pytest.fixture
def private_index(tmp_path, monkeypatch):
    """The URL of an index that holds six, password included, and what it was sent as credentials."""
    sent = []
    real = Index.do_GET

    def do_GET(self):
        sent.append(self.headers.get("Authorization", ""))
        real(self)

    monkeypatch.setattr(Index, "do_GET", do_GET)
    with serving_index(tmp_path / "index") as port:
        fill(tmp_path / "index" / "simple", ["six==1.17.0"])
        yield sent, f"http://{USER}:{PASSWORD}@127.0.0.1:{port}/simple"


def test_an_index_with_a_password_leaves_nothing_in_the_image(functions, settings, monkeypatch, private_index):
    sent, index = private_index
    monkeypatch.setenv("MLFUNCS_UV_INDEX_URL", index)
    monkeypatch.setenv("UV_NO_CACHE", "1")
    monkeypatch.setenv("HTTPS_PROXY_NOTE", "hunter2")
    settings = read_settings()
    image = assemble(functions("double"), MemoryBuilder().base(print), settings)
    archive = io.BytesIO()
    write_archive(image, ["x:1"], archive, image.own_layers)
    whole = archive.getvalue()
    for word in (b"hunter2", PASSWORD.encode(), USER.encode(), str(settings.home).encode()):
        assert word not in whole
    assert CREDENTIALS in sent


def test_an_archive_is_what_docker_save_would_give(functions, settings, tmp_path):
    image = assemble(functions("double"), MemoryBuilder().base(print), settings)
    archive = io.BytesIO()
    write_archive(image, ["a/b:1"], archive, image.own_layers)
    archive.seek(0)
    with tarfile.open(fileobj=archive) as members:
        (manifest,) = json.load(members.extractfile("manifest.json"))
        config = members.extractfile(manifest["Config"]).read()
    assert f"sha256:{hashlib.sha256(config).hexdigest()}" == image.id
    assert len(manifest["Layers"]) == len(json.loads(config)["rootfs"]["diff_ids"]) == 2
    archive.seek(0)
    assert set(layers_in(archive, [layer.diff_id for layer in image.layers], tmp_path)) == {
        layer.diff_id for layer in image.layers
    }


@pytest.mark.parametrize("name", ["UPPER/x:1", "a:b:c", "x@sha256:" + "a" * 64, "-x", "x/", "a b"])
def test_a_name_that_no_engine_takes_is_refused_before_anything_is_built(functions, settings, name):
    with pytest.raises(SpecError, match="is not an image's name"):
        build_image([], name, False, settings, print, MemoryBuilder())


def test_one_function_twice_is_refused(functions, settings):
    with pytest.raises(SpecError, match="two functions of one image are called 'double'"):
        assemble(functions("double", "double"), MemoryBuilder().base(print), settings)


def test_a_context_is_the_same_whenever_it_is_written_and_expands_no_variables(functions, settings, tmp_path):
    image = assemble(functions("negate"), MemoryBuilder().base(print), settings)
    image = dataclasses.replace(image, environ={"KEY": "a$HOME\\é"}, labels={"of": '"$x"'})
    sizes = [write_context(image, str(tmp_path / name)) for name in ("one.tgz", "two.tgz")]
    one, two = ((tmp_path / name).read_bytes() for name in ("one.tgz", "two.tgz"))
    assert one == two and sizes == [len(one)] * 2
    with tarfile.open(tmp_path / "one.tgz") as archive:
        text = archive.extractfile("Dockerfile").read().decode()
        assert 'ENV KEY="a\\$HOME\\\\é"\n' in text and 'LABEL of="\\"\\$x\\""' in text
        names = archive.getnames()
    assert names == ["Dockerfile", *(f"{layer.digest}.tar" for layer in image.layers)]


def test_a_context_for_an_unknown_scheme_is_refused(functions, settings):
    image = assemble(functions("negate"), MemoryBuilder().base(print), settings)
    with pytest.raises(StorageError, match="nosuch"):
        write_context(image, "nosuch://bucket/context.tgz")


def test_a_bill_names_versions_and_hashes_but_no_password():
    lock = [f"six==1.17.0 --hash=sha256:{'a' * 64}", "mine @ git+https://me:token@host/mine@abc"]
    six, mine = sorted(cyclonedx("f", "0" * 64, lock)["components"], key=lambda c: c["name"], reverse=True)
    assert six["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert "token" not in json.dumps(mine) and "host/mine" in json.dumps(mine)


@pytest.mark.slow
def test_an_image_runs_read_only_without_a_network_and_stops_when_told(functions, settings, docker_engine):
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    builder = DockerBuilder(settings)
    image = assemble(functions("double", "negate"), builder.base(print), settings)
    built = builder.store(image, [f"mlfuncs/test-{os.getpid()}:1"])
    name = built.reference
    arguments = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "-e", "MLFUNCS_FUNCTION=negate"]
    arguments += ["--security-opt", "no-new-privileges", "-p", "127.0.0.1::8080"]
    container = _docker("run", "-d", *arguments, name)
    try:
        address = _docker("port", container, "8080").splitlines()[0]
        assert _answer(f"http://{address}/", {"x": 2}, container) == b"-2.0"
        _docker("exec", container, "/opt/mlfuncs/bin/python", "-P", "-m", "mlfuncs_runtime.docker.entry", "--check")
        _docker("stop", container)  # which kills it after 10 s, with another exit code
        assert _docker("inspect", "-f", "{{.State.ExitCode}}", container) == "0"
    finally:
        subprocess.run(["docker", "rm", "-f", container], capture_output=True, check=False)
        subprocess.run(["docker", "rmi", "-f", name], capture_output=True, check=False)


@pytest.mark.slow
def test_after_a_change_of_the_code_the_engine_is_sent_that_layer_alone(functions, settings, docker_engine):
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    class Counted(DockerBuilder):
        def _load(self, image, tags, layers, folder):
            super()._load(image, tags, layers, folder)
            sent.append(list(layers))  # reached only when the engine took it

    sent, builder = [], Counted(settings)
    base = builder.base(print)
    images = [assemble(functions("double", factor=factor), base, settings) for factor in (2, 3)]
    # a layer below the code's that no engine has seen
    new = write_layer([Entry("/opt/function/of-this-test", os.urandom(16))], settings.home / "images" / "layers")
    images = [dataclasses.replace(image, layers=(*image.layers[:-1], new, image.layers[-1])) for image in images]
    names = [f"mlfuncs-test/change-{os.getpid()}:{number}" for number in (1, 2)]
    try:
        for image, name in zip(images, names, strict=True):
            assert builder.store(image, [name]).id == image.id and builder.has(name)
        assert sent == [list(images[0].own_layers), [images[1].layers[-1].diff_id]]
    finally:
        subprocess.run(["docker", "rmi", "--force", *names], capture_output=True, check=False)


@pytest.mark.slow
def test_an_engine_without_the_base_gets_all_layers(functions, settings, docker_engine):
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    builder = DockerBuilder(Settings(settings.home, "test", base_image="python:3.11-slim"))
    with pytest.raises(SpecError, match="mlfuncs build base --python-image"):
        builder.base(print)
    base = builder._inspect("python:3.11-slim")
    image = assemble(functions("double"), base, settings)
    folder = settings.home / "full"
    folder.mkdir()
    layers = builder._base_layers(base, folder)
    assert set(layers) == set(base.diff_ids)
    builder._load(image, [f"mlfuncs/test-full-{os.getpid()}:1"], {**layers, **image.own_layers}, folder)
    subprocess.run(["docker", "rmi", f"mlfuncs/test-full-{os.getpid()}:1"], capture_output=True, check=True)


def test_the_base_has_what_serving_needs_and_the_extras_asked_for():
    from mlfuncs_runtime.images.prepare import requirements

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = requirements(project, [])
    assert any(line.startswith("uvicorn") for line in core) and not any(line.startswith("uv>") for line in core)
    more = requirements(project, ["platform"])
    assert {"psycopg", "deltalake", "pyarrow", "uv"} <= {line.partition(">")[0].partition("[")[0] for line in more}


def test_the_first_process_reaps_passes_signals_on_and_ends_with_the_workers_status(tmp_path):
    code = textwrap.dedent("""
        import os, signal, sys, time
        from mlfuncs_runtime.docker import entry as container
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
            print("up", flush=True)
            time.sleep(600)
        sys.exit(container.mind(child, reader, writer, lifeline=%s))
    """)
    for lifeline, end, status in ((False, "signal", 7), (True, "input", 137)):
        process = subprocess.Popen(
            [sys.executable, "-c", code % lifeline], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")])},
        )  # fmt: skip
        assert process.stdout.readline() == b"up\n"
        _wait_until_it_catches(process.pid, signal.SIGTERM)
        process.terminate() if end == "signal" else process.stdin.close()
        assert process.wait(60) == status
        process.stdout.close()


def _wait_until_it_catches(pid, number):
    deadline = time.monotonic() + 60
    while True:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        if int(status["SigCgt"], 16) >> (number - 1) & 1:
            return
        assert time.monotonic() < deadline, f"no handler of {number}"
        time.sleep(0.01)


def _docker(*arguments):
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _answer(url, body, container):
    deadline = time.monotonic() + 60
    while True:
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), method="POST")
            return urllib.request.urlopen(request, timeout=60).read()
        except OSError:
            if time.monotonic() > deadline:
                raise AssertionError(_docker("logs", container)) from None
            time.sleep(0.1)
