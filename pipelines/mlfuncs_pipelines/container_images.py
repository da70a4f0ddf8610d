"""Docker and the images of container components, looked for before the first step."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

_ANSWER_S = 10
_PULL_S = 1800


def docker_fault() -> str:
    """Why Docker cannot be used; "" when it can."""
    if shutil.which("docker") is None:
        return "no docker program on PATH"
    return _fault(["version", "--format", "{{.Server.Version}}"], _ANSWER_S)


def image_fault(image: str) -> str:
    """Why there is no such image, once pulling it has been tried; "" when it is here.

    One whose name is known only when its step runs, because it has a placeholder, counts as here.
    """
    if "{{$" in image or not _fault(["image", "inspect", "--format", "{{.Id}}", image], _ANSWER_S):
        return ""
    return _fault(["pull", "--quiet", image], _PULL_S)


def _fault(arguments: Sequence[str], timeout_s: float) -> str:
    """What the docker program says when it fails; "" when it does not."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s)
    except (subprocess.TimeoutExpired, OSError) as exc:
        return str(exc)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or ["the engine does not answer"])[0]
