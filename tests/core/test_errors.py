"""Errors as they travel: pickled between processes, and as problem documents."""

from __future__ import annotations

import pickle

import pytest

from mlfuncs.errors import Conflict, InvalidInput, MissingExtra, MlfuncsError, NotFound, Overloaded, RunFailed
from mlfuncs.runs.outputs import OutputNotFound

ERRORS = [
    Conflict("taken"),
    InvalidInput("bad", [{"field": "x", "message": "is missing"}]),
    NotFound("endpoint", "chrun", ["churn"], hint="(here)"),
    OutputNotFound("output", "modle", ["model"]),
    MissingExtra("a thing", "docker"),
    Overloaded("busy", retry_after_s=3.0),
    RunFailed("it raised", "abc"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_to_another_process(error: MlfuncsError) -> None:
    error.add_note("seen in point 3")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert (str(back), vars(back), back.to_problem("r")) == (str(error), vars(error), error.to_problem("r"))
