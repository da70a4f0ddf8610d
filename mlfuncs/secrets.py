"""Secrets: named in a spec, valued where the code runs, and kept out of everything that is written down.

A value comes from the environment, else from a file of that name in `secrets_dir`: a plain directory or a Kubernetes
secret mounted as one. `Redactor` replaces values, and the forms they take in logs (base64, URL, JSON, escapes, single
lines of a key), in text and in streams. Values shorter than four characters are not looked for.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from mlfuncs.errors import SecretMissing, SpecError
from mlfuncs.settings import Settings, read_settings

MASK = "***"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHORTEST = 4  # characters; a guess: shorter values would mask ordinary text
_SHORTEST_BASE64 = 6  # characters of a value inside longer base64
_SHORTEST_LINE = 12  # of a multi-line value, so that "-----" or "{" is not masked


def secret(name: str) -> str:
    """The value of a secret, where the code runs. Raises SecretMissing, which says where it was looked for."""
    return resolve_secrets([name], read_settings())[name]


def resolve_secrets(names: Iterable[str], settings: Settings) -> dict[str, str]:
    """The values of `names`: from the environment, else from files in `settings.secrets_dir`. Raises SecretMissing."""
    wanted = list(names)
    found = available_secrets(wanted, settings)
    for name in wanted:
        if name not in found:
            place = f"a file {name!r} in {settings.secrets_dir}" if settings.secrets_dir else "MLFUNCS_SECRETS_DIR"
            raise SecretMissing(
                f"secret {name!r} has no value here: set the environment variable {name}, or provide {place}"
            )
    return found


def available_secrets(names: Iterable[str], settings: Settings) -> dict[str, str]:
    """The values of those `names` that have one here."""
    found = {}
    for name in names:
        if not _NAME.fullmatch(name):
            raise SpecError(f"secret name {name!r} must look like DB_PASSWORD")
        value = os.environ.get(name)
        if value is None and settings.secrets_dir:
            value = _read_file(Path(settings.secrets_dir) / name)
        if value:
            found[name] = value
    return found


def _read_file(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise SecretMissing(f"the secret file {path} cannot be read: {exc}") from exc
    return text.removesuffix("\n").removesuffix("\r")


def redact(text: str, secrets: Mapping[str, str] | Iterable[str]) -> str:
    """`text` with every secret value replaced by `***`.

    >>> redact("user:hunter2 b64=dXNlcjpodW50ZXIy", ["hunter2"])
    'user:*** b64=dXNlcjp***'
    """
    return Redactor(secrets.values() if isinstance(secrets, Mapping) else secrets).text(text)


@functools.lru_cache(maxsize=256)
def encodings_of(value: str) -> tuple[str, ...]:
    """The forms in which a value may appear in text, longest first: as it is, base64, URL, JSON, repr, its lines."""
    if len(value) < _SHORTEST:
        return ()
    raw = value.encode()
    forms = {
        value,
        value.strip(),
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
    }
    forms |= {urllib.parse.quote(value, safe=""), urllib.parse.quote(value), urllib.parse.quote_plus(value)}
    forms |= {raw.hex(), *_base64_forms(raw)}
    if "\n" in value:
        forms |= {line.strip() for line in value.splitlines() if len(line.strip()) >= _SHORTEST_LINE}
    return tuple(sorted((form for form in forms if len(form) >= _SHORTEST), key=lambda form: (-len(form), form)))


def _base64_forms(raw: bytes) -> set[str]:
    """The base64 of `raw` alone, and inside longer data at each of three offsets: the characters it alone decides."""
    forms = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    for before in range(3):
        first, last = -(-before * 8 // 6), (before + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            forms.add(encode(b"\0" * before + raw).decode()[first:last])
    return {form for form in forms if len(form) >= _SHORTEST_BASE64}


class Redactor:
    """Replaces secret values in text, and in text that arrives in pieces."""

    def __init__(self, values: Iterable[str], mask: str = MASK) -> None:
        forms = {form for value in values for form in encodings_of(value)}
        self._forms = sorted(forms, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(re.escape, self._forms))) if self._forms else None
        self._starts = frozenset(form[0] for form in self._forms)
        self._longest = max(map(len, self._forms), default=0)
        self._mask = mask

    def text(self, text: str) -> str:
        """`text` with every value replaced."""
        return self._pattern.sub(lambda _: self._mask, text) if self._pattern else text

    def split(self, text: str) -> tuple[str, str]:
        """`text` as (what is safe to write now, redacted; the rest that may be the beginning of a value)."""
        if self._pattern is None:
            return text, ""
        inside = {at for match in self._pattern.finditer(text) for at in range(match.start() + 1, match.end())}
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._starts and start not in inside and self._may_begin(text[start:]):
                return self.text(text[:start]), text[start:]
        return self.text(text), ""

    def _may_begin(self, end: str) -> bool:
        return any(len(end) < len(form) and form.startswith(end) for form in self._forms)

    def wrap(self, stream: TextIO) -> RedactedStream:
        """A text stream that writes to `stream` with values replaced."""
        return RedactedStream(stream, self)


class RedactedStream:
    """A text stream in front of another: secret values are replaced, also when split across writes.

    The end of a write that may be the beginning of a value waits for the next write; `close` writes it out.
    """

    def __init__(self, stream: TextIO, redactor: Redactor) -> None:
        self._stream, self._redactor, self._held = stream, redactor, ""

    def write(self, text: str) -> int:
        """Write `text` redacted; returns its length."""
        safe, self._held = self._redactor.split(self._held + text)
        if safe:
            self._stream.write(safe)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what is safe; the possible beginning of a value stays."""
        self._stream.flush()

    def close(self) -> None:
        """Write what was held back (no whole value is in it) and flush. The stream behind stays open."""
        if self._held:
            self._stream.write(self._redactor.text(self._held))
            self._held = ""
        self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
