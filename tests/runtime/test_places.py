"""Where a home keeps what runs: short socket paths, private directories, whole files."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from pathlib import Path

import pytest

from mlfuncs.errors import StorageError
from mlfuncs.settings import Settings
from mlfuncs_runtime.supervisor.places import find_places, make_places, read_json, remove_sockets, write_json

SUN_PATH = 107


def long_home(tmp_path: Path, settings: Settings) -> Settings:
    return dataclasses.replace(settings, home=tmp_path / ("a" * 60) / ("b" * 60))


def test_a_short_home_has_its_sockets_below_it(settings: Settings):
    assert make_places(settings).supervisor_socket == settings.home / "run" / "supervisor.sock"


def test_a_long_home_has_its_sockets_in_a_short_private_directory(tmp_path: Path, settings: Settings):
    places = make_places(long_home(tmp_path, settings))
    try:
        assert len(os.fsencode(places.sockets / "w-0123456789.sock")) <= SUN_PATH
        assert stat.S_IMODE(places.sockets.stat().st_mode) == 0o700
        assert places == find_places(long_home(tmp_path, settings))
        remove_sockets(places)
        assert not places.sockets.exists()
    finally:
        shutil.rmtree(places.sockets, ignore_errors=True)


def test_two_long_homes_do_not_share_sockets(tmp_path: Path, settings: Settings):
    one = long_home(tmp_path, settings)
    two = dataclasses.replace(one, home=one.home / "other")
    assert find_places(one).sockets != find_places(two).sockets


def test_a_link_in_the_shared_place_is_refused(tmp_path: Path, settings: Settings):
    places = find_places(long_home(tmp_path, settings))
    (tmp_path / "elsewhere").mkdir()
    places.sockets.symlink_to(tmp_path / "elsewhere")
    try:
        with pytest.raises(StorageError, match="belongs to someone else"):
            make_places(long_home(tmp_path, settings))
    finally:
        places.sockets.unlink()


def test_an_open_directory_is_closed_to_others(settings: Settings):
    (settings.home / "run").mkdir(parents=True)
    (settings.home / "run").chmod(0o755)
    assert stat.S_IMODE(make_places(settings).run.stat().st_mode) == 0o700


def test_files_are_whole_or_absent(tmp_path: Path):
    path = tmp_path / "state.json"
    assert read_json(path) is None
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text('{"a": ')
    assert read_json(path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
