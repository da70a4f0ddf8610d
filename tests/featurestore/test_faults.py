"""A crash at any step of ingest, compaction or widening leaves the old state or the new one."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys

import pyarrow as pa
import pytest

from mlfuncs.settings import Settings
from mlfuncs_featurestore import Entity, Expectation, FeatureStore, FeatureView

NOW = datetime.datetime(2024, 6, 1, tzinfo=datetime.UTC)

# Runs each action with every function of the two modules that touch the table wrapped, and dies without cleaning up (as
# kill -9 does) before one of their calls: the first, the second, ... until the action comes to its end. Each attempt
# works on a copy of the starting state. The parent imports and loads what the children need, but opens no table:
# deltalake's threads would not survive the fork.
CRASHER = """
import os, shutil, sys, traceback
from pathlib import Path

home = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import deltalake, pyarrow
import mlfuncs.bundles.bundle, mlfuncs.progress, mlfuncs_featurestore.catalog
import test_faults
from mlfuncs import registry
from mlfuncs_featurestore import delta_tables, ingest, offline, profile

warm = pyarrow.table({"amount": pyarrow.array([1], pyarrow.int32()), "k": [1]})
profile.Profile(["amount"]).add(warm)
offline.bucket_of(test_faults.view(), warm)
registry.open_registry(test_faults.open_store(home / "warm").settings).definitions.list("x")

def in_child(work, *arguments):
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)

def attempt(action, home, step):
    calls = 0
    def wrap(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            if calls == step:
                os._exit(99)
            calls += 1
            return function(*args, **kwargs)
        return wrapped
    for module, names in (
        (delta_tables, ["_add_columns", "write_file", "_try_commit", "find_commit", "delete_files"]),
        (ingest, ["prepare_table"]),
    ):
        for name in names:
            setattr(module, name, wrap(getattr(module, name)))
    action(test_faults.open_store(home))

for action, _, prepare in test_faults.ACTIONS:
    folder = home / action.__name__
    assert in_child(prepare, test_faults.open_store(folder / "start")) == 0
    step, code = -1, 99
    while code == 99:
        step += 1
        shutil.copytree(folder / "start", folder / str(step))
        code = in_child(attempt, action, folder / str(step), step)
    assert code == 0, code
"""


def open_store(home):
    return FeatureStore(Settings(home=home, project="shop"))


def view(**changes):
    expectation = Expectation("amount", minimum=0, action="quarantine")
    options = {"fields": {"amount": "int32"}, "buckets": 2, "expectations": [expectation]}
    return FeatureView("spend", entities=[Entity("k", int)], **{**options, **changes})


def rows(first, count):
    numbers = list(range(first, first + count))
    return pa.table({"k": numbers, "event_timestamp": pa.array([NOW] * count), "amount": numbers})


def ingest_more(store):
    store.ingest("spend", iter([rows(100, 4), rows(-2, 4)]), now=NOW, batch_rows=4)


def ingest_first(store):
    store.apply(view(fields={"amount": "int32", "note": "string"}, deprecated=["note"]))
    ingest_more(store)


def compact(store):
    store.offline.compact(store.catalog.view("spend"))


def widen(store):
    store.apply(view(fields={"amount": "int64"}))
    store.ingest("spend", rows(2**40, 1), now=NOW)


def stored(store):
    found = [part["k"].to_pylist() for part in store.offline.read(store.catalog.view("spend"))]
    return sorted(key for part in found for key in part)


OLD = list(range(10))
ADDED = [0, 1, 100, 101, 102, 103]  # -2 and -1 are quarantined


def with_nothing(store):
    store.apply(view())


def with_rows(store):
    store.apply(view())
    for first in (0, 5):
        store.ingest("spend", rows(first, 5), now=NOW)


# the action, the states it may leave (old first), and what goes before
ACTIONS = [
    (ingest_more, [OLD, sorted(OLD + ADDED)], with_rows),
    (ingest_first, [[], ADDED], with_nothing),
    (compact, [OLD], with_rows),
    (widen, [OLD, [*OLD, 2**40]], with_rows),
]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """A folder per action, with a home per step at which it crashed; the last one came to its end."""
    home = tmp_path_factory.mktemp("crashed")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-c", CRASHER, str(home), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.mark.parametrize(("action", "states", "prepare"), ACTIONS, ids=[one[0].__name__ for one in ACTIONS])
def test_a_crash_at_any_step_leaves_the_old_or_the_new_state(crashed, action, states, prepare):
    folder = crashed / action.__name__
    steps = len(list(folder.iterdir())) - 1
    assert steps >= 6
    seen = set()
    for step in range(steps):
        store = open_store(folder / str(step))
        state = stored(store)
        assert state in states, (step, state)
        seen.add(states.index(state))
        ingested = state == states[-1] and "ingest" in action.__name__
        assert store.offline.quarantined("spend").num_rows == (2 if ingested else 0), step
        if step % 4 == 0:  # and what crashed can be done again
            action(store)
            added = {compact: [], widen: [2**40]}.get(action, ADDED)
            assert stored(store) == sorted([*state, *added])
    assert seen == set(range(len(states)))
