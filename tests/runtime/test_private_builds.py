"""Builds behind a company's proxy, from its index, under its certificates: they work, and leave nothing in an image."""

import base64
import contextlib
import dataclasses
import datetime
import http.server
import io
import ipaddress
import socket
import ssl
import subprocess
import tomllib
from pathlib import Path

import pytest

from mlfuncs.loading import load_target
from mlfuncs.readiness import readable
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.settings import read_settings
from mlfuncs_runtime.images.base import find_source
from mlfuncs_runtime.images.builder import MemoryBuilder
from mlfuncs_runtime.images.function_image import ImageFunction, assemble
from mlfuncs_runtime.images.image import write_archive
from mlfuncs_runtime.images.prepare import requirements
from tests.runtime.private_index import PASSWORD, USER, fill, serving, serving_index

ROOT = Path(__file__).parents[2]
AUTHORITY = "Example Corp Root CA"
PRIVATE = (PASSWORD.encode(), USER.encode(), b"swordfish", b"proxy-user", AUTHORITY.encode())


class Proxy(http.server.BaseHTTPRequestHandler):
    """A proxy for TLS that asks for a password and notes where it led."""

    led: list[str] = []  # noqa: RUF012 - one per test, set by the fixture

    def do_CONNECT(self):
        if self.headers.get("Proxy-Authorization") != "Basic " + base64.b64encode(b"proxy-user:swordfish").decode():
            self.send_response(407)
            self.send_header("Proxy-Authenticate", "Basic")
            self.end_headers()
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as far:
            self.led.append(self.path)
            self.send_response(200)
            self.end_headers()
            ends = {self.connection.fileno(): (self.connection, far), far.fileno(): (far, self.connection)}
            with contextlib.suppress(OSError):  # an end that goes away
                while True:
                    for near, other in (ends[one] for one in readable(ends)):
                        part = near.recv(65536)
                        if not part:
                            return
                        other.sendall(part)

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def company(tmp_path, monkeypatch, request):
    """Settings of the environment for an index over TLS behind a proxy, both with passwords, on `request.param`."""
    address = request.param or _bridge_address()
    authority, certificate = certificates(tmp_path, address)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    folder = tmp_path / "index"
    Proxy.led = []
    for name in ("NO_PROXY", "no_proxy", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    with serving_index(folder, address, context) as port, serving(address, Proxy) as proxy_port:
        yield (
            folder / "simple",
            {
                "MLFUNCS_UV_INDEX_URL": f"https://{USER}:{PASSWORD}@{address}:{port}/simple",
                "HTTPS_PROXY": f"http://proxy-user:swordfish@{address}:{proxy_port}",
                "SSL_CERT_FILE": str(authority),
                "UV_NO_CACHE": "1",
            },
        )
        assert set(Proxy.led) == {f"{address}:{port}"}  # through the proxy, and nowhere else


@pytest.mark.parametrize("company", ["127.0.0.1"], indirect=True)
def test_a_functions_wheels_come_through_the_proxy_and_leave_no_trace(company, tmp_path, home, monkeypatch):
    index, environ = company
    fill(index, ["six==1.17.0"])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "served.py").write_text(
        'import mlfuncs as ml\n\n@ml.function(requirements=["six==1.17.0"])\ndef double(x: float) -> float:\n'
        "    return 2 * x\n"
    )
    monkeypatch.setattr("mlfuncs.environments.own.declared_requirements", lambda extra: [])  # the index has six alone
    function, settings = load_target(f"{tmp_path}/served.py:double"), read_settings()
    made = ImageFunction("double", function.bundle.digest, RevisionConfig(function.spec))
    image = assemble([made], MemoryBuilder().base(print), settings)
    archive = io.BytesIO()
    write_archive(image, ["x:1"], archive, image.own_layers)
    assert [word for word in PRIVATE if word in archive.getvalue()] == []


@pytest.mark.slow
@pytest.mark.timeout(900)  # everything of the base is downloaded and installed anew
@pytest.mark.parametrize("company", [""], indirect=True)
def test_the_base_is_built_through_the_proxy_and_leaves_no_trace(docker_engine, company, tmp_path, home, monkeypatch):
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    index, environ = company
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    fill(index, requirements(project, []))
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "other").write_text(str(tmp_path))  # makes this base another one than that of the other tests
    source = find_source()
    source = dataclasses.replace(source, files={**source.files, "mlfuncs/other": tmp_path / "other"})
    base = DockerBuilder(read_settings()).make_base(source, print)
    try:
        saved = subprocess.run(["docker", "save", base.name], capture_output=True, check=True).stdout
        described = subprocess.run(["docker", "inspect", base.name], capture_output=True, check=True).stdout
        history = ["docker", "history", "--no-trunc", "--format", "json", base.name]
        described += subprocess.run(history, capture_output=True, check=True).stdout
        assert [word for word in PRIVATE if word in saved or word in described] == []
        assert _stages_with(PASSWORD.encode()) == []
    finally:
        subprocess.run(["docker", "rmi", "--force", base.name], capture_output=True, check=False)


def certificates(folder, address):
    """Paths of an authority's certificate and of a key and certificate that it signed for `address`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def make(name, issuer, key, signer, *extensions):
        now = datetime.datetime.now(datetime.UTC)
        built = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        built = built.serial_number(x509.random_serial_number())
        built = built.not_valid_before(now - datetime.timedelta(hours=1))
        built = built.not_valid_after(now + datetime.timedelta(hours=1))
        for extension, critical in extensions:
            built = built.add_extension(extension, critical)
        return built.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (AUTHORITY, "index.example")]
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    signs = x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage)
    root = make(
        names[0], names[0], keys[0], keys[0], (x509.BasicConstraints(ca=True, path_length=None), True), (signs, True),
        (x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key()), False),
    )  # fmt: skip
    leaf = make(
        names[1], names[0], keys[1], keys[0], (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), False),
        (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False),
    )  # fmt: skip
    form = serialization.PrivateFormat.PKCS8
    private = keys[1].private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    (folder / "authority.pem").write_bytes(root)
    (folder / "server.pem").write_bytes(private + leaf)
    return folder / "authority.pem", folder / "server.pem"


def _bridge_address():
    """This machine's address on the network of containers."""
    import psutil

    return next(one.address for one in psutil.net_if_addrs()["docker0"] if one.family == socket.AF_INET)


def _stages_with(word):
    """The unnamed build stages whose history has `word`."""
    listed = ["docker", "images", "--quiet", "--filter", "dangling=true", "--filter", "label=dev.mlfuncs.stage=build"]
    found = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    history = ["docker", "history", "--no-trunc", "--format", "json"]
    return [i for i in found if word in subprocess.run([*history, i], capture_output=True, check=True).stdout]
