"""What the runtime's tests share: a Docker Engine, and the base image of the code as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mlfuncs.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def docker_engine(require: Callable[[str, object], None]) -> None:
    """A Docker Engine answers, with a Python image; installed and started when there is none."""
    require("root (to start a Docker Engine)", os.geteuid() == 0 or shutil.which("docker"))
    done = subprocess.run([ROOT / "scripts" / "docker-engine"], capture_output=True, text=True, check=False)
    require(f"a Docker Engine ({done.stderr[-500:]})", done.returncode == 0)


@pytest.fixture(scope="session")
def docker_base(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base image's name; built when the code has changed since the last time."""
    from mlfuncs_runtime.images.docker_builder import DockerBuilder

    return DockerBuilder(Settings(tmp_path_factory.mktemp("home"), "test")).base(print).name
