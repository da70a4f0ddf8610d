"""Fixtures of the pipeline tests: a home of their own, a compiler, and the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlfuncs.settings import Settings
from mlfuncs_pipelines.engine import Options
from mlfuncs_pipelines.run_log import PipelineRun


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project="tests")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A server of Kubeflow's Pipelines API, which the settings name."""
    sys.path.append(str(Path(__file__).parent))
    from kubeflow_api import served

    with served(monkeypatch, tmp_path) as state:
        yield state


@pytest.fixture(scope="session", autouse=True)
def end_workers() -> Iterator[None]:
    yield
    from mlfuncs_pipelines.runner import close_workers

    close_workers()


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[Any], Path]:
    """Compile a kfp pipeline to a file."""

    def compile_pipeline(pipeline: Any) -> Path:
        from kfp import compiler

        path = tmp_path / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        return path

    return compile_pipeline


@pytest.fixture
def run(settings: Settings, compiled: Callable[[Any], Path]) -> Callable[..., PipelineRun]:
    """Compile a kfp pipeline, check it, and run it on the local engine."""

    def run_it(pipeline: Any, options: Options | None = None, observers: Any = (), **params: Any) -> PipelineRun:
        from mlfuncs_pipelines.runner import run_pipeline
        from mlfuncs_pipelines.validate import check_file, load_pipeline

        path = compiled(pipeline)
        assert check_file(path)[1] == []
        return run_pipeline(load_pipeline(path), params, settings, options, observers)

    return run_it
