"""How the replicas of a revision are started as containers: its image, made when the engine lacks it, and its order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
from typing import Any

from mlfuncs.files import locked
from mlfuncs.settings import Settings, ensure_home
from mlfuncs_runtime.supervisor.books import Launch
from mlfuncs_runtime.supervisor.places import Places
from mlfuncs_runtime.supervisor.plan import EndpointPlan

log = logging.getLogger("mlfuncs.supervisor")
_PASSED = ("log_level", "log_format", "otel_endpoint")  # settings that mean the same in a container

REVISION_TAG = re.compile(r"rev-\d+-[0-9a-f]{12}")  # what `image_name` makes


def make_docker_launch(
    plan: EndpointPlan, revision: str, config: dict[str, Any], settings: Settings, places: Places
) -> Launch:
    """Build the image if need be and say how its replicas start. Raises what building raises; blocks for seconds."""
    own = dataclasses.replace(settings, project=plan.project)
    image = ensure_image(plan, revision, own)
    environ = {f"MLFUNCS_{key.upper()}": str(getattr(own, key)) for key in _PASSED if getattr(own, key)}
    container = {"image": image, "environ": environ, "home": home_mark(settings)}
    env = {**os.environ, **own.to_environ()}
    path = places.endpoint_log(plan.name, revision)
    document = {**config, "log_path": "", "container": container}
    return Launch(sys.executable, document, env, path, module="mlfuncs_runtime.docker.replica", forks=False)


def ensure_image(plan: EndpointPlan, revision: str, settings: Settings) -> str:
    """The name of the revision's image, built when the engine has none of that name."""
    from mlfuncs_runtime.images.docker_builder import DockerBuilder
    from mlfuncs_runtime.images.function_image import ImageFunction, assemble, wished_base

    builder = DockerBuilder(settings)
    with locked(ensure_home(settings) / "images" / ".build.lock"):
        limits = plan.options.get("limits") or {}
        function = ImageFunction(plan.name, plan.digests[revision], plan.revisions[revision], limits)
        base = builder.base(lambda note: log.info("%s", note), wished_base([function], settings))
        reference = image_name(plan, revision, base.id)
        if not builder.has(reference):
            log.info("building the image %s", reference)
            built = builder.store(assemble([function], base, settings), [reference])
            log.info("built %s, %.1f MB above its base", reference, built.new_bytes / 1e6)
    return reference


def image_name(plan: EndpointPlan, revision: str, base: str) -> str:
    """The image of one revision: a name that no other bundle, config or base gets; so an upgrade makes new ones."""
    whole = json.dumps([plan.digests[revision], plan.revisions[revision].to_dict(), plan.project, base], sort_keys=True)
    return f"{repository(plan.project, plan.name)}:{revision}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def repository(project: str, endpoint: str) -> str:
    """The repository that an endpoint's images are in."""
    return f"mlfuncs/{project}-{endpoint}"


def home_mark(settings: Settings) -> str:
    """What tells this home's containers from another's."""
    return hashlib.sha256(os.fsencode(settings.home)).hexdigest()[:16]
