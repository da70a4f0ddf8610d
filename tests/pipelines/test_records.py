"""What is kept of a run: rows of the registry, lineage events, and metrics that steps log."""

import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest
from kfp import dsl
from sklearn.linear_model import LogisticRegression

import mlfuncs as ml
from mlfuncs.cli import main
from mlfuncs.errors import ArtifactError, RunFailed
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
    assert contents[children["add"].id].params == {"a": 4, "b": 2}
    assert contents[children["logs-metric"].id].metrics == {"loss": 2.0}
    assert ml.get_run(done.id).status == "succeeded"


def test_outputs_and_inputs_of_steps_load_as_those_of_runs(tmp_path: Path) -> None:
    @ml.pipeline(name="loads")
    def loads(n: int = 30):
        parts = steps.split(steps.load(n).output, fraction=0.5)
        model = steps.train(parts.outputs["train"], {"c": 1.0})
        steps.report(0.5)
        steps.write_file("hello")
        return model.output

    done = loads.run()
    found = {run.function: run for run in ml.get_run(done.id).children()}
    assert set(found) == {"load", "split", "train", "report", "write-file"}
    split = found["split"]
    assert split.outputs["train"].load().equals(found["load"].outputs["Output"].load()[:15])
    assert split.outputs["rows"] == 30 and split.params == {"fraction": 0.5}
    assert split.inputs["data"].load().equals(found["load"].output["Output"])
    model = found["train"].outputs["Output"]
    assert isinstance(model.load(), LogisticRegression) and model.kind == "model" and model.uri
    assert isinstance(ml.get_run(done.id).outputs["Output"].load(), LogisticRegression)
    assert "0.50" in found["report"].outputs["Output"]._repr_html_() and "<svg" not in split._repr_html_()
    assert found["write-file"].outputs["Output"].load().read_text() == "hello"
    again = steps.rows.run(data=split.outputs["train"])  # an argument of a plain run
    assert again.output == 15 and again.versions["data"]["data"]


def test_an_artifact_that_was_deleted_says_so() -> None:
    @ml.pipeline(name="deleted")
    def deleted():
        steps.load(3)

    done = deleted.run()
    artifact = ml.get_run(done.id).children()[0].outputs["Output"]
    Path(artifact.uri).unlink()
    with pytest.raises(ArtifactError, match="deleted"):
        artifact.load()


@pytest.mark.parametrize("cache", [True, False])
def test_steps_have_the_versions_of_code_environment_and_data(cache: bool) -> None:
    @ml.pipeline(name="versions")
    def versions(n: int = 3):
        steps.rows(steps.load(n).output)

    def versions_of(n: int) -> dict[str, dict]:
        return {run.function: run.versions for run in ml.get_run(versions.run(n=n, cache=cache).id).children()}

    first, second = versions_of(3), versions_of(4)
    assert first["rows"]["code"] == second["rows"]["code"] != first["load"]["code"]
    assert first["rows"]["environment"] == second["rows"]["environment"]
    assert first["rows"]["data"]["data"] != second["rows"]["data"]["data"]
    (parent,) = {run.versions["pipeline"] for run in ml.list_runs(pipeline="versions") if run.row.kind == "pipeline"}
    assert len(parent) == 64


USER = ml.Entity("user_id", "int64")
SPEND = ml.FeatureView("spend", entities=[USER], timestamp="at", fields={"amount": "float64"})


@ml.function
def training_set(when: str) -> pd.DataFrame:
    spine = pd.DataFrame({"user_id": [1], "at": pd.to_datetime([when], utc=True)})
    with ml.FeatureStore() as store:
        return store.get_historical_features(spine, ["spend:amount"]).to_pandas()


def test_the_feature_tables_that_a_step_read_are_known_with_their_versions() -> None:
    def ingest(amount: float) -> int:
        with ml.FeatureStore() as store:
            store.apply([SPEND])
            at = pd.to_datetime(["2024-01-01"], utc=True)
            store.ingest("spend", pd.DataFrame({"user_id": [1], "at": at, "amount": [amount]}))
            return store.offline.snapshot("spend").version

    @ml.pipeline(name="trains")
    def trains():
        steps.rows(training_set("2024-01-02").output)

    versions = []
    for amount in (1.0, 2.0):
        version = ingest(amount)
        run = ml.get_run(trains.run(cache=False).id)
        (step,) = [each for each in run.children() if each.function == "training-set"]
        assert step.versions["features"] == {"spend": version} and step.params["features.spend"] == version
        versions.append(version)
        folder = Path(run.row.details["folder"])
        events = [json.loads(line) for line in (folder / "openlineage.jsonl").read_text().splitlines()]
        (read,) = [
            event["inputs"]
            for event in events
            if event["job"]["name"] == "trains.training-set" and event["eventType"] == "COMPLETE"
        ]
        (table,) = [dataset for dataset in read if dataset["name"].endswith("spend")]
        assert table["facets"]["version"]["datasetVersion"] == str(version)
    assert versions[0] < versions[1]
    assert f"run:{step.id}" in ml.FeatureStore().catalog.lineage("spend")["downstream"]


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


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


