"""Images of revisions in a registry that a cluster pulls from: built and pushed when they are not known there."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from mlfuncs.errors import SpecError
from mlfuncs.files import locked
from mlfuncs.serving.revision_config import RevisionConfig
from mlfuncs.settings import Settings, ensure_home

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow
    from mlfuncs_runtime.images.builder import ImageBuilder, Report


def cluster_image(row: EndpointRow, revision: str, settings: Settings) -> str:
    """The name of a revision's image. Raises SpecError when no registry is set."""
    if not settings.image_registry:
        raise SpecError(
            "a cluster pulls images from a registry: set MLFUNCS_IMAGE_REGISTRY, e.g. registry.example/team"
        )
    found = row.revision(revision)
    whole = json.dumps([found.digest, found.config, row.project], sort_keys=True).encode()
    tag = f"{revision}-{hashlib.sha256(whole).hexdigest()[:12]}"
    return f"{settings.image_registry.rstrip('/')}/{row.project}-{row.name}:{tag}"


def push_image(
    row: EndpointRow, revision: str, settings: Settings, builder: ImageBuilder | None, report: Report
) -> str:
    """Build and push the revision's image once; its name. Raises what building and pushing raise."""
    reference = cluster_image(row, revision, settings)
    mark = ensure_home(settings) / "images" / "pushed" / hashlib.sha256(reference.encode()).hexdigest()
    if mark.exists():
        return reference
    from mlfuncs_runtime.images.function_image import ImageFunction, assemble

    builder = builder or _default_builder(settings)
    found = row.revision(revision)
    limits: dict[str, Any] = (row.desired.get("options") or {}).get("limits") or {}
    function = ImageFunction(row.name, found.digest, RevisionConfig.from_dict(found.config), limits)
    with locked(settings.home / "images" / ".build.lock"):
        if not builder.has(reference):
            report(f"{revision}: building its image")
            builder.store(assemble([function], builder.base(report), settings), [reference])
        report(f"{revision}: pushing {reference}")
        builder.push(reference, report)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return reference


def _default_builder(settings: Settings) -> ImageBuilder:
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    return DockerBuilder(settings)
