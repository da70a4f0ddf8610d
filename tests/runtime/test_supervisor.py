"""The supervisor and its processes as they really run: one home a test module, found and stopped by process ids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.errors import (
    Conflict,
    DeadlineExceeded,
    DeployFailed,
    InvalidInput,
    MlfuncsError,
    NotFound,
    SpecError,
    Unauthorized,
    Unavailable,
)
from mlfuncs.registry import open_registry
from mlfuncs.serving.endpoints import Endpoint, deploy, endpoint, list_endpoints
from mlfuncs.settings import Settings, read_settings
from mlfuncs_runtime.process_target import ProcessTarget
from mlfuncs_runtime.supervisor.places import find_places


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mlf-sv-", dir="/tmp"))
    yield folder / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFUNCS_HOME", str(folder / "home"))
        ProcessTarget(read_settings()).stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def live(shared: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFUNCS_HOME", str(shared))
    monkeypatch.setenv("MLFUNCS_PORT", "0")


@pytest.fixture
def own_home(home: Path, live: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A home of the test's own; whatever runs there is stopped at the end."""
    monkeypatch.setenv("MLFUNCS_HOME", str(home))
    yield read_settings()
    ProcessTarget(read_settings()).stop()


def target() -> ProcessTarget:
    return ProcessTarget(read_settings())


