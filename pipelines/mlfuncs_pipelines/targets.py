"""Pipelines named on a command line as FILE.py:NAME: ours, or kfp's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from mlfuncs.errors import NotFound, SpecError
from mlfuncs.loading import load_file
from mlfuncs_pipelines.pipeline import Pipeline


class KfpPipeline(Pipeline):
    """A pipeline that was decorated with kfp's `@dsl.pipeline`: its graph component is there already."""

    def __init__(self, component: Any) -> None:
        super().__init__(component.pipeline_func, name=component.name)
        self._component = component

    @property
    def component(self) -> Any:
        """kfp's graph component, as kfp made it."""
        return self._component


def load_pipeline_object(target: str) -> Pipeline:
    """The pipeline that "FILE:NAME" names. Raises SpecError, NotFound, or BundleError when the file raises."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise SpecError(f"{target!r} names no pipeline: write FILE.py:NAME, or the path of a compiled .yaml file")
    if place.endswith((".py", ".ipynb")) or "/" in place:
        module = load_file(Path(place).absolute(), place)
    else:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as exc:
            raise NotFound("module", place, hint="; to name a file, write path/file.py:NAME") from exc
    found = getattr(module, name, None)
    if isinstance(found, Pipeline):
        return found
    if found is not None and hasattr(found, "pipeline_spec") and hasattr(found, "pipeline_func"):
        return KfpPipeline(found)
    known = [
        key for key, value in vars(module).items() if isinstance(value, Pipeline) or hasattr(value, "pipeline_func")
    ]
    raise NotFound("pipeline", name, known, hint=f"(in {place})")


def write_ir(pipeline: Pipeline, path: Path) -> Path:
    """Compile to `path`, after the strict checks. Raises InvalidPipeline."""
    assert pipeline.ir.name
    return pipeline.compile(path)
