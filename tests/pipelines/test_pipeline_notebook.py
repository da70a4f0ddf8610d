"""The pipeline tutorial runs from the top, in a kernel of its own, and shows the runs as graphs."""

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_pipeline.ipynb"


def _html(cell: Any) -> str:
    return "".join("".join(output.get("data", {}).get("text/html", "")) for output in cell.get("outputs", []))


@pytest.mark.slow
def test_tutorial_runs_and_shows_its_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tutorial")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first, shown, again, compiled = code[2], code[3], code[5], code[7]
    assert "<svg" in _html(first) and "succeeded" in _html(first)  # drawn live
    assert "<svg" in _html(shown) and "condition" in _html(shown)
    assert "False" not in "".join(output.get("data", {}).get("text/plain", "") for output in again.outputs)
    assert compiled.outputs[-1]["data"]["text/plain"] == "('digits', [])"
