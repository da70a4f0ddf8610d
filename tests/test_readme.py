"""The README's first page does what it says, typed along as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def first_page(tmp_path):
    """A folder with the README's script in it, and the environment of a newcomer; all is stopped afterwards."""
    (tmp_path / "iris.py").write_text(re.search(r"```python\n(.*?)```", README, re.S)[1], encoding="utf-8")
    environ = {**os.environ, "MLFUNCS_HOME": str(tmp_path / "home"), "MLFUNCS_PORT": "0"}

    def command(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield command
    command("-m", "mlfuncs", "down")


def test_the_first_page_works_as_it_is_typed(first_page):
    printed = first_page("iris.py")
    assert re.search(r"succeeded \{'accuracy': 1\.0\}", printed) and re.search(r"/predict \[0\]", printed)
    row = json.dumps({"rows": [[6.2, 2.9, 4.3, 1.3]]})
    assert first_page("-m", "mlfuncs", "invoke", "predict", "--data", row).strip() == "[1]"
    status = json.loads(first_page("-m", "mlfuncs", "status", "--json"))
    assert [(e["name"], e["revision"], len(e["replicas"])) for e in status["endpoints"]] == [("predict", "rev-1", 1)]
    assert "accuracy" in first_page("-m", "mlfuncs", "ls", "runs")


def test_every_page_the_readme_names_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), f"README.md names {target}"
