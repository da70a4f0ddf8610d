"""From functions to an image: what changes rarely is below what changes often.

    base            Python, mlfuncs and its own dependencies          with a release of mlfuncs
    wheels          the locked distributions, installed and compiled   with the lock
    artifacts       the values bound to a class's constructor          with a new model
    function        bundles, signatures, configs, bill of materials    with the code

The last layer is a few kilobytes, so a change of the code makes, sends and stores only those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlfuncs.bundles import store as bundle_store
from mlfuncs.bundles.bundle import OpenBundle, open_bundle
from mlfuncs.errors import SpecError
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.settings import Settings
from mlfuncs.signing import project_key
from mlfuncs_runtime.images.base import BaseWish
from mlfuncs_runtime.images.image import BaseImage, Image
from mlfuncs_runtime.images.layers import Entry, Layer, write_layer
from mlfuncs_runtime.images.sbom import cyclonedx, to_bytes
from mlfuncs_runtime.images.wheels import SITE_PACKAGES, wheels_layer
from mlfuncs_runtime.worker.config import WorkerConfig

ROOT = "/opt/function"
BILL = f"{ROOT}/sbom"
_MOST_DRAIN_S = 3600.0


@dataclass(frozen=True)
class ImageFunction:
    """One function of an image: its name there, its bundle, and the revision's config."""

    name: str
    bundle: str
    config: RevisionConfig
    options: Mapping[str, Any] = field(default_factory=dict)  # queue_size, body_bytes of the endpoint


def assemble(functions: Sequence[ImageFunction], base: BaseImage, settings: Settings) -> Image:
    """The image of these functions, its layers written below `home/images`.

    Raises SpecError when they cannot share one (Python versions or pins that differ), what opening a bundle raises,
    and EnvironmentFailed when a pin cannot be had.
    """
    names = [function.name for function in functions]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"two functions of one image are called {min(twice)!r}: give one another name")
    bundles = {function.name: open_bundle(function.bundle, settings) for function in functions}
    lock, python = shared_lock(bundles)
    folder = settings.home / "images" / "layers"
    layers = [wheels_layer(lock, python, settings), _artifacts_layer(functions, settings, folder)]
    layers.append(write_layer(_function_entries(functions, bundles, settings), folder, note=", ".join(sorted(bundles))))
    return Image(
        base,
        tuple(layer for layer in layers if layer is not None),
        _environ(functions, settings),
        _labels(bundles, base),
    )


def wished_base(functions: Sequence[ImageFunction], settings: Settings) -> BaseWish:
    """The base for these functions. Raises SpecError when they do not agree, and what opening a bundle raises."""
    return BaseWish.of((f.config.spec, open_bundle(f.bundle, settings).manifest.lock) for f in functions)


def shared_lock(bundles: Mapping[str, OpenBundle]) -> tuple[tuple[str, ...], str]:
    """The pins of all functions together and their Python. Raises SpecError naming what two of them disagree on."""
    pins: dict[str, tuple[str, str]] = {}
    pythons: dict[str, str] = {}
    for name, bundle in bundles.items():
        pythons.setdefault(bundle.manifest.python, name)
        for line in pins_inside(bundle):
            package = line.partition("==")[0].partition(" ")[0].lower()
            known = pins.setdefault(package, (line, name))
            if known[0] != line:
                raise SpecError(
                    f"{known[1]!r} needs {known[0]} and {name!r} needs {line}: give them the same requirements, or "
                    "build an image for each"
                )
    if len(pythons) > 1:
        raise SpecError(f"one image has one Python, and these functions were built with {', '.join(sorted(pythons))}")
    return tuple(sorted(line for line, _ in pins.values())), next(iter(pythons))


def pins_inside(bundle: OpenBundle) -> tuple[str, ...]:
    """The bundle's pins without uv's 60 MB, when the function did not ask for it: a container builds no environment."""
    asked = any(re.match(r"uv\b(?!-)", line) for line in bundle.manifest.requirements)
    return tuple(line for line in bundle.manifest.lock if asked or not line.startswith("uv=="))


