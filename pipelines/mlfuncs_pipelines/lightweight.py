"""Steps that are Python functions, recognised in an IR file by the command: kfp's lightweight components, and ours."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EXECUTOR = re.compile(r"python3? -m (kfp\.(?:dsl|components)\.executor_main)")
_PYTHON_IMAGE = re.compile(r"(?:^|/)python:(\d+\.\d+)")
STEP_MODULE = "mlfuncs_pipelines.step"  # run as `python -m`
_WITH_VALUE = {"--index-url", "--extra-index-url", "--trusted-host", "--find-links", "-i", "-f"}


@dataclass(frozen=True)
class Lightweight:
    """A Python function that travels as source text in the command of its container."""

    source: str
    function: str
    packages: tuple[str, ...]  # PEP 508 requirements, kfp itself left out
    index_options: tuple[str, ...]  # "--index-url", "https://..", in their order
    kfp_requirement: str  # "kfp==2.17.0"; "" when the component installs no kfp
    image: str
    python: str  # "3.11" when the image is an official Python one, else ""


def recognise(executor: Mapping[str, Any]) -> Lightweight | None:
    """The lightweight component that an executor runs, or None when it is a container of another kind."""
    container = executor.get("container")
    if not container:
        return None
    command, arguments = list(container.get("command", [])), list(container.get("args", []))
    scripts = [at for at, part in enumerate(command[:-1]) if _EXECUTOR.search(part) and "ephemeral_component" in part]
    if not scripts:
        return None
    index = scripts[0]
    function = _option([*command[index + 2 :], *arguments], "--function_to_execute")
    if not function:
        return None
    packages, options = _pip_arguments(" ".join(command[:index]))
    image = container.get("image", "")
    python = _PYTHON_IMAGE.search(image)
    return Lightweight(
        source=command[index + 1],
        function=function,
        packages=tuple(package for package in packages if not _is_kfp(package)),
        index_options=tuple(options),
        kfp_requirement=next((package for package in packages if _is_kfp(package)), ""),
        image=image,
        python=python[1] if python else "",
    )


@dataclass(frozen=True)
class OurStep:
    """A decorated function: the digest of its bundle, and the bundle itself when it travels in the command."""

    bundle: str
    inline: str
    json_inputs: tuple[str, ...]
    point: bool = False  # whether it runs one point of a sweep


def recognise_step(container: Mapping[str, Any]) -> OurStep | None:
    """The decorated function that a container runs, or None."""
    words = [*container.get("command", []), *container.get("args", [])]
    if STEP_MODULE not in words or "--bundle" not in words:
        return None
    names = _option(words, "--json")
    json_inputs = tuple(names.split(",")) if names else ()
    return OurStep(_option(words, "--bundle"), _option(words, "--inline"), json_inputs, "--point" in words)


def _option(arguments: list[str], name: str) -> str:
    for position, argument in enumerate(arguments[:-1]):
        if argument == name:
            return arguments[position + 1]
    return ""


def _is_kfp(package: str) -> bool:
    return bool(re.match(r"kfp(?![-_A-Za-z0-9.])", package))


def _pip_arguments(script: str) -> tuple[list[str], list[str]]:
    """The requirements and the index options of every `pip install` in a shell script."""
    packages: list[str] = []
    options: list[str] = []
    for words in _commands(script):
        installs = [at for at in range(len(words) - 1) if words[at].startswith("pip") and words[at + 1] == "install"]
        own = _read_words(words[installs[0] + 2 :], options) if installs else []
        kfp = [word for word in own if _is_kfp(word)]
        packages.extend(kfp or own)  # what stands beside kfp belongs to kfp's own installation
    return packages, options


def _read_words(words: list[str], options: list[str]) -> list[str]:
    packages = []
    iterator = iter(words)
    for word in iterator:
        if word in _WITH_VALUE:
            pair = [word, next(iterator, "")]
            if pair not in [options[at : at + 2] for at in range(0, len(options), 2)]:
                options.extend(pair)
        elif not word.startswith("-"):
            packages.append(word)
    return packages


def _commands(script: str) -> list[list[str]]:
    """The simple commands of a shell script, each as its words."""
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";&|()\n")
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    try:
        for word in lexer:
            if set(word) <= set(";&|()\n"):
                commands.append([])
            else:
                commands[-1].append(word)
    except ValueError:  # an unclosed quote: what was read so far is all there is
        pass
    return commands
