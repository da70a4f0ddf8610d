"""What has no safe format: estimators ("model") and other objects ("pickle"), signed by the project that wrote them.

The file is a plain pickle (protocol 5) and, after its end, a seal: a line with the signature over kind and digest of
the pickle. Python's unpickler ignores what follows the end, so other tools can still read the file; mlfuncs reads the
seal first and unpickles nothing that a trusted key has not signed.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from typing import Any, BinaryIO

from mlfuncs.codecs.tagged import NotEncodable
from mlfuncs.errors import ArtifactError, UntrustedError
from mlfuncs.signing import KeyRing, SigningKey

_MARK = b"\n#mlfuncs-seal "
_MAX_SEAL = 512  # bytes; a seal is 15 + 52 + 1 + 88 + 1 long


def seal(kind: str, payload_sha256: str, key: SigningKey) -> bytes:
    """The line to write after a pickle of `kind` whose SHA-256 is `payload_sha256`."""
    return _MARK + key.sign(_statement(kind, payload_sha256)).encode("ascii") + b"\n"


def unseal(kind: str, sealed: bytes, ring: KeyRing, what: str) -> memoryview:
    """The pickle inside `sealed`, once a key of `ring` is found to have signed it. Raises UntrustedError."""
    start = sealed.rfind(_MARK, max(0, len(sealed) - _MAX_SEAL))
    if start < 0:
        raise UntrustedError(f"{what} is not signed; it was not loaded. Store the value again with this project's key")
    payload = memoryview(sealed)[:start]
    try:
        signature = sealed[start + len(_MARK) :].decode("ascii").strip()
    except UnicodeDecodeError as exc:
        raise UntrustedError(f"{what} has a damaged signature; it was not loaded") from exc
    ring.verify(_statement(kind, hashlib.sha256(payload).hexdigest()), signature, what)
    return payload


def _statement(kind: str, payload_sha256: str) -> bytes:
    return f"mlfuncs artifact v1\n{kind}\n{payload_sha256}".encode()


def is_estimator(value: Any) -> bool:
    """Whether `value` is an object in the manner of scikit-learn: it can `fit` and tell its parameters."""
    return not isinstance(value, type) and hasattr(value, "fit") and hasattr(value, "get_params")


def describe_estimator(value: Any) -> dict[str, Any]:
    """What a reader wants to know of a model before loading it: class, library versions, features, classes."""
    libraries = {}
    for module in {type(value).__module__.split(".")[0], *(["sklearn"] if "sklearn" in sys.modules else [])}:
        version = getattr(sys.modules.get(module), "__version__", None)
        if isinstance(version, str):
            libraries[module] = version
    described: dict[str, Any] = {"class": type(value).__name__, "libraries": libraries}
    for name, key in (("feature_names_in_", "features"), ("classes_", "classes")):
        found = getattr(value, name, None)
        if found is not None and hasattr(found, "tolist"):
            described[key] = found.tolist()[:1000]
    count = getattr(value, "n_features_in_", None)
    return described if count is None else {**described, "n_features": int(count)}


class PickleCodec:
    """Any object, by cloudpickle, classes of the user's own files included. `kind` "model" is for estimators."""

    signed = True

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def encode(self, value: Any, sink: BinaryIO) -> dict[str, Any]:
        from mlfuncs.bundles.portable import dump_portable

        try:
            dump_portable(value, sink)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError, NotImplementedError) as exc:
            raise NotEncodable(f"a {type(value).__qualname__} that cannot be pickled ({exc})") from exc
        return describe_estimator(value) if self.kind == "model" else {}

    def decode(self, source: memoryview, metadata: dict[str, Any], hint: Any) -> Any:
        try:
            return pickle.loads(source)
        except (ImportError, AttributeError) as exc:
            raise ArtifactError(f"the object needs code that is not installed here: {exc}") from exc
        except (pickle.UnpicklingError, EOFError, TypeError, ValueError) as exc:
            raise ArtifactError(f"the object cannot be unpickled: {exc}") from exc
