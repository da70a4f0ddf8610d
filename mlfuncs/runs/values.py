"""Values on their way into and out of runs: small plain ones as they are, all others as stored artifacts."""

from __future__ import annotations

import datetime
import enum
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlfuncs.display import card_html, format_bytes

if TYPE_CHECKING:
    from mlfuncs.artifacts import ArtifactRef, ArtifactStore
    from mlfuncs.settings import Settings

PLAIN_CHARACTERS = 16_384  # guess: longer JSON is stored as an artifact instead of a registry row
_MAX_BITS = 13_000  # under the 4300 digits that Python turns into text (sys.int_info.default_max_str_digits)
_LEAVES = (type(None), bool, int, float, str)
_PICTURES = ("html", "markdown", "figure", "metrics", "classification_metrics")


class Artifact:
    """A stored value of a run: known by its digest, loaded when asked, and good as an argument of another run."""

    def __init__(self, ref: ArtifactRef, settings: Settings, hint: Any = None) -> None:
        self.ref = ref
        self._settings, self._hint = settings, hint

    @property
    def digest(self) -> str:
        """SHA-256 of the stored bytes."""
        return self.ref.digest

    @property
    def kind(self) -> str:
        """How it is stored: "parquet", "npy", "model", "figure", "json", ..."""
        return self.ref.kind

    def load(self) -> Any:
        """The value, read back and checked against its digest; read once, then kept."""
        return self._value

    @functools.cached_property
    def _value(self) -> Any:
        return open_store(self._settings).get(self.ref, hint=self._hint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Artifact) and other.ref == self.ref

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<artifact {self.kind} {self.ref.type_name} {format_bytes(self.ref.size_bytes)} {self.digest[:12]}>"

    def _repr_html_(self) -> str:
        facts = {"type": self.ref.type_name, "size": format_bytes(self.ref.size_bytes), "digest": self.digest[:12]}
        facts |= {key: self.ref.metadata.get(key) for key in ("rows", "columns", "shape", "dtype", "preview")}
        if self.kind in _PICTURES:
            shown = self.load()
            for form in ("_repr_html_", "_repr_svg_"):
                if hasattr(shown, form):
                    return str(getattr(shown, form)())
        return card_html(f"{self.kind} artifact", "", facts)


class StepArtifact:
    """An artifact of a pipeline step, which lies where the pipeline put it: loaded when asked, like an `Artifact`."""

    def __init__(self, document: Mapping[str, Any] | list[Mapping[str, Any]], settings: Settings, hint: Any) -> None:
        self._documents = document if isinstance(document, list) else [document]
        self._is_list = isinstance(document, list)
        self._settings, self._hint = settings, hint

    @property
    def uri(self) -> str:
        """Where it lies; of several, where the first does."""
        return str(self._documents[0]["uri"]) if self._documents else ""

    @property
    def kind(self) -> str:
        """How it is stored ("parquet", "model", ...); for one that another component wrote, its system.* type."""
        if self._is_list or not self._documents:
            return "list"
        ours = self._documents[0].get("metadata", {}).get("mlfuncs", {})
        return str(ours.get("kind") or self._documents[0]["type"]["schemaTitle"])

    @property
    def metadata(self) -> dict[str, Any]:
        """What the step said of it."""
        return {} if self._is_list else dict(self._documents[0].get("metadata", {}))

    def load(self) -> Any:
        """The value; the path for a file that another component wrote. Raises ArtifactError or UntrustedError."""
        return self._value

    def stored(self) -> Artifact:
        """The value in the artifact store, so that it outlives the pipeline's folder and is an argument of runs."""
        return Artifact(open_store(self._settings).put(self.load()), self._settings, self._hint)

    @functools.cached_property
    def _value(self) -> Any:
        from mlfuncs import adapters

        read = adapters.load("pipelines:artifact")
        values = [read(document, self._hint, self._settings) for document in self._documents]
        return values if self._is_list else values[0]

    def __repr__(self) -> str:
        return f"<artifact {self.kind} {self.uri}>"

    def _repr_html_(self) -> str:
        if self.kind in _PICTURES:
            for form in ("_repr_html_", "_repr_svg_"):
                if hasattr(self.load(), form):
                    return str(getattr(self.load(), form)())
        return card_html(f"{self.kind} artifact", "", {"uri": self.uri})


def open_store(settings: Settings) -> ArtifactStore:
    """The artifact store of `settings`, opened once per process."""
    return _open_store(settings)


@functools.lru_cache(maxsize=8)
def _open_store(settings: Settings) -> ArtifactStore:
    from mlfuncs.artifacts import ArtifactStore

    return ArtifactStore.open(settings)


def encode(value: Any, hint: Any, settings: Settings) -> dict[str, Any]:
    """`value` as a JSON-ready document: {"value": ...} for a small plain one, else {"artifact": ref}."""
    if isinstance(value, StepArtifact):
        value = value.stored()
    if isinstance(value, Artifact):
        return {"artifact": value.ref.to_dict()}
    if is_plain(value):
        return {"value": value}
    return {"artifact": open_store(settings).put(value, hint=hint).to_dict()}


