"""CPU per request of a worker (20 floats in, 1 out) beside bare ASGI, FastAPI, LitServe, MLServer and BentoML.

    python benchmarks/worker_fast_path.py [--seconds 3] [--rounds 3] [--connections 16] [--peers all|none|NAME,..]

Each server is one process tree on loopback TCP (wrk speaks no Unix sockets); rounds are interleaved under wrk, and the
CPU time of the whole tree is what is compared: it repeats on a busy machine where requests per second do not. Peers
that are not in this environment are installed by uv into environments of their own below ~/.cache/mlfuncs-benchmarks.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from peers import peer_python

FLOATS = [round(0.1 * i, 1) for i in range(1, 21)]
PLAIN = json.dumps({"x": FLOATS})
V2 = json.dumps({"inputs": [{"name": "x", "shape": [20], "datatype": "FP64", "data": FLOATS}]})

_UVICORN = """
import socket, sys, uvicorn
def serve(app):
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
    options = dict(log_level="warning", access_log=False, loop="uvloop", http="httptools", lifespan="off")
    uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])
"""
_OURS = """
import socket, sys
from mlfuncs_runtime.worker.asgi import make_app
from mlfuncs_runtime.worker.invocation import AppOptions
from mlfuncs_runtime.worker.server import Service
DEF predict(x: list[float]) -> float:
    return sum(x)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
Service(make_app(predict, AppOptions(name="predict")), listener).run()
"""
_FASTAPI = (
    _UVICORN
    + """
from fastapi import FastAPI
from pydantic import BaseModel
class Input(BaseModel):
    x: list[float]
class Output(BaseModel):
    y: float
app = FastAPI()
@app.post("/")
DEF predict(body: Input) -> Output:
    return Output(y=sum(body.x))
serve(app)
"""
)


@dataclass(frozen=True)
class Server:
    """One server to measure: its program (argument: the port), what it needs, and the request it gets."""

    name: str
    source: str
    packages: tuple[str, ...] = ()  # installed into an environment of its own; none: this environment
    path: str = "/"
    body: str = PLAIN
    files: dict[str, str] = field(default_factory=dict)


SERVERS = [
    Server(
        "uvicorn ASGI + orjson",
        _UVICORN
        + """
import orjson
async def app(scope, receive, send):
    message = await receive()
    answer = orjson.dumps(sum(orjson.loads(message["body"])["x"]))
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": answer})
serve(app)
""",
    ),
    Server("mlfuncs def", _OURS.replace("DEF", "def")),
    Server("mlfuncs async def", _OURS.replace("DEF", "async def")),
    Server("mlfuncs V2 protocol", _OURS.replace("DEF", "def"), path="/v2/models/predict/infer", body=V2),
    Server("FastAPI async def", _FASTAPI.replace("DEF", "async def")),
    Server("FastAPI def", _FASTAPI.replace("DEF", "def")),
    Server(
        "LitServe",
        """
import sys
import litserve as ls
class Api(ls.LitAPI):
    def setup(self, device): pass
    def decode_request(self, request): return request["x"]
    def predict(self, x): return sum(x)
    def encode_response(self, y): return {"y": y}
if __name__ == "__main__":
    ls.LitServer(Api(), accelerator="cpu").run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False,
                                               log_level="warning")
""",
        ("litserve",),
        "/predict",
    ),
    Server(
        "MLServer (V2)",
        """
import json, os, subprocess, sys
folder = os.path.dirname(os.path.abspath(__file__))
settings = {"http_port": int(sys.argv[1]), "grpc_port": int(sys.argv[1]) + 1, "metrics_port": int(sys.argv[1]) + 2,
            "host": "127.0.0.1", "parallel_workers": 0, "debug": False}
open(os.path.join(folder, "settings.json"), "w").write(json.dumps(settings))
open(os.path.join(folder, "model-settings.json"), "w").write(
    json.dumps({"name": "predict", "implementation": "model.Model"}))
os.environ["PYTHONPATH"] = folder
os.chdir(folder)
os.execv(sys.executable, [sys.executable, "-c", "from mlserver.cli import main; main()", "start", folder])
""",
        ("mlserver",),
        "/v2/models/predict/infer",
        V2,
        {
            "model.py": """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Model(MLModel):
    async def load(self): return True
    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", np.array([x.sum()]))])
