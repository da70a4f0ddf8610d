"""The target "docker": endpoints as containers of this machine's Docker Engine, kept by the supervisor of the home.

Router, autoscaler, rollouts, drains and logs are those of the target "process": see `docker_replica` for how a
container becomes a worker.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from mlfuncs.errors import MlfuncsError
from mlfuncs_runtime.docker.engine import DockerEngine
from mlfuncs_runtime.docker.launch import REVISION_TAG, home_mark, repository
from mlfuncs_runtime.docker.replica import remove_orphans, remove_stale_folders
from mlfuncs_runtime.process_target import ProcessTarget

if TYPE_CHECKING:
    from mlfuncs.registry import EndpointRow


class DockerTarget(ProcessTarget):
    """Endpoints of one home as containers."""

    def apply(self, row: EndpointRow) -> None:
        """As for processes; raises Unavailable before anything changes when no engine answers."""
        DockerEngine().call("GET", "/version")
        super().apply(row)

    def delete(self, row: EndpointRow) -> None:
        """Take the containers down as processes are, then remove what a crash left, and the endpoint's images."""
        super().apply(row)
        super().delete(row)
        with suppress(MlfuncsError):
            engine = DockerEngine()
            remove_orphans(engine, home_mark(self._settings))
            remove_stale_folders(self._places.sockets)
            _remove_images(engine, repository(row.project, row.name))


def _remove_images(engine: DockerEngine, name: str) -> None:
    """Remove the images of the endpoint's revisions; what `mlfuncs build` made under the same name stays."""
    for image in engine.call("GET", "/images/json") or ():
        for tag in image.get("RepoTags") or ():
            if tag.rpartition(":")[0] == name and REVISION_TAG.fullmatch(tag.rpartition(":")[2]):
                with suppress(MlfuncsError):
                    engine.call("DELETE", f"/images/{tag}")
