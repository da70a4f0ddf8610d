"""What the runtime's tests share: a Docker Engine, and the base image of the code as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlfuncs.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def docker_engine(require: Callable[[str, object], None]) -> None:
    """A Docker Engine answers, with an image of this Python; installed and started when there is none.

    The stand-in that the script makes of Debian's packages is Python 3.11; other Pythons need the official image.
    """
    require("root (to start a Docker Engine)", os.geteuid() == 0 or shutil.which("docker"))
    done = subprocess.run([ROOT / "scripts" / "docker-engine"], capture_output=True, text=True, check=False)
    require(f"a Docker Engine ({done.stderr[-500:]})", done.returncode == 0)
    if sys.version_info[:2] != (3, 11):
        image = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
        found = subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False)
        require(f"the image {image}", found.returncode == 0 or _pull(image))


def _pull(image: str) -> bool:
    return subprocess.run(["docker", "pull", "--quiet", image], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def docker_base(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base image's name; built when the code has changed since the last time."""
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    return DockerBuilder(Settings(tmp_path_factory.mktemp("home"), "test")).base(print).name
