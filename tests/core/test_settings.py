"""Settings: where each key comes from, which home and project hold, and what bad values say."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import pytest

from mlfuncs.errors import SpecError, StorageError
from mlfuncs.settings import PREFIX, Settings, default_project, ensure_home, find_home, read_settings

ROOT = Path(__file__).parents[2]


def read(folder: Path, **environ: str) -> Settings:
    return read_settings({"HOME": str(folder), **environ}, folder)


def test_the_environment_comes_before_the_project_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.mlfuncs]\nport = 9001\nlog_level = "DEBUG"\n')
    assert read(tmp_path).port == 9001
    settings = read(tmp_path, MLFUNCS_PORT="9002")
    assert (settings.port, settings.log_level, settings.host) == (9002, "DEBUG", "127.0.0.1")


def test_the_nearest_project_file_holds(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.mlfuncs]\nport = 1\n")
    assert read(inner).port == 1
    (inner.parent / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert read(inner).port == 8080


def test_an_unknown_key_of_the_project_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.mlfuncs]\nprot = 1\n")
    with pytest.raises(SpecError, match=r"unknown key 'prot'; did you mean 'port'.*known keys: .*host"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["[tool.mlfuncs", "\x00", "[tool]\nmlfuncs = 3\n", "tool = 1\n"])
def test_a_damaged_project_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(SpecError, match=r"pyproject\.toml"):
        read(tmp_path)


@pytest.mark.parametrize("value", ["many", "", "8080.5"])
def test_a_number_that_is_none_is_named_with_its_variable(tmp_path: Path, value: str) -> None:
    with pytest.raises(SpecError, match=r"port must be a whole number.*MLFUNCS_PORT"):
        read(tmp_path, MLFUNCS_PORT=value)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("PORT", "65536", "between 0 and 65535, not 65536; set MLFUNCS_PORT"),
        ("PORT", "-1", "between 0 and 65535"),
        ("REGISTRY_POOL", "0", "1 connection or more"),
        ("LOG_LEVEL", "loud", "DEBUG or INFO or WARNING or ERROR or CRITICAL, not 'loud'"),
        ("LOG_FORMAT", "xml", "text or json, not 'xml'"),
    ],
)
def test_a_value_that_the_key_cannot_have_is_refused(tmp_path: Path, key: str, value: str, wanted: str) -> None:
    with pytest.raises(SpecError, match=wanted):
        read(tmp_path, **{PREFIX + key: value})


def test_choices_are_taken_in_any_case(tmp_path: Path) -> None:
    settings = read(tmp_path, MLFUNCS_LOG_LEVEL="debug", MLFUNCS_LOG_FORMAT="JSON")
    assert (settings.log_level, settings.log_format) == ("DEBUG", "json")


def test_variables_of_others_are_left_alone(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, MLFUNCS_SOMETHING_ELSE="1").port == 8080


def test_a_misspelt_variable_is_named_with_the_one_meant(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"MLFUNCS_REGISTRY_URI is not a setting.*MLFUNCS_REGISTRY_URL"):
        read(tmp_path, MLFUNCS_REGISTRY_URI="sqlite://")


def test_home_is_the_nearest_then_the_users(tmp_path: Path) -> None:
    inner = tmp_path / "p" / "q"
    inner.mkdir(parents=True)
    assert find_home(inner, {"HOME": str(tmp_path)}) == tmp_path / ".mlfuncs"
    (tmp_path / "p" / ".mlfuncs").mkdir()
    assert read(inner).home == tmp_path / "p" / ".mlfuncs"


def test_home_is_absolute_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path, MLFUNCS_HOME="state").home == tmp_path / "state"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(tmp_path, MLFUNCS_HOME="~/state").home == tmp_path / "state"


def test_the_project_is_the_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "Churn Model (v2)"
    folder.mkdir()
    assert read(folder).project == "churn-model-v2"
    (folder / "deep").mkdir()
    (folder / ".mlfuncs").mkdir()
    assert read(folder / "deep").project == "churn-model-v2"
    assert default_project(tmp_path / "elsewhere", Path("/")) == "default"


@pytest.mark.parametrize("name", ["Shop", "-shop", "a" * 64, "a b", "x/y"])
def test_a_project_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="MLFUNCS_PROJECT"):
        read(tmp_path, MLFUNCS_PROJECT=name)


def test_defaults_of_urls_lie_in_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, project="p")
    assert settings.resolved_registry_url == f"sqlite:///{tmp_path}/registry.db"
    assert settings.resolved_artifacts_url == f"{tmp_path}/artifacts"
    assert settings.resolved_warehouse_url == f"{tmp_path}/warehouse"
    assert Settings(tmp_path, "p", artifacts_url="s3://b").resolved_artifacts_url == "s3://b"


def test_a_child_process_sees_the_same_settings(tmp_path: Path) -> None:
    settings = read(tmp_path, MLFUNCS_PORT="0", MLFUNCS_TOKEN="t", MLFUNCS_HOME="h", MLFUNCS_PROJECT="p")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert read_settings(settings.to_environ(), elsewhere) == settings


def test_a_childs_settings_override_a_project_file(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "h", project="p")
    (tmp_path / "pyproject.toml").write_text('[tool.mlfuncs]\ntoken = "other"\nuv_index_url = "https://x"\n')
    assert read_settings(settings.to_environ(), tmp_path) == settings


def test_home_is_made_for_its_owner_only(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "a" / "b", project="p")
    assert ensure_home(settings).stat().st_mode & 0o777 == 0o700
    ensure_home(settings)


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*cannot be written.*MLFUNCS_HOME"):
        ensure_home(Settings(home=tmp_path / "file", project="p"))


def test_a_home_on_a_file_system_that_takes_no_files_is_named() -> None:
    with pytest.raises(StorageError, match=r"/proc/self/fdinfo/home.*cannot be written"):
        ensure_home(Settings(home=Path("/proc/self/fdinfo/home"), project="p"))


def test_there_are_at_most_25_keys_and_each_is_documented() -> None:
    names = [field.name for field in dataclasses.fields(Settings)]
    assert len(names) <= 25
    text = (ROOT / "docs" / "settings.md").read_text()
    assert [name for name in names if not re.search(rf"\b{PREFIX}{name.upper()}\b|`{name}`", text)] == []