def encode_for_child(value: Any, hint: Any, settings: Settings) -> dict[str, Any]:
    """Like `encode`, for a process of the same user that knows only the classes in `hint`.

    An object of a class of the user's own, given where the hint does not say so, takes its class along.
    """
    document = encode(value, None, settings)
    classes = document.get("artifact", {}).get("metadata", {}).get("classes")
    if classes and not isinstance(value, Artifact):
        from mlfuncs.codecs.untagged import known_classes

        if set(classes) - set(known_classes(hint)):
            return {"artifact": open_store(settings).put(value, kind="pickle").to_dict()}
    return document


def decode(document: Mapping[str, Any], hint: Any, settings: Settings) -> Any:
    """The value that `encode` wrote."""
    handle = as_handle(document, settings, hint)
    return handle.load() if isinstance(handle, Artifact | StepArtifact) else handle


def as_handle(document: Mapping[str, Any], settings: Settings, hint: Any = None) -> Any:
    """The plain value in the document, or an Artifact (of a pipeline's step, a StepArtifact) that loads it later."""
    if "step" in document:
        return StepArtifact(document["step"], settings, hint)
    if "artifact" not in document:
        return document.get("value")
    from mlfuncs.artifacts import ArtifactRef

    return Artifact(ArtifactRef.from_dict(document["artifact"]), settings, hint)


def is_plain(value: Any) -> bool:
    """Whether the value is small and comes back equal from JSON: None, bool, int, float, text, lists and dicts of them.

    >>> is_plain({"a": [1, 2.5, None]}), is_plain((1, 2)), is_plain({1: "a"})
    (True, False, False)
    """
    if type(value) in _LEAVES:
        return _is_short(value) and (not isinstance(value, str) or len(value) <= PLAIN_CHARACTERS)
    return _is_plain_tree(value, [1000]) and len(json.dumps(value)) <= PLAIN_CHARACTERS


def _is_plain_tree(value: Any, budget: list[int]) -> bool:
    budget[0] -= 1
    if budget[0] < 0:
        return False
    if type(value) is list:
        return all(_is_plain_tree(item, budget) for item in value)
    if type(value) is dict:
        return all(type(key) is str and _is_plain_tree(item, budget) for key, item in value.items())
    return type(value) in _LEAVES and _is_short(value)


def _is_short(leaf: Any) -> bool:
    """Whether a number has digits that Python writes out: it refuses to make text of longer ones."""
    return not isinstance(leaf, int) or leaf.bit_length() <= _MAX_BITS


def describe(value: Any, secrets: Mapping[str, str]) -> Any:
    """`value` as a parameter is shown: plain values as they are, others as short text; secrets masked."""
    return masked(value if is_plain(value) else _summary(value), secrets)


def masked(value: Any, secrets: Mapping[str, str]) -> Any:
    """A JSON value with the values of `secrets` masked wherever they are in its text."""
    if not secrets:
        return value
    from mlfuncs.secrets import Redactor

    return _redact_tree(value, Redactor(secrets.values()))


def masked_document(document: dict[str, Any], secrets: Mapping[str, str]) -> dict[str, Any]:
    """What `encode` gave, with secrets masked in a plain value and in the description of a stored one."""
    if not secrets or "artifact" not in document:
        return masked(document, secrets)
    ref = document["artifact"]
    return {**document, "artifact": {**ref, "metadata": masked(ref["metadata"], secrets)}}


def _summary(value: Any) -> Any:
    if isinstance(value, Artifact):
        return f"artifact:{value.digest[:12]}"
    if isinstance(value, enum.Enum):
        return value.value if is_plain(value.value) else str(value)
    if isinstance(value, datetime.date | datetime.time | pathlib.PurePath):
        return str(value)
    item = getattr(value, "item", None)
    if getattr(value, "shape", None) == () and callable(item):  # a numpy or torch scalar
        return item() if is_plain(item()) else str(value)
    name = type(value).__name__
    if isinstance(value, int) and not _is_short(value):
        return f"<{name} of {value.bit_length()} bits>"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"<{name} {' x '.join(map(str, shape))}>"
    if hasattr(value, "__len__") and isinstance(value, str | bytes | list | tuple | set | frozenset | dict):
        return f"<{name} of {len(value)}>" if len(repr(value)) > 200 else repr(value)
    text = repr(value)
    return text if len(text) <= 200 else f"<{name}>"


def _redact_tree(value: Any, redactor: Any) -> Any:
    if isinstance(value, str):
        return redactor.text(value)
    if isinstance(value, list):
        return [_redact_tree(item, redactor) for item in value]
    if isinstance(value, dict):
        return {redactor.text(key): _redact_tree(item, redactor) for key, item in value.items()}
    return value
