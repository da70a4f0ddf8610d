"""Endpoints as containers of a real Docker Engine: limits, secrets, zero, crashes, failures and what is left after."""

import json
import os
import socket
import subprocess
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mlfuncs as ml
from mlfuncs.errors import DeployFailed, RunFailed, Unavailable
from mlfuncs.loading import load_target
from mlfuncs.settings import read_settings
from mlfuncs_runtime.docker.engine import DockerEngine
from mlfuncs_runtime.docker.launch import home_mark
from mlfuncs_runtime.docker.replica import HOME_LABEL, OWNER_LABEL, read_plain_file, show_socket
from mlfuncs_runtime.supervisor.places import find_places

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
SOURCE = """
    import os
    import mlfuncs as ml

    @ml.function(secrets=["PASSPHRASE"], requirements=[], resources=ml.Resources(cpu=0.5, memory="256Mi"),
                 scale=ml.Scale(min=0, max=2, initial=1, window_s=1, grace_s=0))
    def about(ask: str = "") -> str:
        if ask == "secret":
            value = ml.secret("PASSPHRASE")
            print("the secret is", value, flush=True)
            return value[::-1]
        if ask == "write":
            open("/opt/x", "w")
        if ask == "slow":
            print("it has begun", flush=True)
            import time
            time.sleep(60)
        if ask == "memory":
            block = bytearray(600 * 2**20)
            return str(len(block))
        return str(os.getuid())

    @ml.function(requirements=[], scale=ml.Scale(min=1, max=1))
    def confined() -> dict[str, str]:
        import ctypes, errno, threading
        lines = open("/proc/self/status").read().splitlines()
        found = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
        libc = ctypes.CDLL(None, use_errno=True)
        found["unshare"] = "done" if libc.unshare(0x10000000) == 0 else errno.errorcode[ctypes.get_errno()]
        for place in ("/opt/x", "/home/mlfuncs/x", "/run/x", "/x"):
            try:
                open(place, "w")
                found["wrote"] = place
            except OSError:
                pass
        ended, threads = threading.Event(), 0
        try:
            for threads in range(2000):
                threading.Thread(target=ended.wait, daemon=True).start()
        except RuntimeError as exc:
            found["threads"] = f"{exc} after {threads > 100 and threads < 512}"
        ended.set()
        return found

    @ml.function(requirements=[], scale=ml.Scale(max=1))
    def broken(x: int) -> int:
        return x
"""


@pytest.fixture
def engine(docker_engine):
    return DockerEngine()


@pytest.fixture
def base(docker_base):
    return docker_base


@pytest.fixture
def functions(home, tmp_path, monkeypatch, engine, base):
    """The module's functions, in a home whose containers are gone afterwards."""
    monkeypatch.setenv("MLFUNCS_PORT", "0")
    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", base)
    monkeypatch.setenv("PASSPHRASE", "open-sesame")
    path = tmp_path / "served.py"
    path.write_text(textwrap.dedent(SOURCE))
    yield lambda name: load_target(f"{path}:{name}")
    from mlfuncs_runtime.process_target import ProcessTarget

    ProcessTarget(read_settings()).stop()
    assert until(lambda: not own_containers(engine)), "a container outlived its supervisor"
    subprocess.run("docker images -q 'mlfuncs/test-*' | xargs -r docker rmi -f", shell=True, capture_output=True)


def own_containers(engine):
    return engine.containers({HOME_LABEL: home_mark(read_settings())})


