"""What is written down is on the disk, whole, when the call returns: the order of syncs and renames is the proof."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlfuncs.bundles import store
from mlfuncs.errors import RegistryUnavailable, StorageError
from mlfuncs.files import write_atomically
from mlfuncs.runs.journal import METRIC, Journal
from mlfuncs.runs.recorder import Recorder
from mlfuncs.settings import Settings
from mlfuncs.signing import project_key


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reached the disk, in order: "sync <file or folder>", "name <new name>"."""
    seen: list[str] = []
    sync, replace, rename, link = os.fsync, os.replace, os.rename, os.link

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(f"sync {path.name if path.is_dir() or path.suffix else 'content'}")
        sync(descriptor)

    def named(function):
        def call(source, target):
            function(source, target)
            seen.append(f"name {Path(target).name}")

        return call

    monkeypatch.setattr(os, "fsync", synced)
    for name, function in (("replace", replace), ("rename", rename), ("link", link)):
        monkeypatch.setattr(os, name, named(function))
    return seen


def test_content_is_on_disk_before_its_name(tmp_path: Path, steps: list[str]) -> None:
    write_atomically(tmp_path / "locks" / "pins", b"numpy==2.0\n")
    assert [step.split()[0] for step in steps] == ["sync", "name", "sync"]
    assert steps[1:] == ["name pins", "sync locks"]
    assert (tmp_path / "locks" / "pins").read_bytes() == b"numpy==2.0\n"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="taken"):
        write_atomically(tmp_path / "taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_keys_and_bundles_are_on_disk_before_they_are_used(tmp_path: Path, steps: list[str]) -> None:
    settings = Settings(home=tmp_path / "home", project="shop")
    project_key(settings)
    assert [step.split()[0] for step in steps] == ["sync", "name", "sync"] and steps[1] == "name shop.pem"
    steps.clear()
    store.keep("a" * 64, b"archive", settings)
    assert steps == ["sync bundle.zip", "sync bundle.sig", "name shop", f"sync {'a' * 64}"]


def test_a_journal_is_synced_while_the_registry_is_away(tmp_path: Path, steps: list[str]) -> None:
    class Waiting:
        """A record whose registry does not answer."""

        run_id, is_finished, journal = "r1", False, Journal(tmp_path / "r1.jsonl")

        def drain(self) -> None:
            raise RegistryUnavailable("the database is away")

    waiting, recorder = Waiting(), Recorder()
    recorder._records["r1"] = waiting
    recorder._tend()  # nothing was logged yet
    assert steps == []
    waiting.journal.append(METRIC, "loss", 0.5, None, 0.0)
    recorder._tend()
    assert steps == ["sync r1.jsonl"]
    waiting.journal.close()


@pytest.mark.parametrize("url", ["nosuch://bucket/path", "file:///proc/nothing/here"])
def test_an_artifact_url_that_cannot_be_used_is_said(tmp_path: Path, url: str) -> None:
    settings = Settings(home=tmp_path / "home", project="shop", artifacts_url=url)
    with pytest.raises(StorageError, match="check MLFUNCS_ARTIFACTS_URL"):
        store.keep("a" * 64, b"archive", settings)
