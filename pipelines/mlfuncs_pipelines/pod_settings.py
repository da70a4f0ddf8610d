"""What kfp-kubernetes asks of a step's pod, as far as this machine can give it: secrets and config maps, volumes.

A secret's or config map's key comes from the environment variable that the step is to see, else from one named like the
key, else from the file `<secret>/<key>` in the folder of secrets. A volume is the folder at its mount path, when there
is one. Tolerations, node selectors, labels and the like mean nothing here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.secrets import available_secrets
from mlfuncs.settings import Settings

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYS = {"secretAsEnv": ("secret", "secretKey"), "configMapAsEnv": ("config map", "configMapKey")}
_VOLUMES = {
    "secretAsVolume": "a secret",
    "configMapAsVolume": "a config map",
    "pvcMount": "a persistent volume",
    "emptyDirMounts": "an empty directory",
    "genericEphemeralVolume": "an ephemeral volume",
}


@dataclass(frozen=True)
class PodSettings:
    """The values of environment variables, folders that a container mounts, and what is missing here."""

    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    mounts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def pod_settings(config: Mapping[str, Any], settings: Settings) -> PodSettings:
    """What the executor's part of the platform document comes to on this machine."""
    env: dict[str, str] = {}
    missing: list[str] = []
    for kind, (what, key_name) in _KEYS.items():
        for source in config.get(kind, []):
            for pair in source.get("keyToEnv", []):
                name, key = pair.get("envVar", ""), pair.get(key_name, "")
                value = _value(name, key, _constant_name(source), settings)
                if value is not None:
                    env[name] = value
                elif not source.get("optional"):
                    missing.append(_no_value(what, name, key, source, settings))
    mounts, absent = _volumes(config)
    return PodSettings(env, tuple(mounts), (*missing, *absent))


def _value(name: str, key: str, folder: str, settings: Settings) -> str | None:
    known = [candidate for candidate in dict.fromkeys((name, key)) if _NAME.fullmatch(candidate)]
    found = available_secrets(known, settings)
    for candidate in known:
        if candidate in found:
            return found[candidate]
    path = Path(settings.secrets_dir or os.devnull) / Path(folder).name / Path(key).name
    return path.read_text(encoding="utf-8").rstrip("\n") if settings.secrets_dir and path.is_file() else None


def _constant_name(source: Mapping[str, Any]) -> str:
    """The name of the secret or config map; "" when a parameter gives it."""
    for kind in ("secretName", "configMapName", "configName"):
        constant = source.get(f"{kind}Parameter", {}).get("runtimeValue", {}).get("constant", "")
        if source.get(kind) or constant:
            return str(source.get(kind) or constant)
    return ""


def _no_value(what: str, name: str, key: str, source: Mapping[str, Any], settings: Settings) -> str:
    owner = f" of the {what} {_constant_name(source)!r}" if _constant_name(source) else f" of a {what}"
    folder = settings.secrets_dir or "MLFUNCS_SECRETS_DIR"
    return (
        f"the step sees the key {key!r}{owner} as the environment variable {name}, which has no value here: "
        f"set {name}, or put the value into a file in {folder}"
    )


def _volumes(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    mounts, absent = [], []
    for kind, what in _VOLUMES.items():
        for volume in config.get(kind, []):
            path = volume.get("mountPath", "")
            if os.path.isdir(path):
                mounts.append(path)
            elif not volume.get("optional"):
                absent.append(f"the step mounts {what} at {path}, and there is no such folder here: make it")
    return mounts, absent
