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
INDEX = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


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


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} names {target}"
        assert not anchor or anchor in anchors_of(found), f"{page.name} names {target}"


def test_every_page_is_found_from_the_index():
    named = {(ROOT / "docs" / t.partition("#")[0]).resolve() for t in re.findall(r"\]\(([^)\s:]+)\)", INDEX)}
    pages = {page.resolve() for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"}
    assert pages <= named
    for path in re.findall(r"`((?:mlfuncs|runtime|pipelines|featurestore|tests)/[\w./]*)`", INDEX):
        assert (ROOT / path).exists(), f"docs/README.md names {path}"
