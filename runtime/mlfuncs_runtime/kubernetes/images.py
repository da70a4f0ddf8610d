"""Images of revisions in a registry that a cluster pulls from: built and pushed when they are not known there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import SpecError
from mlfuncs.files import locked
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.settings import Settings, ensure_home

if TYPE_CHECKING:
    from mlfuncs.bundles.bundle import Bundle
    from mlfuncs.registry import EndpointRow
    from mlfuncs.spec import FunctionSpec
    from mlfuncs_runtime.images.base import BaseWish
    from mlfuncs_runtime.images.builder import ImageBuilder, Report
    from mlfuncs_runtime.images.image import BaseImage, Image

_NO_REGISTRY = "a cluster pulls images from a registry: set MLFUNCS_IMAGE_REGISTRY, e.g. registry.example/team"


def cluster_image(row: EndpointRow, revision: str, settings: Settings) -> str:
    """The name of a revision's image. Raises SpecError when no registry is set."""
    if not settings.image_registry:
        raise SpecError(_NO_REGISTRY)
    found = row.revision(revision)
    whole = json.dumps([found.digest, found.config, row.project], sort_keys=True).encode()
    tag = f"{revision}-{hashlib.sha256(whole).hexdigest()[:12]}"
    return f"{settings.image_registry.rstrip('/')}/{row.project}-{row.name}:{tag}"


def push_image(
    row: EndpointRow, revision: str, settings: Settings, builder: ImageBuilder | None, report: Report
) -> str:
    """Build and push the revision's image once; its name. Raises what building and pushing raise."""
    from mlfuncs_runtime.images.function_image import ImageFunction, assemble, wished_base

    found = row.revision(revision)
    limits: dict[str, Any] = (row.desired.get("options") or {}).get("limits") or {}
    function = ImageFunction(row.name, found.digest, RevisionConfig.from_dict(found.config), limits)

    def make(base: BaseImage) -> Image:
        return assemble([function], base, settings)

    wish = wished_base([function], settings)
    return _push_once(cluster_image(row, revision, settings), wish, make, settings, builder, report)


def push_run_image(
    bundle: Bundle, spec: FunctionSpec, settings: Settings, builder: ImageBuilder | None, report: Report
) -> str:
    """The image that runs of this environment start from, built and pushed once; the bundle comes with each run.

    Raises SpecError when no registry is set and the base image alone would not do.
    """
    manifest, gpu = bundle.manifest, bool(spec.resources.gpu)
    if settings.base_image and not (manifest.lock or gpu or spec.base_image):
        return settings.base_image
    if not settings.image_registry:
        raise SpecError(f"{_NO_REGISTRY}; or MLFUNCS_BASE_IMAGE, for functions without requirements")
    from mlfuncs import __version__
    from mlfuncs_runtime.images.base import BaseWish
    from mlfuncs_runtime.images.image import Image
    from mlfuncs_runtime.images.wheels import SITE_PACKAGES, wheels_layer

    def make(base: BaseImage) -> Image:
        layer = wheels_layer(manifest.lock, manifest.python, settings)
        environ = {"PYTHONPATH": SITE_PACKAGES}
        if gpu:
            environ |= {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
        return Image(base, () if layer is None else (layer,), environ)

    wish = BaseWish.of([(spec, manifest.lock)])
    whole = [list(manifest.lock), manifest.python, wish.name(settings), gpu, __version__]
    tag = hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:12]
    reference = f"{settings.image_registry.rstrip('/')}/{settings.project}-runs:{tag}"
    return _push_once(reference, wish, make, settings, builder, report)


def _push_once(
    reference: str,
    wish: BaseWish,
    make: Callable[[BaseImage], Image],
    settings: Settings,
    builder: ImageBuilder | None,
    report: Report,
) -> str:
    mark = ensure_home(settings) / "images" / "pushed" / hashlib.sha256(reference.encode()).hexdigest()
    if mark.exists():
        return reference
    builder = builder or _default_builder(settings)
    with locked(settings.home / "images" / ".build.lock"):
        if not builder.has(reference):
            report(f"building {reference}")
            builder.store(make(builder.base(report, wish)), [reference])
        report(f"pushing {reference}")
        builder.push(reference, report)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return reference


def _default_builder(settings: Settings) -> ImageBuilder:
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    return DockerBuilder(settings)
