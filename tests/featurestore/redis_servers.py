"""Real redis-server processes for tests: plain, with password and TLS, and a cluster of three."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import redis

from tests.ports import free_port

SERVER = shutil.which("redis-server")


@contextlib.contextmanager
def running(folder: Path, *options: str):
    """A redis-server with these options, in a folder of its own, ended by its id."""
    if SERVER is None:
        pytest.skip("redis-server is not on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log", "ab") as log:
        command = [SERVER, "--dir", str(folder), "--save", "", "--bind", "127.0.0.1", *options]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def answers(client, seconds=60.0, ready=lambda client: client.ping()):
    """Wait until `ready(client)` holds."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.RedisError):
            if ready(client):
                return client
        assert time.monotonic() < deadline, "the server did not come up"
        time.sleep(0.02)


@contextlib.contextmanager
def cluster(folder: Path):
    """A cluster of three nodes that share the 16,384 slots; gives the port of the first."""
    with contextlib.ExitStack() as stack:
        ports = set()
        while len(ports) < 3:
            ports.add(free_port())
        ports = sorted(ports)
        for port in ports:
            options = ["--port", str(port), "--cluster-enabled", "yes", "--cluster-node-timeout", "30000"]
            stack.enter_context(running(folder / str(port), *options))
        nodes = [answers(redis.Redis(port=port)) for port in ports]
        bounds = [0, 5461, 10_923, 16_384]
        for node, first, last in zip(nodes, bounds, bounds[1:], strict=False):
            node.execute_command("CLUSTER", "ADDSLOTS", *range(first, last))
        for port in ports[1:]:
            nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)
        for node in nodes:
            answers(node, ready=lambda one: one.cluster("INFO")["cluster_state"] == "ok")
            answers(node, ready=lambda one: one.cluster("INFO")["cluster_known_nodes"] == "3")
            node.close()
        yield ports[0]


def certificate(folder: Path):
    """A self-made authority's certificate for 127.0.0.1 and its key: paths of both."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"
