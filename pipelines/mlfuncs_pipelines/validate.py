"""Strict checks of a kfp v2 pipeline file: every fault at once, each with its place and how to mend it.

kfp's own loader accepts files that the backend refuses or that fail in the middle of a run: fields it does not know,
references to tasks, inputs and executors that are not there, cycles, types that can never fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlfuncs.errors import MlfuncsError, SpecError
from mlfuncs_pipelines.documents import MAX_BYTES, read_documents, read_text
from mlfuncs_pipelines.ir import Pipeline
from mlfuncs_pipelines.ir_shape import Problem, canonical
from mlfuncs_pipelines.references import check_references

SCHEMA_VERSION = "2.1.0"
_PIPELINE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")


def check(text: str) -> tuple[Pipeline | None, list[Problem]]:
    """The pipeline in `text` (None when its shape is wrong) and all problems found.

    >>> check("schemaVersion: 2.1.0")[1][0].place
    'root'
    """
    if len(text.encode()) > MAX_BYTES:
        return None, [
            Problem("", f"the file is over {MAX_BYTES} bytes", "split the pipeline or pass large data as artifacts")
        ]
    try:
        documents = read_documents(text)
    except SpecError as exc:
        return None, [Problem("", str(exc), "write valid YAML, as the kfp compiler does")]
    problems: list[Problem] = []
    spec, platform = _split(documents, problems)
    if spec is None:
        return None, problems
    spec = canonical(spec, "PipelineSpec", "", problems)
    platform = canonical(platform, "PlatformSpec", "", problems)
    _check_head(spec, problems)
    if any(problem.blocks for problem in problems):
        return None, problems
    pipeline = Pipeline.of(spec, platform)
    problems.extend(check_references(pipeline))
    return pipeline, problems


def check_file(path: Path) -> tuple[Pipeline | None, list[Problem]]:
    """As `check`, for the file at `path`. Raises NotFound when there is none."""
    try:
        return check(read_text(path))
    except SpecError as exc:
        return None, [Problem(str(path), str(exc), "compile it again with kfp or mlfuncs")]


def load_pipeline(source: str | Path) -> Pipeline:
    """The pipeline in a file, when nothing keeps it from running. Raises InvalidPipeline with all that does."""
    pipeline, problems = check_file(Path(source))
    return require_runnable(pipeline, problems, str(source))


def require_runnable(pipeline: Pipeline | None, problems: list[Problem], what: str) -> Pipeline:
    """`pipeline`, when no problem blocks it. Raises InvalidPipeline with all problems that do."""
    blocking = [problem for problem in problems if problem.blocks]
    if blocking or pipeline is None:
        raise InvalidPipeline(what, blocking or problems)
    return pipeline


class InvalidPipeline(SpecError):
    """A pipeline cannot run; `problems` lists why."""

    def __init__(self, what: str, problems: list[Problem]) -> None:
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"{what} cannot run, {len(problems)} problem{'s' * (len(problems) != 1)}:\n{lines}")
        self.problems = problems

    def to_problem(self, request_id: str | None = None) -> dict[str, Any]:
        return {**MlfuncsError.to_problem(self, request_id), "errors": [problem.to_dict() for problem in self.problems]}


def _split(documents: list[Any], problems: list[Problem]) -> tuple[Any, Any]:
    """The one pipeline document and the platform document among `documents`."""
    if any(not isinstance(document, dict) for document in documents):
        problems.append(Problem("", "a document is not an object", "give the compiled pipeline, not a list or text"))
        return None, {}
    platforms = [document for document in documents if "platforms" in document and "root" not in document]
    specs = [document for document in documents if document not in platforms]
    if len(specs) != 1:
        mend = "keep exactly one pipeline (and at most one platform document) in the file"
        problems.append(Problem("", f"there are {len(specs)} pipeline documents in the file", mend))
    if len(platforms) > 1:
        problems.append(Problem("", "there are several platform documents in the file", "merge them into one"))
    if len(specs) == 1 and "apiVersion" in specs[0]:
        mend = "compile it with kfp 2 (kfp.compiler.Compiler().compile)"
        problems.append(Problem("apiVersion", "this is a Kubernetes or kfp v1 (Argo) document", mend))
        return None, {}
    return (specs[0] if len(specs) == 1 else None), (platforms[0] if platforms else {})


def _check_head(spec: dict[str, Any], problems: list[Problem]) -> None:
    if not spec.get("root"):
        problems.append(Problem("root", "the pipeline has no root", "add root.dag with at least one task"))
    elif "dag" not in spec["root"]:
        problems.append(Problem("root", "the root is not a DAG", "put the tasks under root.dag.tasks"))
    version = spec.get("schemaVersion")
    if version != SCHEMA_VERSION:
        mend = f"compile it with a kfp that writes schemaVersion {SCHEMA_VERSION}"
        problems.append(Problem("schemaVersion", f"{version!r} is not {SCHEMA_VERSION!r}", mend, blocks=False))
    name = spec.get("pipelineInfo", {}).get("name")
    if not name:
        mend = "set pipelineInfo.name"
        problems.append(Problem("pipelineInfo.name", "the pipeline has no name", mend, blocks=False))
    elif isinstance(name, str) and not _PIPELINE_NAME.fullmatch(name):
        mend = "use 1 to 128 of a-z, 0-9 and '-', starting with a letter or digit"
        problems.append(Problem("pipelineInfo.name", f"{name!r} is not a pipeline name", mend, blocks=False))
