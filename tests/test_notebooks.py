"""Every tutorial runs from its first cell to its last, in a real kernel, as a reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    environ = {
        **os.environ,
        "MLFUNCS_HOME": str(tmp_path / "home"),
        "MLFUNCS_PORT": "0",
        "MLFUNCS_PROJECT": "notebooks",
    }
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    try:
        client.execute(env=environ)
    finally:
        subprocess.run([sys.executable, "-m", "mlfuncs", "down"], env=environ, check=True, cwd=tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