"""
        },
    ),
    Server(
        "BentoML",
        """
import os, sys
folder = os.path.dirname(os.path.abspath(__file__))
os.chdir(folder)
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "service:Predict", "--host", "127.0.0.1",
                          "--port", sys.argv[1]])
""",
        ("bentoml",),
        "/predict",
        PLAIN,
        {
            "service.py": """
import bentoml
@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Predict:
    @bentoml.api
    def predict(self, x: list[float]) -> float:
        return sum(x)
"""
        },
    ),
]


def python_of(server: Server) -> str:
    """The interpreter that has the server's packages; raises RuntimeError, with the reason, when there is none."""
    if not server.packages:
        return sys.executable
    python = peer_python("-".join(server.packages), list(server.packages))
    if python is None:
        raise RuntimeError("cannot be installed")
    return python


class Running:
    """A started server; `measure` gives CPU microseconds per request of its whole process tree, and requests/s."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        folder.mkdir()
        for name, text in {"serve.py": server.source, **server.files}.items():
            (folder / name).write_text(text)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        command = [python_of(server), str(folder / "serve.py"), str(self.port)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = psutil.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        self.script = folder / "post.lua"
        self.script.write_text(
            f"wrk.method = 'POST'\nwrk.body = '{server.body}'\nwrk.headers['Content-Type'] = 'application/json'\n"
        )
        self._wait()

    def _wait(self) -> None:
        import urllib.error
        import urllib.request

        end = time.monotonic() + 60
        url = f"http://127.0.0.1:{self.port}{self.server.path}"
        request = urllib.request.Request(url, self.server.body.encode(), {"Content-Type": "application/json"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError) as exc:
                if self.process.poll() is not None or time.monotonic() > end:
                    tail = self.log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise RuntimeError(f"does not answer ({exc}); its log ends with {tail}") from exc
                time.sleep(0.1)

    def measure(self, seconds: int, connections: int) -> tuple[float, float]:
        before = self._cpu_s()
        url = f"http://127.0.0.1:{self.port}{self.server.path}"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(self.script), url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spent = self._cpu_s() - before
        count = int(re.search(r"(\d+) requests in", output)[1])  # type: ignore[index]
        if "Non-2xx" in output or not count:
            raise RuntimeError(f"{self.server.name} answered with errors:\n{output}")
        return spent / count * 1e6, count / seconds

    def _cpu_s(self) -> float:
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def stop(self) -> None:
        children = self.process.children(recursive=True) if self.process.is_running() else []
        for process in [self.process, *children]:
            if process.is_running():
                process.terminate()
        _, alive = psutil.wait_procs([self.process, *children], timeout=5)
        for process in alive:
            process.kill()


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--peers", default="all", help="all, none, or names of packages to install and measure")
    options = parser.parse_args()
    wanted = [
        s for s in SERVERS if not s.packages or options.peers == "all" or s.packages[0] in options.peers.split(",")
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running: list[Running] = []
        for number, server in enumerate(wanted):
            try:
                running.append(Running(server, folder / str(number)))
                stack.callback(running[-1].stop)
            except RuntimeError as exc:
                print(f"skipped: {server.name} {exc}")
        for one in running:
            one.measure(1, options.connections)
        results: dict[str, list[tuple[float, float]]] = {one.server.name: [] for one in running}
        for _ in range(options.rounds):
            for one in running:
                results[one.server.name].append(one.measure(options.seconds, options.connections))
    print_table(results)


def print_table(results: dict[str, list[tuple[float, float]]]) -> None:
    """The medians, and each server's CPU time as a multiple of the first's, round by round."""
    first = next(iter(results.values()))
    print("\n| server | CPU us/request | of bare ASGI | requests/s |\n|---|---:|---:|---:|")
    for name, rounds in results.items():
        ratio = statistics.median(mine[0] / base[0] for mine, base in zip(rounds, first, strict=True))
        cpu = statistics.median(cpu for cpu, _ in rounds)
        rate = statistics.median(rate for _, rate in rounds)
        print(f"| {name} | {cpu:.1f} | {ratio:.2f}x | {rate:,.0f} |")


if __name__ == "__main__":
    main()
