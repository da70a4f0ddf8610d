"""A zygote forks workers of a real bundle: fast, safe with numeric libraries, and independent of its own life."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.artifacts import ArtifactStore
from mlfuncs.bundles.bundle import build_bundle
from mlfuncs.settings import Settings
from mlfuncs_runtime.worker.config import WorkerConfig
from mlfuncs_runtime.worker.zygote import other_threads

ROOT = Path(__file__).parents[2]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("worker", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self.path)


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.002)


def request(path: str, body: Any = None, target: str = "/") -> tuple[int, Any]:
    with contextlib.closing(UnixConnection(path)) as connection:
        method, payload = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, target, payload, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content) if answer.getheader("content-type") != METRICS else content.decode()


METRICS = "text/plain; version=0.0.4; charset=utf-8"


class ZygoteUnderTest:
    def __init__(self, config: WorkerConfig, settings: Settings, folder: Path) -> None:
        self.folder, self.pids = folder, list[int]()
        self.control = str(folder / "z.sock")
        self.log_path = Path(config.log_path)
        (folder / "zygote.json").write_text(json.dumps(config.to_dict()))
        self.spawned: list[subprocess.Popen[bytes]] = []
        self.environ = environ = {**os.environ, **settings.to_environ()}
        environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "runtime"))
        command = [sys.executable, "-m", "mlfuncs_runtime.worker.zygote", "--config", str(folder / "zygote.json")]
        self.process = subprocess.Popen([*command, "--control", self.control], env=environ, cwd=folder)

    def wait_loaded(self) -> ZygoteUnderTest:
        wait_for(lambda: self.process.poll() is not None or os.path.exists(self.control), 180)
        assert self.process.poll() is None, self.log_path.read_text()
        return self

    def order(self, **order: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(self.control)
            connection.sendall(json.dumps(order).encode() + b"\n")
            with connection.makefile("rb") as file:
                answer: dict[str, Any] = json.loads(file.readline())
                return answer

    def fork(self, replica: str) -> str:
        path = str(self.folder / f"{replica}.sock")
        answer = self.order(op="fork", replica=replica, socket=path, requested_at=time.monotonic())
        assert "pid" in answer, answer
        self.pids.append(answer["pid"])
        wait_for(lambda: _ready(path))
        return path

    def spawn(self, replica: str) -> str:
        """A worker that loads the bundle itself, as the supervisor starts it when the zygote cannot fork."""
        path, config = str(self.folder / f"{replica}.sock"), self.folder / f"{replica}.json"
        config.write_text(json.dumps(json.loads((self.folder / "zygote.json").read_text()) | {"socket": path}))
        command = [sys.executable, "-m", "mlfuncs_runtime.worker.process", "--config", str(config)]
        self.spawned.append(subprocess.Popen(command, env=self.environ, cwd=self.folder))
        wait_for(lambda: _ready(path), 180)
        return path

    def stop(self) -> None:
        for child in self.spawned:
            child.kill()
            child.wait(60)
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)


def _ready(path: str) -> bool:
    try:
        return request(path, target="/-/ready")[0] == 200
    except OSError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    zygotes: list[ZygoteUnderTest] = []
    settings = Settings(home=tmp_path / "h", project="shop")

    def begin(function: Any, init: dict[str, Any] | None = None, **overrides: Any) -> ZygoteUnderTest:
        function = ml.function(function)
        bundle = build_bundle(function.target, function.spec, settings)
        store = ArtifactStore.open(settings)
        config = WorkerConfig(
            endpoint="demo",
            project="shop",
            revision="rev-1",
            bundle=bundle.digest,
            log_path=str(tmp_path / "z.log"),
            init_args={name: store.put(value).to_dict() for name, value in (init or {}).items()},
            **overrides,
        )
        zygotes.append(ZygoteUnderTest(config, settings, tmp_path))
        return zygotes[-1]

    yield begin
    for zygote in zygotes:
        zygote.stop()


def draw(n: int) -> dict[str, list[float]]:
    import os
    import random

    import numpy as np

    return {"random": [random.random()], "numpy": [float(np.random.rand())], "pid": [os.getpid() + 0.0]}


def test_forks_workers_that_differ_in_randomness_and_process(start: Any) -> None:
    zygote = start(draw).wait_loaded()
    assert zygote.order(op="ping")["ok"]
    answers = [request(zygote.fork(f"r{n}"), {"n": 1})[1] for n in range(2)]
    for key in ("random", "numpy", "pid"):
        assert answers[0][key] != answers[1][key]
    assert [int(answer["pid"][0]) for answer in answers] == zygote.pids


def test_reports_the_cold_start_from_the_wish_and_the_exits_of_its_workers(start: Any) -> None:
    zygote = start(draw).wait_loaded()
    path = zygote.fork("r0")
    samples = request(path, target="/-/metrics")[1]
    line = next(line for line in samples.splitlines() if line.startswith("mlfuncs_worker_cold_start_seconds{"))
    assert 0 < float(line.split()[-1]) < 60
    os.kill(zygote.pids[0], signal.SIGTERM)
    exits: list[Any] = []

    def collect() -> bool:
        exits.extend(zygote.order(op="exits")["exits"])
        return bool(exits)

    wait_for(collect)
    assert exits == [{"pid": zygote.pids[0], "status": 0}]


def test_a_worker_outlives_its_zygote(start: Any) -> None:
    zygote = start(draw).wait_loaded()
    path = zygote.fork("r0")
    zygote.process.kill()
    zygote.process.wait(60)
    assert request(path, {"n": 1})[0] == 200


class Ensemble:
    """Predicts with models whose libraries use OpenMP, and warms them in the zygote."""

    def __init__(self, seed: int) -> None:
        import numpy as np
        from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

        rows = np.random.default_rng(seed).normal(size=(400, 5))
        labels = (rows[:, 0] > 0).astype(int)
        self.models = [
            HistGradientBoostingClassifier(max_iter=20).fit(rows, labels),
            RandomForestClassifier(20).fit(rows, labels),
        ]

    def warmup(self) -> None:
        self([[0.0] * 5])

    def __call__(self, rows: list[list[float]]) -> list[int]:
        import numpy as np

        votes = np.mean([model.predict_proba(np.array(rows))[:, 1] for model in self.models], axis=0)
        return [int(vote > 0.5) for vote in votes]


def test_children_of_a_zygote_that_ran_openmp_models_answer(start: Any) -> None:
    zygote = start(Ensemble, {"seed": 1}).wait_loaded()
    assert zygote.order(op="ping")["ok"]
    rows = [[2.0, 0, 0, 0, 0], [-2.0, 0, 0, 0, 0]] * 200
    for n in range(2):
        assert request(zygote.fork(f"r{n}"), {"rows": rows}) == (200, [1, 0] * 200)


def test_refuses_to_fork_with_the_names_of_the_threads_when_user_code_started_some(start: Any) -> None:
    class Threaded:
        def __init__(self) -> None:
            import threading
            import time

            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

        def __call__(self, x: int) -> int:
            return x

    zygote = start(Threaded).wait_loaded()
    answer = zygote.order(op="fork", replica="r0", socket=str(zygote.folder / "r0.sock"))
    assert answer["error"] == "Conflict"
    assert "cannot fork" in answer["message"]
    assert zygote.process.wait(60) == 0


class Compiled:
    """The sum of squares by a numba kernel that may run on several threads; `warm` runs it in the zygote."""

    def __init__(self, warm: bool) -> None:
        import numba
        import numpy as np

        def sum_squares(values):  # type: ignore[no-untyped-def]
            total = 0.0
            for at in numba.prange(values.shape[0]):
                total += values[at] * values[at]
            return total

        self.warm, self.numpy, self.kernel = warm, np, numba.njit(parallel=True)(sum_squares)

    def warmup(self) -> None:
        if self.warm:
            self([1.0])

    def __call__(self, x: list[float]) -> float:
        return float(self.kernel(self.numpy.array(x)))


def test_forks_run_a_parallel_numba_kernel_that_the_zygote_only_imported(start: Any) -> None:
    zygote = start(Compiled, {"warm": False}).wait_loaded()
    for n in range(2):
        assert request(zygote.fork(f"r{n}"), {"x": [1.0, 2.0, 3.0]}) == (200, 14.0)


def test_a_parallel_numba_kernel_that_ran_in_the_zygote_makes_it_refuse(start: Any) -> None:
    """On one core it starts no thread that could be seen, and numba's OpenMP layer still ends its children."""
    environ = {"NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "omp"}
    zygote = start(Compiled, {"warm": True}, env=environ).wait_loaded()
    answer = zygote.order(op="ping")
    assert answer["error"] == "Conflict"
    assert "numba" in answer["message"]
    assert zygote.process.wait(60) == 0


class Framed:
    """A sum by groups in polars, which starts threads when it is imported."""

    def __init__(self) -> None:
        import polars as pl

        self.pl = pl

    def __call__(self, x: list[float]) -> float:
        frame = self.pl.LazyFrame({"x": x, "key": [n % 3 for n in range(len(x))]})
        return float(frame.group_by("key").agg(self.pl.col("x").sum()).select("x").sum().collect().item())


def test_polars_in_the_zygote_is_refused_by_name_and_answers_from_a_spawned_worker(start: Any) -> None:
    zygote = start(Framed).wait_loaded()
    answer = zygote.order(op="fork", replica="r0", socket=str(zygote.folder / "r0.sock"))
    assert answer["error"] == "Conflict"
    assert "polars" in answer["message"]
    assert zygote.process.wait(60) == 0
    assert request(zygote.spawn("r1"), {"x": [1.0, 2.0, 3.0]}) == (200, 6.0)


def test_a_malformed_order_is_answered_and_the_zygote_goes_on(start: Any) -> None:
    zygote = start(draw).wait_loaded()
    assert "unknown op" in zygote.order(op="dance")["message"]
    assert "needs 'replica'" in zygote.order(op="fork")["message"]
    assert zygote.order(op="ping")["ok"]


def test_a_function_that_cannot_load_leaves_the_reason_beside_the_control_socket(start: Any) -> None:
    class Broken:
        def __init__(self) -> None:
            raise RuntimeError("no model here")

        def __call__(self, x: int) -> int:
            return x

    zygote = start(Broken)
    assert zygote.process.wait(60) == 78
    assert json.loads(Path(zygote.control + ".error").read_text())["detail"] == "no model here"


def test_sees_threads_beside_the_calling_one() -> None:
    import threading

    stop = threading.Event()
    before = len(other_threads())
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert len(other_threads()) == before + 1
    stop.set()
    thread.join()


_HOLES = """
import ctypes, json
from mlfuncs_runtime.worker import heap

libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    print("null")
    raise SystemExit

def holes():
    libc.mallinfo2.restype = heap._Mallinfo
    told = libc.mallinfo2()
    return told.fordblks - told.keepcost

blocks = [bytearray(600 + 16 * (n % 200)) for n in range(2000)]
del blocks[::2]
before = holes()
heap.fill_holes()
print(json.dumps([before, holes()]))
"""


def test_the_holes_of_the_heap_are_taken_before_a_fork(require: Any) -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "runtime"))}
    told = subprocess.run([sys.executable, "-c", _HOLES], env=environ, check=True, capture_output=True, timeout=120)
    found = json.loads(told.stdout)
    require("glibc 2.33 or newer", found is not None)
    before, after = found
    assert before > 1_000_000
    assert after < before / 10


class Held:
    """A child of the process that constructs it waits, inside of fork(), until there is a file `gate`."""

    def __init__(self, gate: str) -> None:
        import os
        import time

        def wait() -> None:
            while not os.path.exists(gate):
                time.sleep(0.005)

        os.register_at_fork(after_in_child=wait)

    def __call__(self, name: str) -> str:
        return name


def test_a_worker_that_is_told_to_end_before_it_serves_ends(start: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    zygote = start(Held, {"gate": str(gate)}).wait_loaded()
    told = zygote.order(op="fork", replica="r1", socket=str(tmp_path / "r1.sock"))
    zygote.pids.append(told["pid"])
    os.kill(told["pid"], signal.SIGTERM)  # the child is in its first moment, held by the class's own hook
    gate.touch()
    exits: list[dict[str, int]] = []

    def has_ended() -> bool:
        exits.extend(zygote.order(op="exits")["exits"])
        return bool(exits)

    wait_for(has_ended)
    assert exits == [{"pid": told["pid"], "status": -signal.SIGTERM}]
    assert request(zygote.fork("r2"), {"name": "ann"}) == (200, "ann")
