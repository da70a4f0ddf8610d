"""Two processes that apply at the same time: neither writes over what the other one just recorded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mlfuncs.settings import Settings
from mlfuncs_featurestore import FeatureStore

# Applies what its last argument says; with "hold", says so after planning and waits for a line before it records.
APPLIER = """
import sys
from pathlib import Path
from mlfuncs.errors import Conflict
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Entity, FeatureService, FeatureStore, FeatureView, checkpoints

home, mode, what = sys.argv[1:]
USER = Entity("user_id", "int64")

def view(name="spend", **changes):
    return FeatureView(name, **{"entities": [USER], "fields": {"amount": "float64"}, **changes})

def hold(moment):
    checkpoints.hook = None
    print("planned", flush=True)
    sys.stdin.readline()

if mode == "hold":
    checkpoints.hook = hold
try:
    plan = FeatureStore(Settings(home=Path(home), project="shop")).apply(eval(what))
    print([(one.name, one.action) for one in plan.changes])
except Conflict as exc:
    print("Conflict:", exc)
"""


def applier(home, mode, what):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", APPLIER, str(home), mode, what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def finished(process):
    said, _ = process.communicate("go\n", timeout=120)
    assert process.returncode == 0
    return said


@pytest.fixture
def between(tmp_path):
    """`between(first, second)`: what a process says whose apply of `first` has another's of `second` in its middle."""

    def run(first, second):
        finished(applier(tmp_path, "now", "view()"))
        held = applier(tmp_path, "hold", first)
        assert held.stdout.readline() == "planned\n"
        assert "Conflict" not in finished(applier(tmp_path, "now", second))
        return finished(held), FeatureStore(Settings(home=tmp_path, project="shop")).catalog

    return run


def test_a_change_made_meanwhile_is_not_written_over(between):
    said, catalog = between("view(owner='ann')", "view(owner='bob')")
    assert "Conflict: view 'spend' was changed by another process" in said and "version is 2" in said
    assert catalog.view("spend").owner == "bob" and catalog.version("view", "spend") == 2


def test_the_same_change_made_meanwhile_is_no_conflict(between):
    said, catalog = between("view(owner='ann')", "view(owner='ann')")
    assert "('spend', 'unchanged')" in said and catalog.version("view", "spend") == 2


def test_a_change_of_something_else_is_planned_with(between):
    said, catalog = between("view(owner='ann')", "view('other')")
    assert "('spend', 'update')" in said
    assert {one.name for one in catalog.all("view")} == {"spend", "other"}


def test_a_feature_that_a_service_began_to_use_meanwhile_does_not_vanish(between):
    wider = "view(fields={'amount': 'float64', 'city': 'string'}, deprecated=['city'])"
    use = f"[{wider}, FeatureService('s', ['spend:city'])]"
    said, catalog = between("view(owner='ann')", use)
    assert "Conflict" in said and "city" in catalog.view("spend").fields
