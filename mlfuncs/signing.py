"""Ed25519 signatures (RFC 8032) over bundles and pickled artifacts.

A project signs with its own private key, kept in `home/keys`; a reader verifies against the keys in the *reader's*
settings, never against a key that came with the object.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlfuncs.errors import SpecError, StorageError, UntrustedError
from mlfuncs.files import sync_folder, write_synced
from mlfuncs.settings import Settings, ensure_home

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_VARIABLE = "MLFUNCS_SIGNING_KEY"
_SCHEME = "ed25519"


def sha256_hex(payload: bytes) -> str:
    """The SHA-256 digest of `payload` as 64 hex digits."""
    return hashlib.sha256(payload).hexdigest()


@dataclass(frozen=True)
class SigningKey:
    """A private key; `public` is its public half as "ed25519:<base64>"."""

    _private: Ed25519PrivateKey
    public: str

    def sign(self, payload: bytes) -> str:
        """The signature of `payload` as "<public key> <base64 signature>"."""
        return f"{self.public} {base64.b64encode(self._private.sign(payload)).decode()}"


@dataclass(frozen=True)
class KeyRing:
    """The public keys ("ed25519:<base64>") whose signatures are believed."""

    public_keys: frozenset[str]

    def verify(self, payload: bytes, signature: str | None, what: str) -> None:
        """Return when a trusted key signed `payload`; else raise UntrustedError, naming `what`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        if not signature:
            raise UntrustedError(f"{what} is not signed; it was not loaded. Build it again with this project's key")
        public, _, encoded = signature.partition(" ")
        if public not in self.public_keys:
            raise UntrustedError(
                f"{what} is signed by a key that is not trusted here ({public}); it was not loaded. "
                "Add the key to MLFUNCS_TRUSTED_KEYS if you trust its owner"
            )
        try:
            raw = base64.b64decode(public.removeprefix(_SCHEME + ":"), validate=True)
            Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(encoded, validate=True), payload)
        except (InvalidSignature, ValueError) as exc:
            raise UntrustedError(
                f"{what} does not match its signature: it was changed after signing; not loaded"
            ) from exc


def project_key(settings: Settings) -> SigningKey:
    """The project's private key, made on first use (atomically, readable by its owner only).

    The variable MLFUNCS_SIGNING_KEY holds its PEM where `home` does not last: in a pod, from a Kubernetes Secret.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    given = os.environ.get(KEY_VARIABLE, "")
    if given:
        return _signing_key(_from_pem(given.strip().encode() + b"\n", KEY_VARIABLE))
    path = ensure_home(settings) / "keys" / f"{settings.project}.pem"
    if not path.exists():
        _create_once(path, _to_pem(Ed25519PrivateKey.generate().private_bytes_raw()))
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise StorageError(f"the signing key {path} cannot be read: {exc.strerror or exc}") from exc
    return _signing_key(_from_pem(content, str(path)))


def _signing_key(raw: bytes) -> SigningKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(raw)
    public = base64.b64encode(private.public_key().public_bytes_raw()).decode()
    return SigningKey(private, f"{_SCHEME}:{public}")


# PKCS #8 of an Ed25519 key (RFC 8410, section 7): these 16 bytes, then the 32 of the key. Put together here because
# cryptography's own serialization takes as long to import as a bundle takes to build.
_PKCS8 = bytes.fromhex("302e020100300506032b657004220420")
_BEGIN, _END = b"-----BEGIN PRIVATE KEY-----\n", b"-----END PRIVATE KEY-----\n"


def _to_pem(raw: bytes) -> bytes:
    return _BEGIN + base64.b64encode(_PKCS8 + raw) + b"\n" + _END


def _from_pem(content: bytes, place: str) -> bytes:
    """The key's 32 bytes; other forms of PEM (with a public key, say) are left to cryptography."""
    if content.startswith(_BEGIN) and content.endswith(_END):
        try:
            der = base64.b64decode(content[len(_BEGIN) : -len(_END)])
        except ValueError:
            der = b""
        if len(der) == len(_PKCS8) + 32 and der.startswith(_PKCS8):
            return der[len(_PKCS8) :]
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise SpecError(f"{place} is not a readable key ({exc}); put it back from a copy, or move it away") from exc
    if not isinstance(private, Ed25519PrivateKey):
        raise SpecError(f"{place} is not an Ed25519 key; take it away and a new one is made")
    return private.private_bytes_raw()


def key_ring(settings: Settings) -> KeyRing:
    """The keys trusted under `settings`: the project's own and those in `trusted_keys`."""
    others = {key.strip() for key in settings.trusted_keys.split(",") if key.strip()}
    return KeyRing(frozenset({project_key(settings).public} | others))


def _create_once(path: Path, content: bytes) -> None:
    """Write `path` whole or not at all; when another process was first, its content stays. Raises StorageError.

    On disk before anything is signed with it: after a power cut nobody else has the key.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write_synced(file, content)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
            sync_folder(path.parent)
        finally:
            os.unlink(temporary)
    except OSError as exc:
        raise StorageError(f"the signing key {path} cannot be written: {exc.strerror or exc}") from exc
