"""The public face: what `import mlfuncs` loads, and that every promised name and setting is really there."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlfuncs as ml
from mlfuncs import adapters, errors
from mlfuncs.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("pandas", "numba", "kfp", "redis", "sqlalchemy", "fastapi", "numpy", "pyarrow", "pydantic", "uvicorn", "click")


def test_import_loads_no_heavy_module():
    code = (
        "import sys, mlfuncs as ml\n"
        "@ml.function(scale=ml.Scale(max=2))\ndef f(x: int) -> int: return x\n"
        "assert f(1) == 1\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ml.__all__)
def test_every_public_name_resolves_and_is_documented(name):
    value = getattr(ml, name)
    assert inspect.getdoc(value), f"ml.{name} has no docstring"


def test_public_names_never_hide_a_submodule():
    submodules = {path.stem for path in (ROOT / "mlfuncs").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not submodules & set(ml.__all__)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ml.nothing


@pytest.mark.parametrize("name", adapters.ADAPTERS)
def test_every_adapter_resolves(name):
    assert adapters.load(name) is not None


def test_every_setting_is_documented_and_they_are_at_most_25():
    names = [field.name for field in dataclasses.fields(Settings)]
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "settings.md").read_text(), re.M)
    assert documented == names
    assert len(names) <= 25


def test_the_error_tree_in_the_docstring_is_the_real_one():
    drawn = dict(re.findall(r"(\w+)\s+(\d{3})  ", errors.__doc__))
    real = {
        name: str(value.status)
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.MlfuncsError)
    }
    assert drawn == real


def test_editors_see_every_name_of_the_core() -> None:
    tree = ast.parse(Path(ml.__file__).read_text())
    seen = {(n.module, a.asname) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    assert {(module, name) for name, module in ml._CORE.items()} <= seen


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs:docker", r"the target 'docker' of runs \(docker\) needs .*pip install 'mlfuncs\[docker\]'"),
        ("target:docker", r"the target 'docker' \(docker\)"),
        ("images:build", r"building images \(docker\)"),
        ("runs:kubernetes", r"the target 'kubernetes' of runs \(kubernetes\) needs .*'mlfuncs\[kubernetes\]'"),
    ],
)
def test_an_adapter_whose_extra_is_absent_says_what_to_install(name: str, words: str) -> None:
    code = (
        "import sys\n"
        "sys.modules.update(docker=None, kubernetes=None)\n"  # as where the extras are not installed
        "from mlfuncs import adapters, errors\n"
        f"try: adapters.load({name!r})\n"
        "except errors.MissingExtra as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.match(words, done.stdout), done.stdout