def wait_until(holds: Callable[[], Any], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def processes_of(home: Path) -> list[str]:
    """Command lines of running processes that belong to this home, by their environment."""
    mark = f"MLFUNCS_HOME={home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def put(body: str, name: str = "served", **options: Any) -> Endpoint:
    """Deploy `def served(x: int) -> int` with this body, from a file."""
    from mlfuncs.loading import load_file

    folder = Path(
        tempfile.mkdtemp(dir=os.environ["MLFUNCS_HOME"] if Path(os.environ["MLFUNCS_HOME"]).exists() else None)
    )
    path = folder / f"code_{abs(hash(body)) % 10**8}.py"
    path.write_text("import os, time, threading\nimport mlfuncs as ml\n\ndef served(x: int) -> int:\n" + body)
    options.setdefault("scale", ml.Scale(min=1, max=2))
    return deploy(load_file(path).served, name=name, **options)


def test_up_is_idempotent_and_down_leaves_nothing(own_home: Settings):
    first = target().start()
    assert target().start()["pid"] == first["pid"]
    put("    return x + 1\n").invoke(1)
    assert len(processes_of(own_home.home)) >= 4  # supervisor, sentinel, router, zygote; and the worker
    stopped = target().stop()
    assert first["pid"] in stopped
    assert not any(is_running(pid) for pid in stopped)
    wait_until(lambda: processes_of(own_home.home) == [], "no process")
    assert list(find_places(own_home).sockets.glob("*.sock")) == []
    assert target().stop() == []
    again = target().start()
    wait_until(lambda: endpoint("served").status().state == "ready", "the endpoint after 'up'")
    assert again["pid"] != first["pid"]
    assert endpoint("served").invoke(1) == 2


def test_a_second_supervisor_of_the_same_home_refuses_politely():
    first = target().start()
    command = [sys.executable, "-m", "mlfuncs_runtime.supervisor.process"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert f"runs already (pid {first['pid']})" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert target().start()["pid"] == first["pid"]


def test_a_taken_port_is_one_clear_error_and_nothing_is_left(own_home: Settings, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MLFUNCS_PORT", str(port))
        with pytest.raises(Conflict, match=rf"port {port} .* MLFUNCS_PORT"):
            target().start()
        wait_until(lambda: processes_of(own_home.home) == [], "no process")
    assert target().start()["url"] == f"http://127.0.0.1:{port}"


def test_an_open_address_without_a_token_is_refused(own_home: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFUNCS_HOST", "0.0.0.0")
    with pytest.raises(MlfuncsError, match="MLFUNCS_TOKEN"):
        target().start()
    wait_until(lambda: processes_of(own_home.home) == [], "no process")


def test_a_home_with_a_long_path_works(home: Path, live: None, monkeypatch: pytest.MonkeyPatch):
    long = home / ("deep" * 20) / ("path" * 20)
    monkeypatch.setenv("MLFUNCS_HOME", str(long))
    try:
        assert put("    return x * 7\n").invoke(6) == 42
        sockets = find_places(read_settings()).sockets
        assert sockets.exists()
    finally:
        target().stop()
    assert not sockets.exists()
    assert processes_of(long) == []


def test_a_deploy_that_fails_shows_the_log_and_the_old_revision_serves():
    served = put("    return x + 1\n", "failing")
    with pytest.raises(DeployFailed) as caught:
        deploy(Picky, name="failing", threshold=-1.0)
    message = str(caught.value)
    assert "the threshold is below zero" in message
    assert "rev-1 still serves" in message
    assert "last lines of its log" in message
    assert served.invoke(1) == 2
    assert served.status().traffic == {"rev-1": 100}
    assert served.status().state == "ready"


def test_an_endpoint_whose_first_deploy_failed_says_so_to_callers_and_in_its_status():
    with pytest.raises(DeployFailed):
        deploy(Picky, name="never", threshold=-1.0)
    assert endpoint("never").status().state == "empty"
    assert "the threshold is below zero" in endpoint("never").status().message
    with pytest.raises(Unavailable, match=r"no revision that serves.*mlfuncs logs never"):
        endpoint("never").invoke_json({"x": 1.0})


class Picky:
    """Does not like every threshold."""

    def __init__(self, threshold: float) -> None:
        if threshold < 0:
            raise ValueError("the threshold is below zero")
        self.threshold = threshold

    def __call__(self, x: float) -> bool:
        return x > self.threshold


def test_a_class_gets_its_values():
    served = deploy(Picky, name="picky", threshold=0.5, scale=ml.Scale(min=1, max=1))
    assert served.invoke(0.7) is True
    assert served.invoke(x=0.3) is False


def test_a_redeploy_moves_to_the_new_code_and_rollback_returns():
    served = put("    return x + 10\n", "moving")
    assert served.invoke(1) == 11
    assert put("    return x + 20\n", "moving").invoke(1) == 21
    served.rollback()
    assert served.invoke(1) == 11
    assert served.tag("next", "rev-2").endswith("/moving--next")
    tagged = Endpoint("moving--next")
    tagged.__dict__["url"] = f"{served.url}--next"
    assert tagged.invoke(x=1) == 21


def test_what_serves_survives_a_killed_supervisor_and_the_next_one_goes_on_with_it():
    served = put("    return os.getpid() + 0 * x\n", "surviving")
    pid = served.invoke(1)
    overview = target().overview()
    os.kill(overview["supervisor"]["pid"], signal.SIGKILL)
    assert served.invoke(1) == pid
    wait_until(
        lambda: (target().overview()["supervisor"] or overview["supervisor"]) != overview["supervisor"], "another"
    )
    after = target().overview()
    assert after["router"] == overview["router"]
    assert served.invoke(1) == pid
    assert [replica.pid for replica in served.status().replicas] == [pid]


def test_the_sentinel_tries_on_while_the_port_of_the_router_is_taken(own_home: Settings):
    served = put("    return x\n")
    state = json.loads((own_home.home / "run" / "state.json").read_text())
    router = target().overview()["router"]
    sentinel, supervisor = state["extra"]["sentinel"]["pid"], state["extra"]["supervisor"]
    os.kill(sentinel, signal.SIGSTOP)
    for pid in (supervisor, router["pid"]):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_running(pid), "the end")
    log = own_home.home / "logs" / "supervisor.log"
    port = int(router["url"].rpartition(":")[2])
    with _listener(port):
        os.kill(sentinel, signal.SIGCONT)
        wait_until(lambda: log.read_text().count(f"port {port} of 127.0.0.1 is taken") >= 2, "two tries", 120)
    wait_until(lambda: _answers(port), "the router", 120)
    assert served.invoke(3) == 3
    assert target().overview()["router"]["url"] == router["url"]


def _listener(port: int) -> socket.socket:
    """A listener on `port`, once no connection of another test has it any more."""
    taken: list[socket.socket] = []

    def take() -> bool:
        with contextlib.suppress(OSError):
            taken.append(socket.create_server(("127.0.0.1", port)))
        return bool(taken)

    wait_until(take, "the port", 120)
    return taken[0]


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_any_call_starts_the_supervisor_when_it_and_its_sentinel_are_gone():
    put("    return x\n", "calling")
    home = Path(os.environ["MLFUNCS_HOME"])
    sentinel = json.loads((home / "run" / "state.json").read_text())["extra"]["sentinel"]["pid"]
    os.kill(sentinel, signal.SIGKILL)
    first = target().overview()["supervisor"]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not is_running(first), "the end")
    assert endpoint("calling").status().state == "ready"
    assert target().overview()["supervisor"]["pid"] != first


def test_down_cleans_up_after_a_killed_supervisor(own_home: Settings):
    put("    return x\n")
    state = json.loads((own_home.home / "run" / "state.json").read_text())
    os.kill(state["extra"]["sentinel"]["pid"], signal.SIGKILL)
    os.kill(state["extra"]["supervisor"], signal.SIGKILL)
    wait_until(lambda: not is_running(state["extra"]["supervisor"]), "the end")
    assert len(target().stop()) >= 3
    wait_until(lambda: processes_of(own_home.home) == [], "no process")


def test_a_router_that_dies_comes_back_at_the_same_address():
    served = put("    return x\n", "routed")
    before = target().overview()["router"]
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: target().overview()["router"]["pid"] != before["pid"], "another router")
    assert served.invoke(3) == 3
    assert target().overview()["router"]["url"] == before["url"]


def test_a_worker_that_dies_again_and_again_is_shown():
    served = put("    os._exit(3) if x == 13 else None\n    return x\n", "dying")
    for _ in range(3):
        with pytest.raises(MlfuncsError):
            served.invoke(13)
        wait_until(lambda: any(r.state == "ready" for r in served.status().replicas), "a new worker")
    status = served.status()
    assert "ended with status 3" in status.message
    assert served.invoke(1) == 1


def test_a_handler_that_hangs_gets_504_and_its_worker_is_replaced():
    served = put("    while x == 13:\n        time.sleep(1)\n    return os.getpid()\n", "hanging", timeout_s=3)
    pid = served.invoke(1)
    with pytest.raises(DeadlineExceeded):
        served.invoke(13)
    wait_until(lambda: not is_running(pid), "the stuck worker's end")
    wait_until(lambda: any(r.state == "ready" for r in served.status().replicas), "a new worker")
    assert served.invoke(1) != pid


def test_code_with_threads_at_import_is_spawned():
    from mlfuncs.loading import load_file

    path = Path(os.environ["MLFUNCS_HOME"]).parent / "threaded_module.py"
    path.write_text(
        "import threading, time\n"
        "class Threaded:\n"
        "    def __init__(self):\n"
        "        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "    def __call__(self, x: int) -> int:\n"
        "        return threading.active_count()\n"
    )
    served = deploy(load_file(path).Threaded, name="threaded", scale=ml.Scale(min=1, max=1))
    assert served.invoke(1) >= 2


def test_bad_input_and_unknown_names():
    served = put("    return x\n", "strict")
    with pytest.raises(InvalidInput, match="x"):
        served.invoke(x="1")
    with pytest.raises(NotFound, match="did you mean 'strict'"):
        endpoint("strcit")
    unknown = Endpoint("strcit")
    unknown.__dict__["url"] = served.url.replace("strict", "strcit")
    with pytest.raises(NotFound, match="strict"):
        unknown.invoke(x=1)


def test_what_the_code_prints_is_in_the_log_and_can_be_followed():
    served = put("    print('told', x)\n    return x\n", "telling")
    served.invoke(41)
    wait_until(lambda: any("told 41" in line for line in served.logs(50)), "the line")
    assert "told 41" in str(served.logs(50))
    lines = iter(served.logs(0, follow=True))
    served.invoke(42)
    assert any("told 42" in line for line in (next(lines) for _ in range(3)))


def test_one_endpoint_calls_another_and_passes_its_deadline_on():
    put("    time.sleep(600 if x == 13 else 0)\n    return x * 2\n", "inner")
    outer = put("    return ml.endpoint('inner').invoke(x) + 1\n", "outer", timeout_s=8)
    assert outer.invoke(4) == 9
    with pytest.raises(DeadlineExceeded):
        outer.invoke(13)


def test_tokens_are_asked_for_once_there_is_one():
    served = put("    return x\n", "guarded")
    token = served.create_token()
    with pytest.raises(Unauthorized):
        served.invoke(1)
    assert endpoint("guarded", token=token).invoke(1) == 1
    second = served.create_token()
    served.revoke_token(token)
    with pytest.raises(Unauthorized):
        endpoint("guarded", token=token).invoke(1)
    assert endpoint("guarded", token=second).invoke(1) == 1


def test_a_secret_set_after_the_supervisor_started_reaches_the_worker(monkeypatch: pytest.MonkeyPatch):
    target().start()
    monkeypatch.setenv("LATE_SECRET", "swordfish-4711")
    served = put("    return len(os.environ['LATE_SECRET'])\n", "secretive", secrets=["LATE_SECRET"])
    assert served.invoke(1) == 14
    for path in Path(os.environ["MLFUNCS_HOME"]).rglob("*"):
        if path.is_file():
            assert b"swordfish-4711" not in path.read_bytes(), path


def test_another_project_of_the_home_has_its_own_list(monkeypatch: pytest.MonkeyPatch):
    put("    return x\n", "mine")
    monkeypatch.setenv("MLFUNCS_PROJECT", "other")
    with pytest.raises(Conflict, match="belongs to project 'test'"):
        put("    return x\n", "mine")
    theirs = put("    return x + 5\n", "theirs")
    assert theirs.invoke(1) == 6
    assert [status.name for status in list_endpoints()] == ["theirs"]


def test_another_registry_in_the_same_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target().start()
    monkeypatch.setenv("MLFUNCS_REGISTRY_URL", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(Conflict, match="uses another registry"):
        put("    return x\n", "elsewhere")


def test_deleting_ends_its_processes_and_the_name_is_free_again():
    served = put("    return os.getpid()\n", "leaving")
    pid = served.invoke(1)
    served.delete()
    assert not is_running(pid)
    with pytest.raises(NotFound):
        endpoint("leaving")
    assert put("    return x\n", "leaving").invoke(5) == 5


def test_spares_are_parked_and_take_over(shared: Path):
    served = put("    return os.getpid()\n", "spared", scale=ml.Scale(min=1, max=2, buffer=1))
    wait_until(lambda: [r.state for r in served.status().replicas].count("parked") == 1, "a parked spare")
    spare = next(r.pid for r in served.status().replicas if r.state == "parked")
    worker = served.invoke(1)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not is_running(worker), "the end")
    assert served.invoke(1) == spare


def test_the_command_line_shows_what_runs(capfd: pytest.CaptureFixture[str]):
    from mlfuncs.cli import main

    put("    return x * 3\n", "shown")
    capfd.readouterr()
    main(["status", "--json"])
    values = json.loads(capfd.readouterr().out)
    (shown,) = [entry for entry in values["endpoints"] if entry["name"] == "shown"]
    assert shown["revision"] == "rev-1"
    assert shown["url"].startswith("http://127.0.0.1:")
    assert [replica["state"] for replica in shown["replicas"]] == ["ready"]
    assert is_running(shown["replicas"][0]["pid"])
    main(["invoke", "shown", "--data", '{"x": 14}'])
    assert capfd.readouterr().out == "42\n"
    main(["status"])
    assert "shown" in capfd.readouterr().out
    assert "shown" in list_endpoints()._repr_html_()
    assert str(shown["replicas"][0]["pid"]) in endpoint("shown")._repr_html_()


def test_options_that_no_router_takes_are_a_failure_of_their_endpoint_alone(own_home: Settings) -> None:
    deploy(ml.function(lambda n: n, name="bad"))
    registry = open_registry(own_home)
    registry.endpoints.update("bad", lambda desired, row: {**desired, "options": {"access": {"rate_per_s": "a"}}})
    target().apply(registry.endpoints.get("bad"))
    assert deploy(ml.function(lambda n: n, name="good")).invoke(n=1) == 1
    wait_until(lambda: "rate_per_s" in endpoint("bad").status().message, "the reason in the status")
    with pytest.raises(SpecError, match="rate_per_s"):
        deploy(ml.function(lambda n: n + 1, name="bad"))
    assert deploy(ml.function(lambda n: n + 1, name="bad"), rate_per_s=5.0).invoke(n=1) == 2
    endpoint("bad").delete()