def worker_config(function: ImageFunction, project: str, revision: str = "") -> WorkerConfig:
    """What a worker of the function is told when it serves from its image."""
    spec = function.config.spec
    return WorkerConfig(
        endpoint=function.name,
        project=project,
        revision=revision or function.bundle[:12],
        bundle=function.bundle,
        init_args={name: dict(ref) for name, ref in function.config.init_args.items()},
        env=dict(spec.env),
        secrets=spec.secrets,
        features=spec.features,
        feature_sample_rate=spec.feature_sample_rate,
        timeout_s=spec.timeout_s,
        drain_s=min(spec.timeout_s, _MOST_DRAIN_S),
        batch=spec.batch,
        concurrency=spec.scale.concurrency,
        resources=spec.resources,
        **{key: function.options[key] for key in ("queue_size", "body_bytes") if key in function.options},
    )


def _artifacts_layer(functions: Sequence[ImageFunction], settings: Settings, folder: Path) -> Layer | None:
    """The constructor's values; none when they are at an artifact URL that containers reach themselves."""
    from mlfuncs.artifacts import ArtifactRef, ArtifactStore
    from mlfuncs.objects import key_of

    refs = {ref["digest"]: ref for function in functions for ref in function.config.init_args.values()}
    if not refs or is_shared(settings):
        return None
    store = ArtifactStore.open(settings)
    entries = [
        Entry(f"{ROOT}/artifacts/{key_of(digest)}", store.local_path(ArtifactRef.from_dict(dict(ref))))
        for digest, ref in refs.items()
    ]
    return write_layer(entries, folder, note=f"{len(entries)} artifacts")


def is_shared(settings: Settings) -> bool:
    """Whether artifacts are at a URL that other machines reach, and not in a folder here."""
    return "://" in settings.artifacts_url and not settings.artifacts_url.startswith(("file://", "memory://"))


def _function_entries(
    functions: Sequence[ImageFunction], bundles: Mapping[str, OpenBundle], settings: Settings
) -> Iterator[Entry]:
    for function in functions:
        bundle = bundles[function.name]
        config = json.dumps(worker_config(function, settings.project).to_dict(), sort_keys=True, indent=1)
        yield Entry(f"{ROOT}/functions/{function.name}.json", config.encode() + b"\n")
        bill = cyclonedx(function.name, bundle.digest, pins_inside(bundle))
        yield Entry(f"{BILL}/{function.name}.cdx.json", to_bytes(bill))
    for digest, path in {bundle.digest: bundle.path for bundle in bundles.values()}.items():
        for name in (bundle_store.ARCHIVE, bundle_store.SIGNATURE):
            yield Entry(f"{ROOT}/bundles/{digest}/{path.parent.name}/{name}", path.with_name(name))


def _environ(functions: Sequence[ImageFunction], settings: Settings) -> dict[str, str]:
    """What every container of the image sees; no address, token or path of this machine."""
    trusted = {project_key(settings).public, *filter(None, map(str.strip, settings.trusted_keys.split(",")))}
    environ = {
        "PYTHONPATH": SITE_PACKAGES,
        "MLFUNCS_PROJECT": settings.project,
        "MLFUNCS_TRUSTED_KEYS": ",".join(sorted(trusted)),
    }
    if any(function.config.init_args for function in functions):
        environ["MLFUNCS_ARTIFACTS_URL"] = settings.artifacts_url if is_shared(settings) else f"{ROOT}/artifacts"
    if any(function.config.spec.resources.gpu for function in functions):
        environ |= {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    return environ


def _labels(bundles: Mapping[str, OpenBundle], base: BaseImage) -> dict[str, str]:
    names = sorted(bundles)
    commits = sorted({bundles[name].manifest.git_commit for name in names} - {""})
    return {
        "org.opencontainers.image.title": " ".join(names),
        "org.opencontainers.image.description": f"mlfuncs functions: {', '.join(names)}",
        "org.opencontainers.image.version": "-".join(bundles[name].digest[:12] for name in names),
        "org.opencontainers.image.base.name": base.name,
        "org.opencontainers.image.base.digest": base.id,
        "dev.mlfuncs.functions": ",".join(names),
        "dev.mlfuncs.bundles": ",".join(bundles[name].digest for name in names),
        **({"org.opencontainers.image.revision": commits[0]} if len(commits) == 1 else {}),
    }
