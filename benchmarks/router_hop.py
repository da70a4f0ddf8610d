"""CPU per request of one hop: our router, haproxy and nginx before the same worker on a Unix socket, and no hop at all.

    python benchmarks/router_hop.py [--seconds 4] [--rounds 3] [--connections 32] [--json FILE]

One process each, in interleaved rounds under wrk; CPU time of the hop's processes from /proc, which repeats on a busy
machine where requests per second do not. "everything on" has tokens, a rate limit, a concurrency limit and CORS.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from mlfuncs_runtime.routes import Access, Replica, Route

BODY = json.dumps({"x": [round(0.1 * i, 1) for i in range(20)]})
TOKEN = "benchmark"
_SCRIPT = f"""
wrk.method = "POST"
wrk.body = '{BODY}'
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer {TOKEN}"
"""


class Worker(asyncio.Protocol):
    """The cheapest upstream: any complete request gets the same answer, with the headers of a real worker."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"\r\ncontent-length:")
            length = int(head[at + 17 :].partition(b"\r\n")[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            self.transport.write(  # type: ignore[attr-defined]
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4\r\n"
                b"x-request-id: 0123456789ab-00000001\r\n\r\n0.25"
            )


def run_worker(unix: str, port: int) -> None:
    """Serve on a Unix socket for the hops, and on a port for the way without one."""
    import uvloop

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_unix_server(Worker, unix, backlog=1024)
        server = await loop.create_server(Worker, "127.0.0.1", port, backlog=1024)
        await server.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, env: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    """The process of a command, once its port answers; ended afterwards."""
    process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{command[0]} did not start")
        time.sleep(0.05)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


def haproxy_config(folder: Path, worker: str, port: int) -> list[str]:
    """haproxy's command with a config of one thread and kept connections to the worker."""
    (folder / "haproxy.cfg").write_text(
        f"""global
    nbthread 1
    maxconn 4000
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
frontend front
    bind 127.0.0.1:{port}
    unique-id-format %{{+X}}o\\ %ci:%cp_%fi:%fp_%Ts_%rt:%pid
    unique-id-header X-Request-Id
    default_backend workers
backend workers
    server one unix@{worker}
"""
    )
    return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]


def nginx_config(folder: Path, worker: str, port: int) -> list[str]:
    """nginx's command with one worker process and kept connections upstream."""
    (folder / "nginx.conf").write_text(
        f"""{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 4000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000;
    upstream worker {{ server unix:{worker}; keepalive 256; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://worker;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header X-Request-Id $request_id;
        }}
    }}
}}
"""
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")]


def router_command(folder: Path, worker: str, port: int, *, everything: bool) -> list[str]:
    """Our router's command with a table of one endpoint, plain or with every check on."""
    name = "everything" if everything else "plain"
    access = Access()
    concurrency: dict[str, int] = {}
    if everything:
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        access = Access((digest,), rate_per_s=1e9, burst=10**9, cors_origins=("https://example.org",))
        concurrency = {"rev-1": 1000}
    replicas = (Replica("one", "rev-1", worker),)
    route = Route("predict", "benchmark", {"rev-1": 1}, replicas, access=access, concurrency=concurrency)
    state = folder / f"{name}.json"
    state.write_text(json.dumps({"routes": [route.to_dict()]}))
    paths = ["--control", str(folder / f"{name}.sock"), "--state", str(state)]
    return [sys.executable, "-m", "mlfuncs_runtime.router.process", "--port", str(port), *paths]


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process and its children, so far."""
    members = [process, *process.children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in members)


def measure(process: psutil.Process, port: int, script: Path, options: argparse.Namespace) -> tuple[float, float]:
    """(CPU microseconds per request, requests per second) of one process under wrk."""
    command = ["wrk", "-t1", f"-c{options.connections}", f"-d{options.seconds}s", "-s", str(script)]
    before = cpu_s(process)
    out = subprocess.run([*command, f"http://127.0.0.1:{port}/predict"], capture_output=True, text=True, check=True)
    spent = cpu_s(process) - before
    if "Non-2xx" in out.stdout or "Socket errors" in out.stdout:
        raise SystemExit(f"requests to {process.name()} failed:\n{out.stdout}")
    requests = int(next(line for line in out.stdout.splitlines() if "requests in" in line).split()[0])
    return spent / requests * 1e6, requests / options.seconds


def main() -> None:
    """Run the rounds and print a table, with ratios to haproxy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(options.worker[0], int(options.worker[1]))
        return
    samples: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hop-", dir="/tmp")))
        script = folder / "post.lua"
        script.write_text(_SCRIPT)
        unix, direct = str(folder / "w.sock"), free_port()
        commands = {
            "router": router_command(folder, unix, free_port(), everything=False),
            "router, everything on": router_command(folder, unix, free_port(), everything=True),
        }
        ports = {name: int(command[command.index("--port") + 1]) for name, command in commands.items()}
        for name, config in (("haproxy", haproxy_config), ("nginx", nginx_config)):
            if shutil.which(name):
                ports[name] = free_port()
                commands[name] = config(folder, unix, ports[name])
        worker_command = [sys.executable, __file__, "--worker", unix, str(direct)]
        hops = {"no hop (the worker itself)": stack.enter_context(running(worker_command, direct))}
        ports["no hop (the worker itself)"] = direct
        for name, command in commands.items():
            hops[name] = stack.enter_context(running(command, ports[name]))
        for number in range(options.rounds):
            for name in list(hops)[:: -1 if number % 2 else 1]:  # so that no hop always follows the same one
                samples.setdefault(name, []).append(measure(hops[name], ports[name], script, options))
    report(samples, options)


def _ratio(values: list[float], base: list[float]) -> float | None:
    """The median of each round's ratio to haproxy; None without haproxy."""
    return round(statistics.median(own / other for own, other in zip(values, base, strict=True)), 2) if base else None


def report(samples: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> None:
    """Print the medians as a table, and write them as JSON. The ratio is the median of each round's own."""
    base = [cpu for cpu, _ in samples.get("haproxy", [])]
    medians = {
        name: {
            "cpu_us_per_request": round(statistics.median(cpu for cpu, _ in values), 1),
            "requests_per_s": round(statistics.median(rate for _, rate in values)),
            "to_haproxy": _ratio([cpu for cpu, _ in values], base),
        }
        for name, values in samples.items()
    }
    print("| hop | CPU us per request | to haproxy | requests/s |\n|---|---|---|---|")
    for name, values in medians.items():
        ratio = values["to_haproxy"] or "-"
        print(f"| {name} | {values['cpu_us_per_request']} | {ratio} | {values['requests_per_s']} |")
    if options.json:
        options.json.write_text(json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main()
