"""FILE:NAME on a command line: what is found, what is not run, and what the errors say."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mlfuncs.decorator import Function
from mlfuncs.errors import BundleError, NotFound, SpecError
from mlfuncs.loading import load_target


@pytest.fixture(autouse=True)
def keep_imports(monkeypatch: pytest.MonkeyPatch):
    """Each test gets its own import path and leaves no module behind."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith("/tmp"):
            del sys.modules[name]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_decorated_function_is_found_as_itself(tmp_path: Path) -> None:
    write(
        tmp_path,
        "train_a.py",
        "import mlfuncs as ml\n@ml.function(retries=4)\ndef fit(n: int = 3) -> int:\n  return n\n",
    )
    found = load_target("train_a.py:fit", cwd=tmp_path)
    assert found.spec.retries == 4
    assert found() == 3


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("def thing(x: int) -> int: return x", "function"),
        ("class thing:\n  def __call__(self, x: int) -> int: return x", "class"),
        ("def init_context(context): pass\ndef thing(context, event): return event.body", "nuclio"),
    ],
)
def test_undecorated_things_become_functions(tmp_path: Path, code: str, kind: str) -> None:
    from mlfuncs.interface.signature import function_kind

    write(tmp_path, f"plain_{kind}.py", code)
    found = load_target(f"plain_{kind}.py:thing", cwd=tmp_path)
    assert isinstance(found, Function)
    assert function_kind(found.target) == kind


def test_the_main_guard_does_not_run_and_neighbours_import(tmp_path: Path) -> None:
    write(tmp_path, "sub/neighbour_b.py", "VALUE = 5")
    write(
        tmp_path,
        "sub/script_b.py",
        "from neighbour_b import VALUE\ndef f() -> int: return VALUE\nif __name__ == '__main__': raise SystemExit(1)",
    )
    assert load_target("sub/script_b.py:f", cwd=tmp_path)() == 5


def test_a_file_inside_a_package_keeps_its_relative_imports(tmp_path: Path) -> None:
    write(tmp_path, "shop_c/__init__.py", "")
    write(tmp_path, "shop_c/prices.py", "def price() -> int: return 7")
    write(tmp_path, "shop_c/model.py", "from .prices import price\nimport prices\ndef f() -> int: return price()")
    assert load_target("shop_c/model.py:f", cwd=tmp_path)() == 7
    assert load_target("shop_c.model:f", cwd=tmp_path)() == 7


def test_a_module_path_is_found_from_the_working_directory(tmp_path: Path) -> None:
    write(tmp_path, "jobs_d.py", "class Box:\n  @staticmethod\n  def f(x: int) -> int: return x")
    assert load_target("jobs_d:Box.f", cwd=tmp_path)(2) == 2


def test_a_file_whose_name_is_no_identifier_loads(tmp_path: Path) -> None:
    write(tmp_path, "01-train.py", "def f() -> int: return 1")
    assert load_target("01-train.py:f", cwd=tmp_path)() == 1


def test_two_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, "a/same_e.py", "def f() -> str: return 'a'")
    write(tmp_path, "b/same_e.py", "def f() -> str: return 'b'")
    assert load_target("a/same_e.py:f", cwd=tmp_path)() == "a"
    assert load_target("b/same_e.py:f", cwd=tmp_path)() == "b"


def test_a_file_named_like_a_standard_module_does_not_replace_it(tmp_path: Path) -> None:
    write(tmp_path, "calendar.py", "def f() -> int: return 2")
    assert load_target("calendar.py:f", cwd=tmp_path)() == 2
    assert "tmp" not in (getattr(sys.modules.get("calendar"), "__file__", "") or "")


def test_a_notebook_runs_its_code_cells_without_magics(tmp_path: Path) -> None:
    cells = [
        "%matplotlib inline\nimport math",
        "!ls\ndef f(x: float) -> float:\n    return math.sqrt(x)",
        "%%bash\nfalse",
    ]
    notebook = {"cells": [{"cell_type": "markdown", "source": ["# no"]}]}
    notebook["cells"] += [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    write(tmp_path, "work_f.ipynb", json.dumps(notebook))
    found = load_target("work_f.ipynb:f", cwd=tmp_path)
    assert found(9.0) == 3.0
    from mlfuncs.bundles.source import snippet_of

    assert "math.sqrt" in snippet_of(found.target).text


def test_a_missing_file_names_near_ones(tmp_path: Path) -> None:
    write(tmp_path, "train_g.py", "")
    with pytest.raises(NotFound, match=r"no file is named 'trian_g.py'; did you mean 'train_g.py'"):
        load_target("trian_g.py:f", cwd=tmp_path)


def test_a_missing_name_names_near_ones(tmp_path: Path) -> None:
    write(tmp_path, "train_h.py", "from os.path import join\ndef predict(x: int) -> int: return x")
    with pytest.raises(NotFound, match=r"no function is named 'predcit'; did you mean 'predict'\?.*train_h.py"):
        load_target("train_h.py:predcit", cwd=tmp_path)


def test_a_missing_module_says_how_to_name_a_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no module is named 'nowhere_i'.*path/file.py:name"):
        load_target("nowhere_i:f", cwd=tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n1 / 0", r"bad.*\.py cannot be loaded: ZeroDivisionError: division by zero \(line 2\)"),
        ("import nothing_like_this", r"No module named 'nothing_like_this'; install it"),
        ("def f(:", r"bad.*SyntaxError"),
        ("import sys; sys.exit(3)", r"it called sys.exit\(3\); put what should only run as a script under if __name__"),
    ],
)
def test_an_error_in_the_users_file_is_one_message(tmp_path: Path, code: str, message: str) -> None:
    write(tmp_path, "bad_j.py", code)
    with pytest.raises(BundleError, match=message):
        load_target("bad_j.py:f", cwd=tmp_path)
    assert "bad_j" not in sys.modules


@pytest.mark.parametrize("target", ["train.py", ":f", "train.py:", ""])
def test_a_target_of_another_form_is_refused(target: str) -> None:
    with pytest.raises(SpecError, match="write FILE:NAME"):
        load_target(target)


def test_a_value_is_not_a_function(tmp_path: Path) -> None:
    write(tmp_path, "value_k.py", "LIMIT = 3")
    with pytest.raises(SpecError, match="is int 3, not a function or class"):
        load_target("value_k.py:LIMIT", cwd=tmp_path)


def test_a_file_is_read_as_it_is_now_whatever_bytecode_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    file = tmp_path / "edited_quickly.py"
    for number in (1, 2):
        file.write_text(f"def f() -> int:\n    return {number}\n")
        os.utime(file, (1_700_000_000, 1_700_000_000))
        sys.modules.pop("edited_quickly", None)
        assert load_target(f"{file}:f")() == number
