"""What is said to and by the processes in which steps run: what to load, what to do, how it ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preload:
    """What a zygote imports before its first fork. `step` names a bundle of ours (see `step.load`)."""

    python: str
    modules: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    step: str = ""  # JSON object; text, so that the whole is hashable
    env: tuple[tuple[str, str], ...] = ()


@dataclass
class Exit:
    """How a step's process ended; `error` is set when the step's code could not be loaded.

    `output` is the executor output of a step of ours, unless that is long and in its file; `digests` has the SHA-256
    of large files that it wrote.
    """

    step_id: str
    code: int
    signal: int = 0
    max_rss_kib: int = 0
    cpu_s: float = 0.0
    error: str = ""
    output: Mapping[str, Any] | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a step's process is to do, as JSON, or the file that says so.

    `environ` is this process's environment at the start of the run; `secret_env` is written down nowhere.
    """

    text: str | None
    path: Path | None = None
    secret_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)

    def message(self, environment: Environment, operation: str = "") -> bytes:
        """What the step's process is sent, which knows `environment`."""
        environ = json.dumps({**environment.changes(self.environ), **self.secret_env})
        place = f'"request": {self.text}' if self.path is None else f'"path": {json.dumps(str(self.path))}'
        return f'{{"op": "{operation}", "environ": {environ}, {place}}}'.encode()


class Environment:
    """This process's variables at the moment when a zygote began, of which it was given `own` values of some."""

    def __init__(self, own: Iterable[str] = (), since: Mapping[str, str] | None = None) -> None:
        self.began = dict(os.environ) if since is None else since
        self._own = frozenset(own)
        self._seen: Mapping[str, str] = {}
        self._changes: dict[str, str | None] = {}

    def changes(self, now: Mapping[str, str]) -> dict[str, str | None]:
        """What became of the variables until `now`; None for one that is gone."""
        if now is not self._seen:  # a run asks with the same ones for every step
            changed = {name: value for name, value in now.items() if self.began.get(name) != value}
            gone = dict.fromkeys(self.began.keys() - now.keys())
            self._changes = {name: value for name, value in {**changed, **gone}.items() if name not in self._own}
            self._seen = now
        return self._changes


def exit_told(step_id: str, message: Mapping[str, Any]) -> Exit:
    """The end of a step as its own process tells it."""
    results = {name: message[name] for name in ("output", "digests") if name in message}
    return Exit(step_id, message["code"], 0, message["max_rss_kib"], message["cpu_s"], **results)