def until(holds, timeout_s=90.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False


def test_a_container_serves_confined_with_its_secret_as_a_file(functions, engine):
    endpoint = functions("about").deploy(target="docker")
    (found,) = own_containers(engine)
    inspected = engine.call("GET", f"/containers/{found['Id']}/json")
    host = inspected["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"]
    assert host["Memory"] == host["MemorySwap"] == 256 * 2**20 and host["NanoCpus"] == 5 * 10**8
    assert 0 < host["PidsLimit"] < 10_000 and not host["Privileged"]
    assert endpoint.invoke() == "10001"
    assert endpoint.invoke(ask="secret") == "emases-nepo"
    assert "open-sesame" not in json.dumps(inspected)
    assert until(lambda: "the secret is ***" in str(endpoint.logs()))
    assert "open-sesame" not in str(endpoint.logs())
    with pytest.raises(ml.MlfuncsError):
        endpoint.invoke(ask="write")
    endpoint.delete()
    assert own_containers(engine) == []
    images = [tag for image in engine.call("GET", "/images/json") for tag in image["RepoTags"] or ()]
    assert not [tag for tag in images if tag.startswith("mlfuncs/test-about:")]


def test_what_a_function_may_do_is_limited_inside_too(functions):
    found = functions("confined").deploy(target="docker").invoke()
    assert found["Uid"].split() == ["10001"] * 4 or os.geteuid() != 0
    assert {int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")  # 2: a filter, the engine's default profile
    assert found["unshare"] == "EPERM"  # no user namespace, with which it would have capabilities again
    assert found["threads"] == "can't start new thread after True"
    assert "wrote" not in found


def test_containers_and_directories_that_a_crash_left_go_with_the_next_start(functions, engine, base):
    settings = read_settings()
    functions("broken").deploy(target="docker").invoke(x=1)
    labels = {HOME_LABEL: home_mark(settings), OWNER_LABEL: "4194304:1"}  # above the highest process id
    body = {"Image": base, "Labels": labels, "Entrypoint": ["sleep", "600"]}
    orphan = engine.call("POST", "/containers/create", body)["Id"]
    engine.call("POST", f"/containers/{orphan}/start")
    left = find_places(settings).sockets / "w-0.sock.d"
    left.mkdir()
    functions("about").deploy(target="docker")
    assert orphan not in [found["Id"] for found in own_containers(engine)]
    assert not left.exists()


def test_the_router_is_not_led_elsewhere_by_what_a_container_makes(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "host.sock"))
        (tmp_path / "worker.sock").symlink_to(tmp_path / "host.sock")
        with pytest.raises(Unavailable, match="something else than a socket"):
            show_socket(tmp_path / "worker.sock", str(tmp_path / "w-1.sock"))
        assert not (tmp_path / "w-1.sock").exists()
        assert show_socket(tmp_path / "host.sock", str(tmp_path / "w-1.sock"))
    assert not show_socket(tmp_path / "none.sock", str(tmp_path / "w-2.sock"))
    (tmp_path / "secret").write_text("key")
    (tmp_path / "worker.sock.error").symlink_to(tmp_path / "secret")
    assert read_plain_file(tmp_path / "worker.sock.error") == b""
    assert read_plain_file(tmp_path / "secret") == b"key"


def test_it_goes_to_zero_and_comes_back_with_a_request(functions, engine):
    endpoint = functions("about").deploy(target="docker")
    assert until(lambda: not own_containers(engine) and endpoint.status().state == "idle"), endpoint.status()
    assert endpoint.invoke() == "10001"
    assert len(own_containers(engine)) == 1


def test_a_container_ends_with_its_process_and_is_replaced(functions, engine):
    endpoint = functions("about").with_options(scale=ml.Scale(min=1, max=1)).deploy(target="docker")
    (before,) = own_containers(engine)
    os.kill(endpoint.status().replicas[0].pid, 9)
    assert until(lambda: before["Id"] not in [c["Id"] for c in own_containers(engine)])
    assert endpoint.invoke(timeout_s=120) == "10001"


def test_a_request_in_flight_when_its_container_is_killed_is_answered_and_the_next_one_served(functions, engine):
    endpoint = functions("about").with_options(scale=ml.Scale(min=1, max=1)).deploy(target="docker")
    (found,) = own_containers(engine)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(endpoint.invoke, ask="slow", timeout_s=50)
        assert until(lambda: "it has begun" in str(endpoint.logs()))
        engine.call("POST", f"/containers/{found['Id']}/kill?signal=SIGKILL")
        with pytest.raises(ml.MlfuncsError, match="ended before it answered; the request may have been carried out"):
            asked.result(45)  # well before the function itself would have answered
    assert endpoint.invoke(timeout_s=40) == "10001"


def test_want_of_memory_is_named(functions, engine):
    endpoint = functions("about").with_options(scale=ml.Scale(min=1, max=1)).deploy(target="docker")
    with pytest.raises(ml.MlfuncsError):
        endpoint.invoke(ask="memory", timeout_s=20)
    assert until(lambda: "raise resources.memory" in str(endpoint.logs())), str(endpoint.logs())
    assert endpoint.invoke(timeout_s=120) == "10001"


def test_what_cannot_load_fails_the_deploy_and_the_old_revision_serves(functions, engine, tmp_path):
    endpoint = functions("broken").deploy(target="docker")
    path = tmp_path / "worse.py"
    path.write_text(
        "import os\nimport mlfuncs as ml\n\n@ml.function(requirements=[], name='broken')\nclass Broken:\n"
        "    def __init__(self) -> None:\n"
        "        if os.path.exists('/opt/function'):\n            raise ValueError('no model here')\n"
        "    def __call__(self, x: int) -> int:\n        return -x\n"
    )
    with pytest.raises(DeployFailed, match="no model here"):
        load_target(f"{path}:Broken").deploy(target="docker")
    assert endpoint.invoke(x=3) == 3


def test_without_an_engine_the_deploy_says_how_to_get_one(functions, monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(Unavailable, match="scripts/docker-engine"):
        functions("broken").deploy(target="docker")
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    with pytest.raises(Unavailable, match="engine of this machine"):
        functions("broken").deploy(target="docker")


def test_a_run_in_a_container_is_a_run_like_any_other(home, monkeypatch, engine, base):
    monkeypatch.setenv("MLFUNCS_BASE_IMAGE", base)

    @ml.function(requirements=[])
    def measure(x: int) -> dict[str, int]:
        print("measuring", x)
        ml.log_metric("twice", 2.0 * x)
        if x < 0:
            raise ValueError("x is negative")
        if x == 99:
            time.sleep(60)
        ml.log_artifact("kept", {"x": x})
        return {"inside": int(os.path.exists("/opt/function")), "x": x, "root": int(os.getuid() == 0)}

    run = ml.run(measure, {"x": 3}, target="docker")
    assert (run.status, run.outputs["output"], run.metrics["twice"]) == (
        "succeeded",
        {"inside": 1, "x": 3, "root": 0},
        6.0,
    )
    assert "measuring 3" in str(run.logs)
    monkeypatch.setenv("PASSPHRASE", "open-sesame")

    @ml.function(requirements=[], secrets=["PASSPHRASE"], resources=ml.Resources(memory="128Mi"))
    def confide() -> dict[str, int]:
        limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
        (limit,) = [path for path in limits if os.path.exists(path)]
        print(ml.secret("PASSPHRASE"))
        return {"secret": len(ml.secret("PASSPHRASE")), "memory": int(open(limit).read())}

    run = confide.run(target="docker")
    assert run.output == {"secret": 11, "memory": 128 * 2**20} and str(run.logs) == "***\n"
    with pytest.raises(RunFailed, match="ValueError: x is negative"):
        ml.run(measure, {"x": -1}, target="docker")
    with pytest.raises(RunFailed, match="longer than 4 s"):
        ml.run(measure, {"x": 99}, target="docker", timeout_s=4)
    assert until(lambda: not own_containers(engine))
    subprocess.run("docker images -q 'mlfuncs/test-*' | xargs -r docker rmi -f", shell=True, capture_output=True)
