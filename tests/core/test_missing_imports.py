"""Deploys that tell of an import that will fail where the function runs, and of a name that is missing."""

from __future__ import annotations

import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest

import mlfuncs as ml
from mlfuncs.bundles.bundle import build_bundle, open_bundle
from mlfuncs.bundles.imports import missing_imports, needed_imports
from mlfuncs.errors import SpecError
from mlfuncs.serving.endpoints import deploy
from mlfuncs.settings import Settings


def told(function: Any, **options: Any) -> list[str]:
    """What a deploy of `function` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deploy(ml.function(**options)(function), name="f", target="memory")
    return [str(warning.message) for warning in caught if "imports" in str(warning.message)]


def test_a_module_that_is_not_installed_is_named_with_what_to_add() -> None:
    def f(x: int) -> int:
        import no_such_module.part

        return int(no_such_module.part.add(x))

    (message,) = told(f)
    assert "function 'f' imports 'no_such_module'" in message and "requirements=['no_such_module', ...]" in message


def test_a_module_that_the_given_requirements_leave_out_is_named_by_its_distribution() -> None:
    def f(x: int) -> int:
        import json

        import yaml

        return len(yaml.safe_dump(json.loads(str(x))))

    (message,) = told(f, requirements=["orjson"])
    assert "'yaml'" in message and "requirements=['PyYAML==" in message
    assert told(f, requirements=["PyYAML"]) == []
    assert told(f) == []  # what is not given is found out


def test_what_the_code_can_do_without_is_not_told() -> None:
    def f(x: int) -> int:
        try:
            import no_such_module
        except ImportError:
            no_such_module = None
        return x if no_such_module is None else 0

    assert told(f) == []


def test_modules_of_the_users_own_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text("def rule(x):\n    import no_such_rules\n    return no_such_rules.f(x)\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def f(x: int) -> int:
        from my_rules import rule

        return int(rule(x))

    (message,) = told(f)
    assert "no_such_rules" in message
    sys.modules.pop("my_rules", None)


def test_an_environment_of_its_own_is_looked_into(tmp_path: Path, settings: Settings) -> None:
    def f(x: int) -> int:
        import no_such_module

        return int(no_such_module.f(x))

    function = ml.function(f)
    bundle = open_bundle(build_bundle(function.target, function.spec, settings).digest, settings)
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    python = tmp_path / "bin" / "python"
    assert missing_imports(bundle, python) == {"no_such_module": "no_such_module"}
    (packages / "no_such_module.cpython-311-x86_64-linux-gnu.so").touch()
    assert missing_imports(bundle, python) == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b, c as d", {"a", "c"}),
        ("from . import a\nfrom .b import c", set()),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", {"b"}),
        ("try:\n    import a\nexcept ValueError:\n    import b", {"a", "b"}),
        ("try:\n    import a\nexcept (KeyError, ModuleNotFoundError):\n    import b\nfinally:\n    import c", {"c"}),
        ("    def f():\n        import a\n", {"a"}),
        ("this is no Python", set()),
    ],
)
def test_the_imports_that_code_cannot_do_without(source: str, names: set[str]) -> None:
    assert needed_imports(textwrap.indent(source, "  ")) == names


def test_a_lambda_without_a_name_is_not_deployed() -> None:
    with pytest.raises(SpecError, match=r"deploy\(name='...'\)"):
        deploy(lambda x: x, target="memory")
    assert deploy(lambda x: x, name="same", target="memory").name == "same"
