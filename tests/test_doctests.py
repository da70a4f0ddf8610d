"""The examples in docstrings show what really comes out."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "runtime", "pipelines", "featurestore")
PACKAGES = ("mlfuncs", "mlfuncs_runtime", "mlfuncs_pipelines", "mlfuncs_featurestore")


def modules_with_examples() -> list[str]:
    found = []
    for folder, package in zip(FOLDERS, PACKAGES, strict=True):
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            if "\n    >>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                found.append(".".join(part for part in parts if part != "__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted, f"{name} has an example that doctest does not find"
    assert result.failed == 0
