"""The page on pipelines: what it shows is run as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


def test_the_page_runs_as_it_is_written(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    define, *use, _ = [code for language, code in blocks if language == "python"]
    shell = next(code for language, code in blocks if not language and "pipeline compile" in code)
    (tmp_path / "churn.py").write_text(define)
    (tmp_path / "use.py").write_text("from churn import *\n" + "".join(use))
    environment = {**os.environ, "MLFUNCS_HOME": str(tmp_path / "home"), "MLFUNCS_PROJECT": "tests"}
    program = Path(sys.executable).parent
    environment["PATH"] = f"{program}{os.pathsep}{environment['PATH']}"
    for words in (["python", "-W", "ignore", "use.py"], *(line.split("#")[0].split() for line in shell.splitlines())):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        if "--json" in words:
            assert json.loads(done.stdout)["status"] == "succeeded"
    assert "churn" in done.stdout
