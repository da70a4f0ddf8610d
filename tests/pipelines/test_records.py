"""What is kept of a run: rows of the registry, lineage events, and metrics that steps log."""

import json
import sys
from pathlib import Path

import pytest

import mlfuncs as ml
from mlfuncs.errors import RunFailed
from mlfuncs.registry import open_registry
from mlfuncs.settings import read_settings

sys.path.append(str(Path(__file__).parent))
import own_steps as steps


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFUNCS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFUNCS_PROJECT", "tests")


def test_run_and_steps_are_rows_of_the_registry() -> None:
    @ml.pipeline(name="rows")
    def rows(n: int = 3):
        steps.logs_metric(n)
        return steps.add(n)

    done = rows.run(n=4)
    registry = open_registry(read_settings())
    (parent,) = registry.runs.list(pipeline="rows", kind="pipeline")
    assert (parent.id, parent.status, parent.function) == (done.id, "succeeded", "rows")
    children = {row.step: row for row in registry.runs.list(parent_id=done.id)}
    assert {name: row.status for name, row in children.items()} == {"logs-metric": "succeeded", "add": "succeeded"}
    assert set(children["add"].versions) == {"code", "environment"}
    contents = registry.runs.contents([done.id, children["add"].id, children["logs-metric"].id])
    assert contents[done.id].params == {"n": 4}
    assert contents[children["add"].id].artifacts["output"]["Output"] == {"value": 6}
    assert contents[children["logs-metric"].id].metrics == {"loss": 2.0}
    assert ml.get_run(done.id).status == "succeeded"


def test_failed_step_is_in_the_registry_with_its_traceback(tmp_path: Path) -> None:
    @ml.pipeline(name="failing")
    def failing(path: str):
        steps.needs_file(path)

    with pytest.raises(RunFailed) as caught:
        failing.run(path=str(tmp_path / "gone"))
    (row,) = open_registry(read_settings()).runs.list(parent_id=caught.value.run_id)
    assert row.status == "failed" and row.error is not None
    assert row.error["type"] == "FileNotFoundError" and "read_text" in row.error["traceback"]


def test_lineage_events_link_steps_by_their_data() -> None:
    @ml.pipeline(name="linked")
    def linked():
        steps.rows(steps.load(3).output)

    done = linked.run()
    lines = (done.record.folder / "openlineage.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    kinds = [(event["job"]["name"], event["eventType"]) for event in events]
    assert kinds[0] == ("linked", "START") and kinds[-1] == ("linked", "COMPLETE")
    by_name = {event["job"]["name"]: event for event in events if event["eventType"] == "COMPLETE"}
    assert by_name["linked.load"]["outputs"] == by_name["linked.rows"]["inputs"]
    parent = by_name["linked.rows"]["run"]["facets"]["parent"]["run"]["runId"]
    assert parent == by_name["linked"]["run"]["runId"]
