"""Signatures: the project's key is made once, and only trusted keys are believed."""

from __future__ import annotations

import dataclasses
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mlfuncs.errors import SpecError, StorageError, UntrustedError
from mlfuncs.settings import Settings
from mlfuncs.signing import KeyRing, key_ring, project_key, sha256_hex


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project="shop")


def test_a_signature_of_the_projects_key_is_believed(settings: Settings) -> None:
    signature = project_key(settings).sign(b"payload")
    key_ring(settings).verify(b"payload", signature, "it")
    assert signature.startswith("ed25519:")


@pytest.mark.parametrize("signature", [None, ""])
def test_nothing_unsigned_is_believed(settings: Settings, signature: str | None) -> None:
    with pytest.raises(UntrustedError, match="the model is not signed"):
        key_ring(settings).verify(b"payload", signature, "the model")


def test_a_changed_payload_is_found(settings: Settings) -> None:
    signature = project_key(settings).sign(b"payload")
    with pytest.raises(UntrustedError, match="changed after signing"):
        key_ring(settings).verify(b"Payload", signature, "it")


@pytest.mark.parametrize(
    "mangle", [lambda s: s[:-4], lambda s: s + "x", lambda s: s[:-8] + "!!!!!!!!", lambda s: s.split()[0]]
)
def test_a_mangled_signature_is_refused(settings: Settings, mangle) -> None:
    with pytest.raises(UntrustedError):
        key_ring(settings).verify(b"payload", mangle(project_key(settings).sign(b"payload")), "it")


def test_a_key_that_came_with_the_object_is_not_believed(settings: Settings) -> None:
    other = project_key(dataclasses.replace(settings, project="other"))
    with pytest.raises(UntrustedError, match=r"not trusted here \(ed25519:.*MLFUNCS_TRUSTED_KEYS"):
        key_ring(settings).verify(b"payload", other.sign(b"payload"), "it")
    trusting = dataclasses.replace(settings, trusted_keys=f" {other.public} ,")
    key_ring(trusting).verify(b"payload", other.sign(b"payload"), "it")


@pytest.mark.parametrize("key", ["ed25519:AAAA", "ed25519:%%%", "rsa:AAAA", "ed25519:"])
def test_a_trusted_key_that_is_no_key_refuses_and_does_not_crash(key: str) -> None:
    with pytest.raises(UntrustedError):
        KeyRing(frozenset({key})).verify(b"payload", f"{key} AAAA", "it")


def test_the_key_is_readable_by_its_owner_only_and_stays(settings: Settings) -> None:
    first = project_key(settings).public
    path = settings.home / "keys" / "shop.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert project_key(settings).public == first
    assert [p.name for p in path.parent.iterdir()] == ["shop.pem"]


def test_processes_that_start_together_make_one_key(settings: Settings) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from mlfuncs.settings import Settings; from mlfuncs.signing import project_key\n"
        "print(project_key(Settings(home=Path(sys.argv[1]), project='shop')).public)"
    )
    command = [sys.executable, "-c", code, str(settings.home)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate(timeout=60)[0] for process in running}) == 1


@pytest.mark.parametrize("content", [b"not a key", b""])
def test_a_damaged_key_file_is_named(settings: Settings, content: bytes) -> None:
    project_key(settings)
    path = settings.home / "keys" / "shop.pem"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"shop\.pem"):
        project_key(settings)


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="MLFUNCS_HOME"):
        project_key(Settings(home=tmp_path / "file" / "home", project="shop"))


def test_digests_are_sha256() -> None:
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_keys_are_pkcs8_as_other_tools_write_and_read_it(settings: Settings) -> None:
    from cryptography.hazmat.primitives import serialization

    key = project_key(settings)
    path = settings.home / "keys" / f"{settings.project}.pem"
    read = serialization.load_pem_private_key(path.read_bytes(), password=None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    assert read.private_bytes(*form) == path.read_bytes()
    path.write_bytes(b"# kept in a vault\n" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert project_key(settings).public == key.public
