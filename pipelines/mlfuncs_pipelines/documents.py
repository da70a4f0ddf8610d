"""The text of a pipeline file, and the YAML or JSON documents in it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from mlfuncs.errors import NotFound, SpecError

MAX_BYTES = 32 * 2**20  # what the Kubeflow Pipelines API takes in one upload


def read_text(path: Path) -> str:
    """The file's text. Raises NotFound, or SpecError when it is too large or not UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpecError(f"{path} has {path.stat().st_size} bytes; a pipeline file may have {MAX_BYTES} (32 MiB)")
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise NotFound("pipeline file", str(path), hint="; give the path of a compiled .yaml file") from None
    except (UnicodeDecodeError, OSError) as exc:
        raise SpecError(f"{path} cannot be read as UTF-8 text: {exc}") from exc


def read_documents(text: str) -> list[Any]:
    """The YAML (or JSON) documents in `text`. Raises SpecError with the line for text that is not YAML."""
    import yaml

    try:
        return [document for document in yaml.load_all(text, _loader()) if document is not None]
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"the pipeline file is not YAML{where}: {getattr(exc, 'problem', None) or exc}") from exc
    except RecursionError:
        raise SpecError("the pipeline file is nested too deeply") from None


@functools.cache
def _loader() -> Any:
    """A safe YAML loader that refuses duplicate keys, which plain YAML loading would merge silently."""
    import yaml

    class StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is there twice", key_node.start_mark
                    )
                if isinstance(key_node.value, str):
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    def construct_map(loader: Any, node: Any) -> Any:
        made: dict[Any, Any] = {}
        yield made
        made.update(loader.construct_mapping(node))

    StrictLoader.add_constructor("tag:yaml.org,2002:map", construct_map)
    # a date stays the text it was: the format has no dates
    StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: node.value)
    return StrictLoader