# what OpenLineage 2-0-2 requires of a RunEvent and of the facets that we write
URI = {"type": "string", "pattern": r"^[a-z][a-z0-9+.-]*:\S+$"}
RUN = {"runId": {"type": "string", "format": "uuid"}}
JOB = _object(
    ["namespace", "name"], namespace={"type": "string", "minLength": 1}, name={"type": "string", "minLength": 1}
)
FACET = {"_producer": URI, "_schemaURL": URI}
PARENT = _object([*FACET, "run", "job"], **FACET, run=_object(["runId"], **RUN), job=JOB)
VERSION = _object([*FACET, "datasetVersion"], **FACET, datasetVersion={"type": "string"})
DATASETS = {
    "type": "array",
    "items": _object(
        ["namespace", "name"],
        namespace={"type": "string", "minLength": 1},
        name={"type": "string", "minLength": 1},
        facets=_object([], version=VERSION),
    ),
}
EVENT = _object(
    ["eventTime", "producer", "schemaURL", "run", "job"],
    eventTime={"type": "string", "format": "date-time", "pattern": r"(Z|[+-]\d\d:\d\d)$"},
    eventType={"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
    producer=URI,
    schemaURL={**URI, "pattern": r"^https://openlineage\.io/spec/2-0-2/OpenLineage\.json#/\$defs/RunEvent$"},
    run=_object(["runId"], **RUN, facets=_object([], parent=PARENT)),
    job=JOB,
    inputs=DATASETS,
    outputs=DATASETS,
)


def test_lineage_events_are_what_openlineage_requires(tmp_path: Path) -> None:
    @ml.pipeline(name="lineage")
    def lineage(path: str):
        steps.rows(steps.load(3).output)
        training_set("2024-01-02")
        steps.needs_file(path)

    with ml.FeatureStore() as store:
        store.apply([SPEND])
        at = pd.to_datetime(["2024-01-01"], utc=True)
        store.ingest("spend", pd.DataFrame({"user_id": [1], "at": at, "amount": [1.0]}))
    with pytest.raises(RunFailed) as caught:
        lineage.run(path=str(tmp_path / "gone"))
    folder = Path(ml.get_run(caught.value.run_id).row.details["folder"])
    events = [json.loads(line) for line in (folder / "openlineage.jsonl").read_text().splitlines()]
    checker = jsonschema.Draft202012Validator(EVENT, format_checker=jsonschema.FormatChecker())
    for event in events:
        checker.validate(event)
        assert datetime.datetime.fromisoformat(event["eventTime"]).tzinfo is not None
    kinds = {(event["job"]["name"], event["eventType"]) for event in events}
    assert {("lineage.needs-file", "FAIL"), ("lineage", "FAIL"), ("lineage.rows", "COMPLETE")} <= kinds
    began = {event["run"]["runId"] for event in events if event["eventType"] == "START"}
    assert began == {event["run"]["runId"] for event in events if event["eventType"] != "START"}


def test_ls_runs_shows_a_pipelines_steps_and_how_long_they_took(capsys: pytest.CaptureFixture[str]) -> None:
    @ml.pipeline(name="listed")
    def listed(n: int = 3):
        steps.add(n)

    steps.add.run(a=1)
    listed.run()
    command = ["ls", "runs", "--pipeline", "listed"]

    def shown(*words: str) -> str:
        main([*command, *words])
        return capsys.readouterr().out

    capsys.readouterr()
    text = shown()
    assert "took" in text and re.search(r"\d (ms|s)\b", text) and "duration_s" not in text
    rows = json.loads(shown("--json"))["runs"]
    assert {(row["function"], row["step"]) for row in rows} == {("add", "add"), ("listed", None)}
    assert all(isinstance(row["duration_s"], float) for row in rows)
    assert {row["function"]: row["params"] for row in rows} == {"add": {"a": 3, "b": 2}, "listed": {"n": 3}}


@ml.function
def graded(x: int) -> int:
    ml.log_metric("status", x / 2)
    return x


def test_steps_of_one_name_are_told_apart_when_runs_are_compared() -> None:
    @ml.pipeline
    def grades():
        with dsl.ParallelFor([2, 4]) as item:
            graded(item)

    table = ml.compare_runs(sorted(ml.get_run(grades.run().id).children(), key=lambda run: run.row.step or ""))
    assert table.columns == ("run", "function", "step", "status", "took", "x", "metric status")
    places = [row["step"].partition("/")[2] for row in table.rows]  # kfp numbers its loops
    assert places == ["0/graded", "1/graded"]
    shown = [(row["function"], row["status"], row["x"], row["metric status"]) for row in table.rows]
    assert shown == [("graded", "succeeded", 2, 1.0), ("graded", "succeeded", 4, 2.0)]
    assert table.best == {(1, "metric status")}
