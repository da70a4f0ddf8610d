"""The `%nuclio` commands of a nuclio-jupyter notebook, as Nuclio's own configuration."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import NotFound, SpecError

if TYPE_CHECKING:
    from mlfuncs.nuclio_source import NuclioSource

_CONFIG = re.compile(r"(\w+(?:\.\w+)*)\s*(\+?=)\s*(.+)")
_UNUSED = ("build", "deploy", "help", "show", "verbose")  # commands of a session, not of a function
_VOLUMES = {
    "pvc": ("persistentVolumeClaim", "claimName"),
    "secret": ("secret", "secretName"),
    "configMap": ("configMap", "name"),
}


def configure(found: NuclioSource, command: str, lines: list[str], path: Path) -> None:
    """Take one command's lines over into the configuration. Raises SpecError for what cannot be, NotFound."""
    lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if command in _UNUSED:
        return
    if command == "handler":
        raise SpecError(
            f"{path.name}: '%%nuclio handler' makes a function of a cell; write def handler(context, event)"
        )
    if command in ("cmd", "env") and lines:
        if lines[0].startswith(("-l", "--local-only")):
            return
        lines[0] = re.sub(r"^(-c|--config-only)\s*", "", lines[0])
    lines = [os.path.expandvars(line) for line in lines if line]
    spec = found.config["spec"]
    if command == "cmd":
        spec.setdefault("build", {}).setdefault("commands", []).extend(lines)
    elif command == "env":
        spec.setdefault("env", []).extend(_pair(line, path) for line in lines)
    elif command == "env_file":
        for name in lines:
            text = _read_text(path, name).splitlines()
            spec.setdefault("env", []).extend(_pair(line, path) for line in text if line.strip() and line[0] != "#")
    elif command == "config":
        for line in lines:
            _set(found.config, line, path)
    elif command == "mount":
        spec.setdefault("volumes", []).extend(_mount(line, path) for line in lines)
    elif command == "add":
        for line in lines:
            _check_added(line, path)
    else:
        raise SpecError(f"{path.name}: '%nuclio {command}' is not known: env, cmd, config, env_file, mount and add are")


def _read_text(path: Path, name: str) -> str:
    try:
        return (path.parent / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path.name}: the file {name!r} of '%nuclio env_file' cannot be read: {exc}") from exc


def _mount(line: str, path: Path) -> dict[str, Any]:
    """The volume of `%nuclio mount [-t TYPE] [-n NAME] [-r READONLY] PATH SOURCE`, as spec.volumes has it."""
    options, words = {"-t": "v3io", "-n": "fs", "-r": ""}, []
    long = {"--type": "-t", "--name": "-n", "--readonly": "-r", "--key": "-k", "-k": "-k"}
    items = iter(shlex.split(line))
    for word in items:
        name, _, value = word.partition("=")
        if name in long or name in options:
            options[long.get(name, name)] = value or next(items, "")
        else:
            words.append(word)
    if len(words) != 2:
        raise SpecError(f"{path.name}: '%nuclio mount {line}' takes a path in the function and what is mounted there")
    if options["-t"] not in _VOLUMES:
        raise SpecError(
            f"{path.name}: '%nuclio mount {line}' is of the type {options['-t']!r}, which is Iguazio's own: pvc, "
            "secret and configMap can be taken over, e.g. '%nuclio mount -t pvc /data claim'"
        )
    kind, key = _VOLUMES[options["-t"]]
    mount = {"name": options["-n"], "mountPath": words[0], **({"readOnly": True} if options["-r"] else {})}
    return {"volume": {"name": options["-n"], kind: {key: words[1]}}, "volumeMount": mount}


def _check_added(line: str, path: Path) -> None:
    """`%nuclio add -f FILE` needs nothing for a module beside the notebook, which goes with the code that imports it.

    Raises SpecError for any other file, which a function cannot carry.
    """
    for word in shlex.split(line):
        name = re.sub(r"^(-f|--file)=?", "", word)
        if not name or name in ("-n", "--add-notebook"):
            continue
        if not (path.parent / name).is_file():
            raise NotFound(
                "file", name, [near.name for near in path.parent.glob("*.py")], hint=f"of '%nuclio add {line}'"
            )
        if not name.endswith(".py"):
            raise SpecError(
                f"{path.name}: '%nuclio add {line}' adds {name!r}, and only modules travel with a function: store it "
                "as an artifact and load it in init_context, or put it into an image and set MLFUNCS_BASE_IMAGE"
            )


def _pair(line: str, path: Path) -> dict[str, str]:
    name, sign, value = line.partition("=")
    if not sign:
        raise SpecError(f"{path.name}: '%nuclio env {line}' is not of the form NAME=value")
    return {"name": name.strip(), "value": value.strip().strip("\"'")}


def _set(config: dict[str, Any], line: str, path: Path) -> None:
    match = _CONFIG.match(line)
    if not match:
        raise SpecError(f"{path.name}: '%nuclio config {line}' is not of the form spec.key = JSON")
    try:
        value = json.loads(match[3])
    except ValueError as exc:
        raise SpecError(f"{path.name}: '%nuclio config {line}': the value is not JSON ({exc})") from exc
    *folders, last = match[1].split(".")
    place = config
    for part in folders:
        place = place.setdefault(part, {})
    if match[2] == "+=":
        place[last] = [*place.get(last, []), *(value if isinstance(value, list) else [value])]
    else:
        place[last] = value
